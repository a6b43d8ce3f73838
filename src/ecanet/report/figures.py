"""Draw the report's figures, as pieces of HTML that need no file, font or script from elsewhere."""
# The annotations of matplotlib leave many arguments open:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from ecanet.report.artifacts import GateSummary

__all__ = [
    "GREY",
    "INK",
    "NOT_METRICS",
    "PALETTE",
    "find_limits",
    "make_axes",
    "plot_confusion",
    "plot_curves",
    "plot_gates",
    "plot_precision_recall",
    "shorten",
    "show_legend",
    "show_plots",
    "style_axes",
    "to_pil",
    "to_png",
    "to_svg",
]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours that the colour-blind can tell apart (Okabe and Ito, 2008), on a light page and on a dark one."""

GREY = "#808080"
"""For what is there to compare with; it can be seen on a light page and on a dark one."""

INK = "#010203"
"""A black that nothing else has: in SVG it becomes the colour of the page's text."""

GROUND = "#fefdfc"
"""A white that nothing else has: in SVG it becomes the colour of the page."""

MAX_NUMBERED_CLASSES = 20
"""Confusion matrices of more classes show shades without numbers."""

NOT_METRICS = ("epoch", "learning_rate", "images_per_second", "seconds")
"""Columns of a run's history that do not measure its quality."""

NUMBER_WIDTH = 0.25
"""Share of an axis that a number beside a triangle takes."""

CELL_OPACITY = 0.75
"""Of a full cell of a confusion matrix: less than 1, so that the page's text can be read on it, light and dark."""

NARROWEST = 270
"""Points of width that a telephone shows. A wider drawing shrinks to two thirds at most; then its place scrolls."""


def plot_curves(history: Sequence[Mapping[str, float]]) -> str:
    """Return the losses, the metrics and the learning rate by epoch, as one SVG each in a row that wraps.

    A detector has a panel for the metrics of its masks, too. A value far outside the others does not decide the axis:
    a triangle at the edge and its number stand for it.
    """
    metrics = [name for name in history[0] if not name.endswith("loss") and name not in NOT_METRICS]
    panels = [
        ("loss", [name for name in history[0] if name.endswith("loss")]),
        ("held-out metrics", [name for name in metrics if not name.startswith("mask_")]),
        ("held-out metrics of the masks", [name for name in metrics if name.startswith("mask_")]),
        ("learning rate", ["learning_rate"]),
    ]
    epochs = [row["epoch"] for row in history]
    drawings: list[str] = []
    for title, names in panels:
        if not names:
            continue
        figure, axes = make_axes(4, 3, title=title, xlabel="epoch")
        curves = {name.replace("_", " "): [row[name] for row in history] for name in names}
        for name, values in curves.items():
            axes.plot(epochs, values, marker="o", markersize=3, label=name)
        # Twelve names would cover a detector's curves, so they are below the drawing.
        legend = show_legend(axes.get_lines()) if len(names) > 1 else ""
        limits = find_limits([value for values in curves.values() for value in values])
        if limits is not None and title != "learning rate":
            axes.set_ylim(limits)
            _mark_outside(axes, epochs, curves.values(), limits)
        axes.xaxis.get_major_locator().set_params(integer=True)
        drawings.append(f"<div>{to_svg(figure)}{legend}</div>")
    return f"<div class=plots>{''.join(drawings)}</div>"


