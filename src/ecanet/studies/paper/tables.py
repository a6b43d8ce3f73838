"""The paper's tables, its numbers beside what this library measures.

What is printed stands in `paper_rows`; `paper_pages` writes the result down. `paper_runs` has the commands and the
accuracies, `paper_detection` the costs of detectors. A cell that was measured is marked ✓, or has the number found
here beside it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecanet.attention import Attention
from ecanet.errors import ConfigError, DataError
from ecanet.models import create_model
from ecanet.networks import find, find_device, image_size
from ecanet.recipes import suggestion
from ecanet.report import environment
from ecanet.studies.cost import WHY, Cost, count
from ecanet.studies.paper.detection import WHY as DETECTORS
from ecanet.studies.paper.detection import detector_cost
from ecanet.studies.paper.rows import TABLES, Network, Row, Table
from ecanet.studies.paper.runs import checkpoint_of, command, misfit, scores

MEASURES = ("params", "flops", "speed", "accuracy")
MEASURE_OF = {
    "#Param": "params",
    "FLOPs": "flops",
    "GFLOPs": "flops",
    "Train FPS": "speed",
    "Infer FPS": "speed",
    "Top-1": "accuracy",
    "Top-5": "accuracy",
}
BINARY = {"M": 2**20, "G": 2**30}
DECIMAL = {"M": 10**6, "": 10**9}
"""What the suffix of a printed number stands for: Table 5 prints GFLOPs without one."""
BATCH = {True: 2, False: 32}
"""Images in a step whose speed is measured: on a CPU, on a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What is printed and what was found here; ``agrees`` is None where nothing was compared."""

    printed: str
    here: str = ""
    agrees: bool | None = None

    def __str__(self) -> str:
        if self.agrees:
            return f"{self.printed} ✓" + (f" ({self.here})" if self.here else "")
        return f"{self.printed} (here {self.here})" if self.here else self.printed


@dataclass(kw_only=True)
class Measured:
    """One table with its measured cells, row by row, and the command that trains each row."""

    table: Table
    cells: list[dict[str, Cell]]
    commands: list[str | None] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def run(
    name: str | None = None,
    *,
    measure: Sequence[str] = ("params", "flops"),
    data: str | Path | None = None,
    weights: str | Path | None = None,
    device: str = "cpu",
) -> list[Measured]:
    """Measure the table called ``name`` (1 to 6, poster, figure4), or all of them.

    ``measure`` chooses among params, flops, speed and accuracy. Accuracy needs ``data``, a folder in ImageNet's layout,
    or in COCO's for Tables 5 and 6, and ``weights``, a folder with one checkpoint (or run) per row, named as the
    commands name them; rows without one keep the printed figure. Speed is this machine's: the rate of each network as
    a share of the plain network's.

    >>> str(run("poster", measure=["params"])[0].cells[0]["#Param"])
    '11.148M ✓'

    Raises:
        ConfigError: a table, measure or device does not exist, or something given is not used.
        DataError: the data or the folder of weights is not there, or the data are not in the table's layout.
    """
    if name is not None and name not in TABLES:
        raise ConfigError(f"the paper has no table {name!r}; {suggestion(name, list(TABLES))}")
    for one in measure:
        if one not in MEASURES:
            raise ConfigError(f"cannot measure {one!r}; {suggestion(one, list(MEASURES))}")
    for what in (data, weights):
        if what is not None and not Path(what).is_dir():
            raise DataError(f"{what}: no such folder")
    if data is not None and name is not None and (wrong := misfit(TABLES[name], data)):
        raise DataError(wrong)
    if "accuracy" not in measure and (data or weights):
        raise ConfigError("data and weights are for accuracy: measure it too (--measure params,flops,accuracy)")
    device = str(find_device(device))
    if list(measure) == ["speed"] and name is not None and "Train FPS" not in TABLES[name].columns:
        raise ConfigError(f"the paper prints no speed in table {name}; table 3 has it")
    chosen = TABLES.values() if name is None else [TABLES[name]]
    return [_measured(table, measure, data, weights, device) for table in chosen]


def _measured(
    table: Table, measure: Sequence[str], data: str | Path | None, weights: str | Path | None, device: str
) -> Measured:
    cells = [{column: Cell(printed=text) for column, text in row.printed.items()} for row in table.rows]
    result = Measured(table=table, cells=cells, commands=[command(row.network) for row in table.rows])
    if {"params", "flops"} & set(measure):
        result.remarks += [why for column, why in (("FLOPs", WHY), ("GFLOPs", DETECTORS)) if column in table.columns]
    for row, found in zip(table.rows, cells, strict=True):
        if row.network is not None:
            if table.name == "2" and "params" in measure:
                found["#Param"] = module_parameters(row)
            else:
                found |= costs(row, measure)
    if "speed" in measure and "Train FPS" in table.columns:
        _add_speed(table, cells, device)
        where = f"{environment()['device']}, {torch.get_num_threads()} threads, batch {BATCH[device == 'cpu']}"
        result.remarks.append(f"Speed: measured on {where}, as shares of the plain network's rate (lowest to highest).")
    if "accuracy" in measure and {"Top-1", "AP"} & set(table.columns):
        if data is None or weights is None:
            result.remarks.append("Accuracy was not measured: give --data and --weights, or train a row as below.")
        elif wrong := misfit(table, data):
            result.remarks.append(f"Accuracy was not measured: {wrong}.")
        else:
            _add_accuracy(table, cells, data, weights)
    elif "AP" in table.columns:
        result.remarks.append("AP is as printed; --measure accuracy measures it.")
    return result


# costs


def costs(row: Row, measure: Sequence[str]) -> dict[str, Cell]:
    """The row's cells of parameters and operations, counted."""
    wanted = [c for c in ("#Param", "FLOPs", "GFLOPs") if c in row.printed and MEASURE_OF[c] in measure]
    if row.network is None or not wanted:
        return {}
    if row.network.detector:
        detector = detector_cost(row.network)
        ours = {"#Param": detector.trainable, "GFLOPs": detector.operations}
        today = {"#Param": f"{detector.parameters / 1e6:.2f}M with the frozen ones", "GFLOPs": "by the same rules"}
        return {c: compared(row.printed[c], ours[c], today[c], row.own, units=DECIMAL) for c in wanted}
    cost = cost_of(row.network)
    early = row.network.name in ("resnet18", "resnet34")  # counted a year later, by other rules
    ours = {"#Param": cost.parameters, "FLOPs": cost.operations_2020 if early else cost.operations}
    today = {
        "#Param": f"{cost.parameters / 1e6:.2f} x 10^6",
        "FLOPs": f"{cost.macs / 1e9:.2f} x 10^9 multiply-accumulates",
    }
    return {column: compared(row.printed[column], ours[column], today[column], row.own) for column in wanted}


