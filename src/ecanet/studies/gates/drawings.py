"""Draw what the gates of a network do: by class as on the authors' poster, for one image, and their kernels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ecanet.attention import GateRecord
from ecanet.data import DataSpec
from ecanet.report import figures
from ecanet.studies.gates.cams import Map, Pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LONGEST = 40
"""Letters of a gate's name that fit above or beside its panel."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The effect of one gate on one image: the log-odds of the likeliest class, with the gate as it is and held."""

    name: str
    log_odds: float
    held: float
    """Log-odds with the gate held at its mean weights over the data."""
    weights: Tensor
    """The gate's weights for the image (C)."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Panels of one kind: one picture of all of them for a file, or a row that wraps for a page."""

    panels: Sequence[Callable[[Any], None]]
    """Each draws on the axes (matplotlib's Axes) that it is given."""
    size: tuple[float, float] = (3.2, 1.9)
    """Width and height of a panel in inches."""
    columns: int = 4
    """Panels beside each other in a file, at most."""
    legend: bool = False
    """The lines of the first panel have a legend, which stands for all panels."""

    def to_figure(self) -> "Figure":
        """Return one picture of all panels."""
        from matplotlib.figure import Figure

        columns = min(self.columns, len(self.panels))
        rows = -(-len(self.panels) // columns)
        width, height = columns * self.size[0], rows * self.size[1]
        figure: Any = Figure(figsize=(width, height + 0.5 * self.legend), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for unused in grid[len(self.panels) :]:
            unused.set_axis_off()
        for panel, axes in zip(self.panels, grid, strict=False):
            figures.style_axes(axes)
            panel(axes)
        if self.legend:
            self._add_legend(figure, grid[0])
        return figure

    def _add_legend(self, figure: Any, axes: Any) -> None:
        handles = axes.get_lines()  # also those whose name begins with an underscore
        columns = int(figure.get_figwidth() // 2.2)  # a name of 24 letters takes about 2 inches
        names = [handle.get_label() for handle in handles]
        drawn = figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
        for text in drawn.get_texts():
            text.set_parse_math(False)  # class names may hold dollar signs

    def to_html(self) -> str:
        """Return each panel as a drawing of its own, after the legend."""
        drawn: list[Figure] = []
        legend = ""
        for panel in self.panels:
            figure, axes = figures.make_axes(*self.size)
            panel(axes)
            drawn.append(figure)
            if self.legend and not legend:
                legend = figures.show_legend(axes.get_lines())
        return legend + figures.show_plots(drawn, triples=self.columns == 3)


# weights of the channels


def draw_classes(records: Sequence[GateRecord], classes: Mapping[int, str]) -> Drawing:
    """Draw the mean weight of each channel for the ``classes`` (names by label), one panel for each gate."""
    return Drawing(panels=[partial(_draw_classes, one, classes) for one in records], legend=True)


def _draw_classes(one: GateRecord, classes: Mapping[int, str], axes: Any) -> None:
    for label, name in classes.items():
        axes.plot(one.class_means[label], linewidth=0.8, label=figures.shorten(name))
    axes.plot(one.mean, color=figures.INK, linewidth=0.8, linestyle=":", label="all classes")
    axes.set_ylim(-0.02 * one.ceiling, 1.02 * one.ceiling)
    _write_title(axes, one.name, f"{one.channels} channels")


def draw_image(records: Sequence[GateRecord], effects: Sequence[Effect]) -> Drawing:
    """Draw an image's weights over the data's mean and two standard deviations, one panel for each gate."""
    panels = [partial(_draw_effect, one, effect) for one, effect in zip(records, effects, strict=True)]
    return Drawing(panels=panels, legend=True)


def _draw_effect(one: GateRecord, effect: Effect, axes: Any) -> None:
    _draw_band(axes, one)
    axes.plot(effect.weights, color=figures.PALETTE[1], linewidth=0.8, label="this image")
    _write_title(axes, one.name, f"{effect.log_odds - effect.held:+.2f}")


def draw_weights(records: Sequence[GateRecord]) -> Drawing:
    """Draw each channel's mean weight over the images and two standard deviations, one panel for each gate."""
    return Drawing(panels=[partial(_draw_weights, one) for one in records], legend=True)


def _draw_weights(one: GateRecord, axes: Any) -> None:
    _draw_band(axes, one)
    axes.plot(one.mean, color=figures.PALETTE[0], linewidth=0.8, label="mean over the images")
    axes.set_ylim(-0.02 * one.ceiling, 1.02 * one.ceiling)
    _write_title(axes, one.name, f"{one.channels} channels")


def _draw_band(axes: Any, one: GateRecord) -> None:
    """Shade two standard deviations on each side of each channel's mean weight; a line stands for it in the legend."""
    low, high = one.mean - 2 * one.deviation, one.mean + 2 * one.deviation
    axes.fill_between(range(one.channels), low, high, color=figures.GREY, alpha=0.35, linewidth=0)
    axes.plot([], [], color=figures.GREY, linewidth=4, alpha=0.5, label="all images, 2 deviations")


def _write_title(axes: Any, name: str, note: str) -> None:
    """Write a gate's name above its panel and a note below it."""
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", integer=True)  # channels are whole numbers
    axes.set_title(f"{_shorten(name)}\n{note}", fontsize=8, parse_math=False)


def _shorten(name: str) -> str:
    """Return the name of a gate, of a long one the end."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


# maps


def draw_cams(pairs: Sequence[Pair], spec: DataSpec) -> Drawing:
    """Draw each image, its class-activation map with the gates switched off, and the map with them."""
    panels: list[Callable[[Any], None]] = []
    for pair in pairs:
        picture = spec.denormalize(pair.image.cpu()).expand(3, -1, -1).permute(1, 2, 0)
        explained = figures.shorten(spec.class_names[pair.explained])
        title = f"{figures.shorten(pair.title)}\nmaps explain {explained!r}"
        panels.append(partial(_draw_map, picture, None, title))
        for head, one in (("gates off", pair.plain), ("gates on", pair.gated)):
            answer = f"{head}: {figures.shorten(spec.class_names[one.answer])}"
            panels.append(partial(_draw_map, picture, one, f"{answer}\n{explained!r} {one.probability:.1%}"))
    return Drawing(panels=panels, size=(2.8, 3.1), columns=3)


def _draw_map(picture: Tensor, one: Map | None, title: str, axes: Any) -> None:
    axes.imshow(picture.numpy())
    if one is not None:
        axes.imshow(one.heat.numpy(), cmap="inferno", alpha=0.55, vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title(title, fontsize=8, parse_math=False)


# all gates in one panel


def draw_spread(records: Sequence[GateRecord]) -> Drawing:
    """Draw how much the weights of each gate differ between images, and between classes if there are several."""
    return Drawing(panels=[partial(_draw_spread, records)], size=(4.2, 1.0 + 0.28 * len(records)))


def _draw_spread(records: Sequence[GateRecord], axes: Any) -> None:
    """Draw horizontal bars, the network's first gate at the top, so that names can be read."""
    positions = torch.arange(len(records))
    both = len(records[0].counts) > 1
    if both:
        values = [one.spread for one in records]
        axes.barh(positions - 0.2, values, 0.4, label="between classes' means", color=figures.PALETTE[1])
    values = [float(one.deviation.mean()) for one in records]
    axes.barh(positions + 0.2 * both, values, 0.4, label="between images", color=figures.PALETTE[0])
    axes.set_yticks(positions, [_shorten(one.name) for one in records], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("standard deviation")
    axes.figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=2)


def draw_kernels(records: Sequence[GateRecord]) -> Drawing:
    """Draw ECA's learned kernels, one row of squares for each gate, coloured by whether they raise its weight."""
    kernels = {one.name: one.kernel for one in records if one.kernel is not None}
    widest = max(map(len, kernels.values()))
    size = (min(4.6, 2.4 + 0.35 * widest), 1.2 + 0.25 * len(kernels))
    return Drawing(panels=[partial(_draw_kernels, kernels, widest)], size=size)


def _draw_kernels(kernels: Mapping[str, Tensor], widest: int, axes: Any) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    table = torch.full((len(kernels), widest), torch.nan)
    for row, kernel in zip(table, kernels.values(), strict=True):
        start = (widest - len(kernel)) // 2
        row[start : start + len(kernel)] = kernel
    limit = max(float(kernel.abs().max()) for kernel in kernels.values()) or 1.0
    colours = LinearSegmentedColormap.from_list("signs", [figures.PALETTE[0], "white", figures.PALETTE[1]])
    axes.grid(visible=False)
    shown = axes.imshow(table.numpy(), cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(widest), [str(k - widest // 2) for k in range(widest)])
    axes.set_yticks(range(len(kernels)), map(_shorten, kernels), fontsize=8)
    axes.set_xlabel("neighbouring channel")
    axes.figure.colorbar(shown, ax=axes)
