"""The picture of an ablation: paired differences to the plain network, and the metric against parameters."""
# matplotlib's own annotations leave many arguments open:
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ecanet.report import figures
from ecanet.studies.ablate.comparison import Result
from ecanet.studies.ablate.grid import Ablation
from ecanet.studies.ablate.metrics import Metric

__all__ = ["draw", "draw_panels", "spread_labels"]


def draw(ablation: Ablation) -> Figure:
    """Return a figure of two panels.

    The left one shows each variant's metric minus the plain network's, seed by seed; the right one the metric against
    parameters.
    """
    figure = Figure(figsize=(11, 1.8 + 0.32 * len(ablation.results)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figures.style_axes(left)
    figures.style_axes(right)
    _draw_differences(left, ablation.results, ablation.metric)
    _draw_scores(right, ablation.results, ablation.metric)
    return figure


def draw_panels(ablation: Ablation) -> list[Figure]:
    """Return the two panels as figures of their own, for a page on which they wrap."""
    height = max(3.2, 1.2 + 0.34 * len(ablation.results))
    drawn: list[Figure] = []
    for draw_one in (_draw_differences, _draw_scores):
        figure, axes = figures.make_axes(4.8, height)
        draw_one(axes, ablation.results, ablation.metric)
        drawn.append(figure)
    return drawn


def _draw_differences(axes: Axes, results: Sequence[Result], metric: Metric) -> None:
    """Draw one dot for each seed, the mean, and its 95 % interval, from the first variant at the top downward."""
    plain, *others = results
    for y, result in enumerate(reversed(others)):
        color = figures.PALETTE[1] if result.significant else figures.GREY
        dots = [score - plain.by_seed[seed] for seed, score in result.by_seed.items()]
        axes.scatter(dots, [y] * len(dots), s=14, alpha=0.5, color=color)
        if result.difference is not None:
            axes.errorbar(
                result.difference.mean,
                y,
                xerr=result.difference.half,
                fmt="D" if result.significant else "o",
                color=color,
                capsize=4,
            )
    axes.axvline(0, color=figures.INK, linewidth=1)
    names = [
        ", ".join((result.variant.label.replace(" (", "\n("), *result.variant.same_as)) for result in reversed(others)
    ]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(f"paired difference to the plain network\n({metric.points}; diamonds: significant)")


def _draw_scores(axes: Axes, results: Sequence[Result], metric: Metric) -> None:
    parameters = [result.variant.cost.parameters for result in results]
    means = [result.score.mean for result in results]
    for x, result in zip(parameters, results, strict=True):
        axes.errorbar(x, result.score.mean, yerr=result.score.half, fmt="o", color=figures.PALETTE[0])
    axes.set(xlabel="parameters", ylabel=metric.heading)
    axes.margins(x=0.45)  # room for the names, which stand to the right of the dots
    if max(parameters) > 10 * min(parameters):
        axes.set_xscale("log")
    else:  # whole numbers, because gates alone differ by a few parameters only
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    most = 100 if metric.unit == "%" else 1
    axes.set_ylim(max(axes.get_ylim()[0], -0.02 * most), min(axes.get_ylim()[1], 1.02 * most))
    low, high = axes.get_ylim()  # an interval of two seeds leaves the range of scores, and would flatten all others
    labels = spread_labels(means, gap=0.06 * (high - low))
    for x, y, label_y, result in zip(parameters, means, labels, results, strict=True):
        axes.annotate(
            result.variant.name,
            xy=(x, y),
            xytext=(12, label_y),
            textcoords=("offset points", "data"),
            va="center",
            fontsize=9,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": figures.GROUND, "edgecolor": "none"},  # over intervals
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": figures.GREY},
        )


def spread_labels(values: Sequence[float], gap: float) -> list[float]:
    """Return a height for the label of each value, in the given order.

    From the lowest value up, a label is raised where it would be less than ``gap`` above the label below it.

    >>> spread_labels([5.0, 1.0, 1.0, 1.25], gap=0.5)
    [5.0, 1.0, 1.5, 2.0]
    """
    heights = [0.0] * len(values)
    lowest = float("-inf")
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        heights[i] = max(values[i], lowest)
        lowest = heights[i] + gap
    return heights
