"""One row of a table: the printed cells, and the network that they describe, as a recipe describes it."""

import json
from dataclasses import dataclass

from ecanet.attention import options_of
from ecanet.recipes import DetectorConfig, ModelConfig

__all__ = ["Row", "Table", "backbone_of", "format_kernel_sizes", "name_checkpoint", "parse_table"]

OWN = "own"
FREEZES_GATES = ("se", "eca")
"""Attentions whose gates the paper trained on ImageNet, and then froze in the detectors' frozen stages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a table.

    ``model`` and ``detector`` are the ones of the recipe that trains the network. So in a detector's row
    ``model.name`` is the detector, and ``detector.backbone`` the network below it. In a classifier's row ``detector``
    is None. Both are None where this library has no such network.
    """

    printed: dict[str, str]
    """The printed text of each column."""
    model: ModelConfig | None = None
    detector: DetectorConfig | None = None
    notes: tuple[str, ...] = ()
    """Keys of ``printed.FOOTNOTES``."""
    own: bool = False
    """True if the authors counted the parameters and operations of this row themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One table or figure of the paper."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def backbone_of(model: ModelConfig, detector: DetectorConfig | None) -> ModelConfig:
    """Return the classification network: the detector's backbone, or ``model`` itself where there is no detector.

    >>> backbone_of(ModelConfig(name="retinanet"), DetectorConfig(backbone="resnet101")).name
    'resnet101'
    """
    return model if detector is None else model.but(name=detector.backbone)


def format_kernel_sizes(model: ModelConfig) -> str:
    """Return the kernel sizes as ``--kernel-sizes`` takes them, or "" if the attention has no kernel.

    >>> format_kernel_sizes(ModelConfig(attention="eca", kernel_sizes=(3, 5, 5, 7)))
    '3,5,5,7'
    >>> format_kernel_sizes(ModelConfig(attention="se"))
    ''
    """
    if "kernel_size" not in options_of(model.attention):
        return ""
    sizes = model.kernel_sizes
    return ",".join(map(str, sizes)) if isinstance(sizes, tuple) else str(sizes)


def name_checkpoint(model: ModelConfig, detector: DetectorConfig | None = None) -> str:
    """Return the name of a row's run, and of its checkpoint in a folder of weights.

    >>> name_checkpoint(ModelConfig(name="resnet50", kernel_sizes=(7, 7, 7, 7)))
    'resnet50-eca-7777'
    >>> name_checkpoint(ModelConfig(name="retinanet", attention="se"), DetectorConfig(backbone="resnet50"))
    'retinanet-resnet50-se'
    """
    parts = [model.name] if detector is None else [model.name, detector.backbone]
    parts.append(model.attention)
    sizes = format_kernel_sizes(model)
    if sizes not in ("", "official"):
        parts.append(sizes.replace(",", ""))
    parts += [f"{key}{value}" for key, value in model.options.items()]
    return "-".join(parts)


def parse_table(name: str, title: str, text: str) -> Table:
    """Return the table written as ``text``: a line of column names, then one line for each row.

    Cells are separated by ``|``. The first cell names the network: ``NETWORK ATTENTION OPTION=VALUE…``, with
    ``DETECTOR/`` before it in Tables 5 and 6, and ``k=`` for kernel sizes. ``torchvision:NAME`` is torchvision's
    network, and ``-`` stands for a network that this library does not build. The last cell lists footnotes and, where
    the authors counted parameters and operations themselves, "own". Counts in rows without "own" come from other
    papers, whose units are not known.

    >>> lines = "network | AP | notes\\nretinanet/resnet50 eca k=3,3,7,7 | 37.3 | own"
    >>> row = parse_table("5", "Detection", lines).rows[0]
    >>> row.model.kernel_sizes, row.detector.backbone, row.printed, row.own
    ((3, 3, 7, 7), 'resnet50', {'AP': '37.3'}, True)
    """
    head, *lines = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
    columns = tuple(head[1:-1])
    rows: list[Row] = []
    for network, *cells, notes in lines:
        marks = notes.split()
        model, detector = (None, None) if network == "-" else _parse_network(network)
        rows.append(
            Row(
                printed=dict(zip(columns, cells, strict=True)),
                model=model,
                detector=detector,
                notes=tuple(mark for mark in marks if mark != OWN),
                own=OWN in marks,
            )
        )
    return Table(name=name, title=title, columns=columns, rows=tuple(rows))


def _parse_network(text: str) -> tuple[ModelConfig, DetectorConfig | None]:
    first, *rest = text.split()
    attention, *pairs = rest or ["none"]
    options = dict(pair.split("=") for pair in pairs)
    sizes = options.pop("k", None)
    detector_name, _, name = first.rpartition("/")
    model = ModelConfig(
        name=detector_name or name,
        attention=attention,
        options={key: json.loads(value) for key, value in options.items()},
    )
    if sizes is not None:
        model = model.but(kernel_sizes=sizes if sizes.isalpha() else tuple(int(k) for k in sizes.split(",")))
    if not detector_name:
        return model, None
    return model, DetectorConfig(backbone=name, freeze_attention=attention in FREEZES_GATES)