def find_limits(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the limits of an axis that leaves out values far from the others; None if there are none such.

    Far is more than three times the distance between the quartiles beyond one of them (Tukey's outer fence).

    >>> find_limits([1.0, 1.1, 1.2, 1.3, 1.4, 50.0])
    (0.98, 1.42)
    >>> find_limits([1.0, 2.0, 3.0, 4.0])
    """
    finite = torch.tensor([value for value in values if isfinite(value)], dtype=torch.float64)
    if len(finite) < 5:
        return None
    first, third = (float(finite.quantile(share)) for share in (0.25, 0.75))
    reach = 3 * (third - first)
    inside = finite[(finite >= first - reach) & (finite <= third + reach)]
    low, high = float(inside.min()), float(inside.max())
    if len(inside) == len(finite) or low == high:
        return None
    margin = 0.05 * (high - low)
    return round(low - margin, 12), round(high + margin, 12)


def _mark_outside(
    axes: Any, at: Sequence[float], curves: Iterable[Sequence[float]], limits: tuple[float, float]
) -> None:
    """Draw a triangle at the edge of ``axes`` for each value beyond ``limits``; number the farthest that have room."""
    outside = [
        (value - limits[1] if value > limits[1] else limits[0] - value, x, value, colour)
        for values, colour in zip(curves, PALETTE, strict=False)
        for x, value in zip(at, values, strict=True)
        if value > limits[1] or value < limits[0]
    ]
    numbered: list[tuple[float, bool]] = []
    for _, x, value, colour in sorted(outside, reverse=True):
        above = value > limits[1]
        edge, offset = (limits[1], -14) if above else (limits[0], 8)
        axes.plot([x], [edge], marker="^" if above else "v", color=colour, markersize=7, clip_on=False)
        if all(side != above or abs(other - x) > NUMBER_WIDTH * (at[-1] - at[0]) for other, side in numbered):
            numbered.append((x, above))
            right = x > (at[0] + at[-1]) / 2
            place: dict[str, Any] = {"xytext": (-6 if right else 6, offset), "textcoords": "offset points"}
            place["bbox"] = {"facecolor": GROUND, "edgecolor": "none", "pad": 1}  # curves pass behind the number
            axes.annotate(f"{value:.3g}", (x, edge), ha="right" if right else "left", fontsize=9, **place)


def plot_confusion(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """Return the confusion matrix as SVG: rows are true classes, and the shade of a cell is its share of the row."""
    counts = torch.tensor(matrix)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    classes = len(class_names)
    numbered = classes <= MAX_NUMBERED_CLASSES
    side = 2 + 0.3 * classes if numbered else 8
    figure, axes = make_axes(side, side, xlabel="predicted", ylabel="true")
    axes.grid(visible=False)
    # One colour that is more or less opaque suits a light page and a dark one.
    colour = torch.tensor([0x00, 0x72, 0xB2]) / 255
    cells = torch.cat([colour.expand(classes, classes, 3), CELL_OPACITY * shares[..., None]], 2)
    axes.imshow(cells.numpy(), interpolation="nearest")
    if numbered:
        labels = [shorten(name) for name in class_names]
        axes.set_xticks(range(classes), labels, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(classes), labels, parse_math=False)
        for row in range(classes):
            for column in range(classes):
                if count := int(counts[row, column]):
                    axes.text(column, row, str(count), ha="center", va="center", fontsize=9)
    return to_svg(figure)


def shorten(name: str) -> str:
    """Return a class's name in at most 24 characters.

    >>> shorten("a" * 30)
    'aaaaaaaaaaaaaaaaaaaaaaa…'
    """
    return name if len(name) <= 24 else f"{name[:23]}…"


def plot_precision_recall(curves: Mapping[str, Sequence[float]]) -> str:
    """Return precision against recall as SVG, one line per name; precisions are at recall 0, 0.01, …, 1."""
    figure, axes = make_axes(5, 3.5, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    for name, precisions in curves.items():
        axes.plot([at / 100 for at in range(len(precisions))], precisions, label=shorten(name))
    axes.legend(frameon=False)
    return to_svg(figure)


def plot_gates(gates: Sequence[GateSummary]) -> str:
    """Return the weights of each gate as SVG, from the network's first gate to its last.

    Bars hold the middle half of the channels' mean weights, thin lines all of them. A second panel has the standard
    deviation between images, averaged over the channels: a gate at 0 is a constant.
    """
    width = max(4, 1.2 + 0.32 * len(gates))
    names = max(len(gate["name"]) for gate in gates)  # a letter takes 0.065 inches of height
    figure = Figure(figsize=(width, 3.8 + 0.065 * names), layout="constrained")
    weights, deviations = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for at, gate in enumerate(gates):
        low, first, middle, third, high = torch.tensor(gate["mean"]).quantile(torch.linspace(0, 1, 5)).tolist()
        weights.plot([at, at], [low, high], color=PALETTE[0], linewidth=1)
        weights.bar(at, third - first, 0.6, first, color=PALETTE[0])
        weights.plot([at - 0.3, at + 0.3], [middle, middle], color="white", linewidth=1.5)
        deviations.bar(at, float(torch.tensor(gate["deviation"]).mean()), 0.6, color=PALETTE[1])
    if max(max(gate["mean"]) for gate in gates) > 0.8:  # lossless gates begin at 1
        weights.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    weights.set(ylabel="mean weight\nof a channel")
    deviations.set(ylabel="deviation\nbetween images")
    deviations.set_xticks(range(len(gates)), [gate["name"] for gate in gates], rotation=60, ha="right", fontsize=9)
    for axes in (weights, deviations):
        axes.grid(alpha=0.3, axis="y")
    return to_svg(figure)


def make_axes(width: float, height: float, **settings: Any) -> tuple[Figure, Any]:
    """Return a figure of ``width`` x ``height`` inches and its axes (matplotlib's Axes), in this page's style."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = figure.subplots()
    style_axes(axes)
    axes.set(**settings)
    return figure, axes


def style_axes(axes: Any) -> None:
    """Give ``axes`` (matplotlib's) the palette, with dashed lines from the seventh colour on, and a faint grid."""
    axes.set_prop_cycle(color=[*PALETTE, *PALETTE], linestyle=["-"] * len(PALETTE) + ["--"] * len(PALETTE))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def show_plots(drawings: Iterable[Figure], *, triples: bool = False) -> str:
    """Return figures as HTML, in a row that wraps where the page is narrow, or in rows of three (``triples``)."""
    kind = "'plots triples'" if triples else "plots"
    return f"<div class={kind}>{''.join(map(to_svg, drawings))}</div>"


def show_legend(lines: Iterable[Line2D]) -> str:
    """Return the labels of ``lines`` (matplotlib's) as HTML, each after a piece of its line."""
    styles = {"-": "solid", "--": "dashed", ":": "dotted"}
    entries = [
        f"<span><i style='border-color: {_find_colour(line)}; border-style: {styles[str(line.get_linestyle())]}'></i>"
        f"{html.escape(str(line.get_label()))}</span>"
        for line in lines
    ]
    return f"<p class=legend>{''.join(entries)}</p>"


def _find_colour(line: Line2D) -> str:
    colour = str(line.get_color())
    return "currentColor" if colour == INK else colour


# figures and images as files


def to_png(picture: Figure | Tensor, *, dpi: int = 120) -> bytes:
    """Return a figure, or a uint8 image (1 or 3, H, W), as a PNG file; ``dpi`` is the resolution of a figure."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=dpi)
    else:
        to_pil(picture).save(buffer, "png")
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element for an HTML page, transparent, with black in the colour of the page's text."""
    _write_in_ink(figure)
    buffer = io.StringIO()
    # No date and no random identifiers: equal numbers must give equal files.
    with rc_context({"svg.hashsalt": "ecanet"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(GROUND, "var(--back)")
    points = 72 * figure.get_figwidth()
    if points <= NARROWEST:
        return text
    return text.replace("<svg", f'<svg style="min-width: {max(NARROWEST, 0.66 * points):.0f}pt"', 1)


def _write_in_ink(figure: Figure) -> None:
    """Give `INK` to everything of ``figure`` that is black."""
    for axes in figure.axes:
        axes.tick_params(colors=INK, which="both")
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)
    for artist in figure.findobj():
        if isinstance(artist, Text | Line2D) and artist.get_color() in ("black", "k"):
            artist.set_color(INK)


def to_pil(image: Tensor) -> Image.Image:
    """Return a uint8 image (1 or 3, H, W) as Pillow's."""
    from torchvision.transforms.v2.functional import to_pil_image  # pyright: ignore[reportMissingTypeStubs]

    return to_pil_image(image)
