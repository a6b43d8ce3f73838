"""Parameters and operations of a row's network, counted here and compared with the printed ones."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ecanet.attention import Attention
from ecanet.networks import find, image_size, is_ours
from ecanet.recipes import ModelConfig
from ecanet.studies.cost import Cost, count
from ecanet.studies.paper.cells import DECIMAL, MODERN, Cell, compare_with_printed
from ecanet.studies.paper.detection import count_detector
from ecanet.studies.paper.rows import Row

__all__ = ["check_module_parameters", "count_network", "count_row", "create_network"]

MEASURE_OF = {"#Param": "params", "FLOPs": "flops", "GFLOPs": "flops", "MACs": "flops"}
"""Columns that are counted, and the measure that each belongs to."""

COUNTED_IN_2020 = ("resnet18", "resnet34")
"""Networks of the poster. The authors counted them a year later, with a counter in which a ReLU counts nothing."""

WIDTHS = 4
"""ResNet-50 has blocks of this many different output widths."""

MODULE_PARAMETERS: dict[str, Callable[[int], int]] = {
    "0": lambda c: 0,
    "2C²/r": lambda c: 2 * c * c // 16,
    "C": lambda c: c,
    "C²": lambda c: c * c,
    "C²/16": lambda c: c * c // 16,
    "16C": lambda c: 16 * c,
    "8C": lambda c: 8 * c,
    "kC": lambda c: 3 * c,
    "k = 3": lambda c: 3,
}
"""Table 2's formulas for the parameters of one module with C channels."""


def count_row(row: Row, measures: Sequence[str]) -> dict[str, Cell]:
    """Return the row's cells of parameters and operations, as far as ``measures`` names them."""
    columns = [c for c, measure in MEASURE_OF.items() if c in row.printed and measure in measures]
    if row.model is None or not columns:
        return {}
    if row.detector is not None:
        detector = count_detector(row.model, row.detector)
        found = {"#Param": detector.trainable, "GFLOPs": detector.operations}
        details = {
            "#Param": f"{detector.parameters / 1e6:.2f}M with the frozen ones",
            "GFLOPs": "by the same rules",
        }
        return {
            c: compare_with_printed(row.printed[c], found[c], details[c], own=row.own, units=DECIMAL) for c in columns
        }
    cost = count_network(row.model)
    if "MACs" in row.printed:
        return {c: _compare_modern(c, row.printed[c], cost) for c in columns}
    operations = cost.operations_2020 if row.model.name in COUNTED_IN_2020 else cost.operations
    found = {"#Param": cost.parameters, "FLOPs": operations}
    details = {
        "#Param": f"{cost.parameters / 1e6:.2f} x 10^6",
        "FLOPs": f"{cost.macs / 1e9:.2f} x 10^9 multiply-accumulates",
    }
    return {c: compare_with_printed(row.printed[c], found[c], details[c], own=row.own) for c in columns}


def _compare_modern(column: str, printed: str, cost: Cost) -> Cell:
    """Return the cell of the parameters or multiply-accumulates of a network in a later paper's units."""
    found, suffix = (cost.parameters, "M") if column == "#Param" else (cost.macs, "G")
    if printed == "N/A":
        return Cell(printed=printed, here=f"{found / MODERN[suffix]:.2f}{suffix}")
    detail = f"{cost.attention_parameters:,} in the gates" if column == "#Param" else "convolutions and linear layers"
    return compare_with_printed(printed, found, detail, own=False, units=MODERN)


def check_module_parameters(printed: str, model: ModelConfig) -> Cell:
    """Return the cell of Table 2's formula ``printed``, compared with every attention module of ``model``.

    ``model`` is a ResNet-50, whose modules have 256, 512, 1024 and 2048 channels.
    """
    modules = [m for m in create_network(model).modules() if isinstance(m, Attention)]
    found = {m.channels: sum(p.numel() for p in m.parameters()) for m in modules}
    if model.attention != "none" and len(found) != WIDTHS:
        return Cell(printed=printed, here=f"modules of {len(found)} widths instead of {WIDTHS}", agrees=False)
    wrong = {c: n for c, n in found.items() if n != MODULE_PARAMETERS[printed](c)}
    here = ", ".join(f"{n:,} at C = {c}" for c, n in wrong.items())
    return Cell(printed=printed, here=here, agrees=not wrong)


def create_network(model: ModelConfig) -> nn.Module:
    """Return the network on the meta device, which has shapes and no values."""
    with torch.device("meta"):
        return find(model.name, attention=model.attention, kernel_sizes=model.kernel_sizes, **model.options)


def count_network(model: ModelConfig) -> Cost:
    """Return the cost of the network for one image of the size that it is made for."""
    if is_ours(model.name):
        return count(create_network(model))
    from torchvision.models import DenseNet, ResNet  # pyright: ignore[reportMissingTypeStubs]
    from torchvision.models.resnet import Bottleneck  # pyright: ignore[reportMissingTypeStubs]

    with torch.device("meta"):
        match model.name:  # torchvision has the classes of these three, but no names for them
            case "torchvision:resnet200":
                network = ResNet(Bottleneck, [3, 24, 36, 3])
            case "torchvision:resnext101_32x4d":
                network = ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
            case "torchvision:densenet264":
                network = DenseNet(32, (6, 12, 64, 48))
            case _:
                network = find(model.name)
                return count(network, image_size(model.name))
    return count(network)