def compared(printed: str, ours: int, today: str, own: bool, *, units: dict[str, int] = BINARY) -> Cell:
    """The cell ``printed`` ("24.37M", "3.86G") beside ``ours`` in its suffix's unit; if unlike, ``today``'s too.

    Only where the authors counted themselves (``own``) can a number cut after its last digit pass for theirs.

    >>> str(compared("24.37M", 25_557_032, "", True)), str(compared("319.9M", 335_512_960, "", True))
    ('24.37M ✓', '319.9M ✓ (319.97 cut)')
    >>> str(compared("25.80M", 25_779_072, "25.78 x 10^6", False))
    '25.80M (here 24.58M; 25.78 x 10^6)'
    """
    number = printed.rstrip("MG")
    suffix = printed[len(number) :]
    digits = len(number.partition(".")[2])
    value = ours / units[suffix]
    if f"{value:.{digits}f}" == number:
        return Cell(printed=printed, agrees=True)
    if own and f"{int(value * 10**digits) / 10**digits:.{digits}f}" == number:
        return Cell(printed=printed, here=f"{value:.{digits + 1}f} cut", agrees=True)
    return Cell(printed=printed, here=f"{value:.{digits}f}{suffix}; {today}", agrees=False)


def module_parameters(row: Row) -> Cell:
    """Table 2's formula for one module's parameters, held to the modules of ResNet-50: 256 to 2048 channels."""
    assert row.network is not None
    formula: dict[str, Callable[[int], int]] = {
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
    printed = row.printed["#Param"]
    model = _build(row.network)
    sizes = {m.channels: sum(p.numel() for p in m.parameters()) for m in _gates(model)}
    wrong = {c: n for c, n in sizes.items() if n != formula[printed](c)}
    if row.network.attention != "none" and len(sizes) != 4:
        return Cell(printed=printed, here=f"{len(sizes)} widths", agrees=False)
    here = ", ".join(f"{n:,} at C = {c}" for c, n in (wrong or {}).items())
    return Cell(printed=printed, here=here, agrees=not wrong)


def _gates(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Attention)]


