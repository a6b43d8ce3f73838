"""Draw pictures like the paper's Figures 1 and 4."""
# matplotlib's own annotations leave many arguments open:
# pyright: reportUnknownMemberType=false

from matplotlib.figure import Figure

from ecanet.report import figures
from ecanet.studies.paper.printed import FIGURE_4, TABLE_3

__all__ = ["draw_figure_1", "draw_figure_4"]


def draw_figure_1() -> bytes:
    """Return a PNG like Figure 1, from Table 3's printed numbers: Top-1 against parameters, with FLOPs as area."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="Parameters (M)", ylabel="Top-1 (%)")
    resnets = [row.printed for row in TABLE_3.rows if row.printed["Backbone"].startswith("R-")]
    for i, method in enumerate(dict.fromkeys(row["Method"] for row in resnets)):
        rows = [row for row in resnets if row["Method"] == method]
        x, y, flops = ([float(row[c].rstrip("MG")) for row in rows] for c in ("#Param", "Top-1", "FLOPs"))
        color = "tab:red" if "ECA" in method else f"C{i + (i > 2)}"  # C3 is the same red
        axes.plot(x, y, linewidth=1, alpha=0.6, color=color)
        axes.scatter(x, y, s=[60 * f for f in flops], alpha=0.5, color=color)
        axes.scatter([], [], s=40, alpha=0.5, color=color, label=method)  # for the legend: one size for all methods
        if method in ("ResNet", "ECA-Net (ours)"):
            for row, x_value, y_value in zip(rows, x, y, strict=True):
                axes.annotate(row["Backbone"], (x_value, y_value), ha="center", va="center", fontsize=7)
    axes.legend(loc="lower right", fontsize=8, title="area: FLOPs", title_fontsize=8)
    axes.margins(0.12)
    return figures.to_png(figure)


def draw_figure_4() -> bytes:
    """Return a PNG like Figure 4, from its digitised points: Top-1 against k, with adaptive k and SENet as lines."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="Kernel size k", ylabel="Top-1 (%)")
    for color, name in (("tab:blue", "ECA-Net50"), ("tab:red", "ECA-Net101")):
        rows = [row.printed for row in FIGURE_4.rows if row.printed["Backbone"] == name]
        top1 = {row["k"]: float(row["Top-1"]) for row in rows}
        sizes = [k for k in top1 if k.isdigit()]
        axes.plot([int(k) for k in sizes], [top1[k] for k in sizes], "o-", color=color, label=f"{name}, fixed k")
        axes.axhline(top1["adaptive"], color=color, linestyle="--", linewidth=1, label=f"{name}, adaptive k")
        axes.axhline(top1["SENet"], color=color, linestyle=":", linewidth=1, label=name.replace("ECA-Net", "SENet"))
    axes.set_xticks([3, 5, 7, 9])
    figure.legend(fontsize=8, ncols=2, loc="outside lower center")
    return figures.to_png(figure)
