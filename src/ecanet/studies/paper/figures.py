"""Draw pictures like the paper's Figures 1 and 4."""
# matplotlib's own annotations leave many arguments open:
# pyright: reportUnknownMemberType=false

from matplotlib.figure import Figure

from ecanet.report import figures
from ecanet.studies.paper.printed import FIGURE_4, TABLE_3

__all__ = ["draw_figure_1", "draw_figure_4"]

OURS = figures.PALETTE[1]
"""The colour of ECA-Net, and of ECA-Net101 where there are two."""

MARKERS = ("o", "s", "D")
"""Shapes of the points: another one for each turn of the palette."""


def draw_figure_1() -> Figure:
    """Return a figure like Figure 1, from Table 3's printed numbers: Top-1 against parameters, with FLOPs as area."""
    figure, axes = figures.make_axes(4.8, 4.4, xlabel="Parameters (M)", ylabel="Top-1 (%)")
    resnets = [row.printed for row in TABLE_3.rows if row.printed["Backbone"].startswith("R-")]
    others = [colour for colour in figures.PALETTE if colour != OURS]
    for i, method in enumerate(dict.fromkeys(row["Method"] for row in resnets)):
        rows = [row for row in resnets if row["Method"] == method]
        x, y, flops = ([float(row[c].rstrip("MG")) for row in rows] for c in ("#Param", "Top-1", "FLOPs"))
        color, marker = (OURS, "o") if "ECA" in method else (others[i % len(others)], MARKERS[i // len(others)])
        axes.plot(x, y, linewidth=1, alpha=0.9, color=color, linestyle="-")
        axes.scatter(x, y, s=[14 * f for f in flops], alpha=0.85, color=color, marker=marker, linewidths=0)
        axes.scatter([], [], s=30, alpha=0.85, color=color, marker=marker, label=method)  # one size for all methods
        if method == "ECA-Net (ours)":
            for row, x_value, y_value in zip(rows, x, y, strict=True):
                place = {"xytext": (-8, 5), "textcoords": "offset points"}  # nothing is above a curve's left end
                axes.annotate(row["Backbone"], (x_value, y_value), ha="right", fontsize=9, **place)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, title="area: FLOPs", title_fontsize=9, frameon=False)
    axes.margins(0.12)
    return figure


def draw_figure_4() -> Figure:
    """Return a figure like Figure 4, from its digitised points: Top-1 against k, with adaptive k and SENet as lines."""
    figure, axes = figures.make_axes(4.8, 4.4, xlabel="Kernel size k", ylabel="Top-1 (%)")
    for color, name in ((figures.PALETTE[0], "ECA-Net50"), (OURS, "ECA-Net101")):
        rows = [row.printed for row in FIGURE_4.rows if row.printed["Backbone"] == name]
        top1 = {row["k"]: float(row["Top-1"]) for row in rows}
        sizes = [k for k in top1 if k.isdigit()]
        line = {"color": color, "marker": "o", "linestyle": "-"}
        axes.plot([int(k) for k in sizes], [top1[k] for k in sizes], label=f"{name}, fixed k", **line)
        axes.axhline(top1["adaptive"], color=color, linestyle="--", linewidth=1, label=f"{name}, adaptive k")
        axes.axhline(top1["SENet"], color=color, linestyle=":", linewidth=1, label=name.replace("ECA-Net", "SENet"))
    axes.set_xticks([3, 5, 7, 9])
    axes.margins(y=0.1)  # the highest line is not the frame's
    figure.legend(fontsize=9, ncols=2, loc="outside lower center", frameon=False)
    return figure