def _build(network: Network) -> nn.Module:
    with torch.device("meta"):  # shapes are enough
        return find(network.name, attention=network.attention, **_arguments(network))


def _arguments(network: Network) -> dict[str, Any]:
    return {"kernel_sizes": network.kernel_sizes, **network.options}


def cost_of(network: Network) -> Cost:
    """The cost of a row's network at the size it is made for."""
    if ":" not in network.name:
        return count(_build(network))
    from torchvision.models import DenseNet, ResNet
    from torchvision.models.resnet import Bottleneck

    with torch.device("meta"):
        match network.name:  # the ones that torchvision can build but does not name
            case "torchvision:resnet200":
                model = ResNet(Bottleneck, [3, 24, 36, 3])
            case "torchvision:resnext101_32x4d":
                model = ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
            case "torchvision:densenet264":
                model = DenseNet(32, (6, 12, 64, 48))
            case _:
                model = find(network.name)
                return count(model, image_size(network.name, model))
    return count(model)


# accuracy


def _add_accuracy(table: Table, cells: list[dict[str, Cell]], data: str | Path, weights: str | Path) -> None:
    for row, found in zip(table.rows, cells, strict=True):
        checkpoint = row.network and checkpoint_of(row.network, Path(weights))
        if row.network is None or checkpoint is None:
            continue
        for column, text in scores(row.network, checkpoint, data, masks=table.name == "6").items():
            if column in found:
                printed = row.printed[column]
                found[column] = Cell(printed=printed, here="" if text == printed else text, agrees=text == printed)


# speed


def _add_speed(table: Table, cells: list[dict[str, Cell]], device: str) -> None:
    """Rates of each backbone's networks as shares of its plain network's, printed beside measured."""
    for plain in (i for i, row in enumerate(table.rows) if row.network and row.network.attention == "none"):
        name = table.rows[plain].network.name  # pyright: ignore[reportOptionalMemberAccess]
        mine = [i for i, row in enumerate(table.rows) if row.network and row.network.name == name]
        networks = [network for i in mine if (network := table.rows[i].network)]
        rates = seconds_per_step(networks, device, batch=BATCH[device == "cpu"])
        for column, times in zip(("Train FPS", "Infer FPS"), rates, strict=True):
            for i, ratio in zip(mine, shares(times, mine.index(plain)), strict=True):
                printed, of = table.rows[i].printed[column], table.rows[plain].printed[column]
                wanted = "" if printed == "N/A" else f"{float(printed) / float(of):.2f} of plain, "
                cells[i][column] = Cell(printed=printed, here=f"{wanted}measured {ratio}")


def shares(times: list[list[float]], plain: int) -> list[str]:
    """Median rate as a share of row ``plain``'s in the same round, with the lowest and highest round.

    >>> shares([[1.0, 1.0, 2.0], [2.0, 1.0, 2.5]], plain=0)
    ['1.00 (1.00 to 1.00)', '0.80 (0.50 to 1.00)']
    """
    ratios = [sorted(p / t for p, t in zip(times[plain], row, strict=True)) for row in times]
    return [f"{statistics.median(r):.2f} ({r[0]:.2f} to {r[-1]:.2f})" for r in ratios]


def seconds_per_step(
    networks: Sequence[Network], device: str, *, batch: int, side: int = 224, rounds: int = 5
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of a training step and of an inference, for each network, round by round: all networks in every round."""
    models = [create_model(n.name, attention=n.attention, **_arguments(n)).to(device) for n in networks]
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    train: list[list[float]] = [[] for _ in models]
    infer: list[list[float]] = [[] for _ in models]
    for at in range(rounds + 1):
        for i, model in enumerate(models):
            model.train()
            trained = _seconds(lambda model=model: model(images).square().mean().backward(), device)
            model.zero_grad(set_to_none=True)
            model.eval()
            with torch.inference_mode():
                inferred = _seconds(lambda model=model: model(images), device)
            if at > 0:  # the first round warms up
                train[i].append(trained)
                infer[i].append(inferred)
    return train, infer


def _seconds(step: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    step()
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))
    return time.perf_counter() - started
