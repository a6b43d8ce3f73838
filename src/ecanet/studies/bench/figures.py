"""Draw the benchmark's result: images per second, and the times of block tails."""
# matplotlib's own annotations leave many arguments open:
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from ecanet.report import figures
from ecanet.studies.bench.measure import compute_ratio
from ecanet.studies.bench.rows import (
    LayerRow,
    NetworkRow,
    Result,
    format_headline,
    format_three_digits,
    list_batch_sizes,
    select_rows,
)

__all__ = ["draw", "draw_panels"]

BLUE, VERMILION, GREEN, PINK = figures.PALETTE[:4]

COLOURS = {"timm eca": VERMILION, "timm se": PINK}
"""Of networks with attention that are not this library's ECA, which is blue. Networks without are grey."""

TAILS = {"tail reference": figures.GREY, "tail timm": VERMILION, "tail ecanet": BLUE, "tail fused": GREEN}

Panel = tuple[int, Callable[[Any], None]]
"""The number of its bars, and what it draws on axes (matplotlib's Axes)."""


def draw(result: Result) -> Figure:
    """Return a figure with one row for each batch size: training, inference, and block tails if they were timed."""
    rows = list_panels(result)
    most = max(bars for row in rows for bars, _ in row)
    figure: Any = Figure(figsize=(14, len(rows) * (1.6 + 0.34 * most)), layout="constrained")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, places in zip(rows, grid, strict=True):
        for (_, panel), axes in zip(row, places, strict=True):
            figures.style_axes(axes)
            panel(axes)
    figure.suptitle(f"{format_headline(result)}. Bars are medians, lines quartiles.")
    return figure


def draw_panels(result: Result) -> list[Figure]:
    """Return the same panels as figures of their own, for a page on which they wrap."""
    drawn: list[Figure] = []
    for row in list_panels(result):
        for bars, panel in row:
            figure, axes = figures.make_axes(4.8, max(3.2, 1.3 + 0.3 * bars))
            panel(axes)
            drawn.append(figure)
    return drawn


def list_panels(result: Result) -> list[list[Panel]]:
    """Return the panels of each batch size."""
    rows: list[list[Panel]] = []
    for size in list_batch_sizes(result):
        row: list[Panel] = []
        for phase in ("training", "inference"):
            networks = select_rows(result["networks"], batch_size=size, phase=phase)
            row.append((len(networks), partial(_draw_networks, networks, f"{phase}, batch {size}")))
        if result["layers"]:
            layers = select_rows(result["layers"], batch_size=size)
            row.append((0, partial(_draw_layers, layers, f"block tail, batch {size}")))
        rows.append(row)
    return rows


def _draw_networks(rows: Sequence[NetworkRow], title: str, axes: Any) -> None:
    """Draw images per second, one bar for each network: ECA in colour, compiled networks hatched."""
    for at, row in enumerate(rows):
        size, ms, rate = row["batch_size"], row["ms"], row["images_per_second"]
        name = row["variant"].removesuffix(" compiled")
        hatch = "//" if name != row["variant"] else None
        whiskers = [[rate - 1e3 * size / ms["high"]], [1e3 * size / ms["low"] - rate]]
        colour = figures.GREY if name.split()[-1] == "plain" else COLOURS.get(name, BLUE)
        axes.barh(at, rate, color=colour, hatch=hatch, edgecolor="white", xerr=whiskers, capsize=2, ecolor=figures.INK)
        axes.text(1e3 * size / ms["low"], at, f"  {format_three_digits(rate)}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.grid(visible=False, axis="y")  # a line would cross the numbers
    axes.set(title=title, xlabel="images per second (longer is faster)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_layers(rows: Sequence[LayerRow], title: str, axes: Any) -> None:
    """Draw time as a multiple of the tail without attention, bars grouped by shape."""
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    names = [name for name in TAILS if select_rows(rows, variant=name)]
    for at, name in enumerate(names):
        multiples = [
            compute_ratio(
                *(select_rows(rows, shape=list(shape), variant=v)[0]["seconds"] for v in (name, "tail plain"))
            )
            for shape in shapes
        ]
        positions = [i + 0.8 * ((at + 0.5) / len(names) - 0.5) for i in range(len(shapes))]
        medians = [m["median"] for m in multiples]
        whiskers = [[m["median"] - m["low"] for m in multiples], [m["high"] - m["median"] for m in multiples]]
        label, style = name.removeprefix("tail "), {"color": TAILS[name], "capsize": 2, "ecolor": figures.INK}
        axes.bar(positions, medians, 0.8 / len(names), yerr=whiskers, label=label, **style)
    axes.axhline(1, color=figures.INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(shapes)), [f"{c}\n{h}×{w}" for _, c, h, w in shapes], fontsize=8)
    axes.set(title=title, ylabel="time / without attention (lower is faster)")
    axes.legend(frameon=False, ncols=len(names), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes.spines[["top", "right"]].set_visible(False)
