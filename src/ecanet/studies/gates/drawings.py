"""Draw what the gates of a network do: by class as on the authors' poster, for one image, and their kernels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ecanet.attention import GateRecord
from ecanet.data import DataSpec
from ecanet.studies.gates.cams import Pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The effect of one gate on one image: the log-odds of the likeliest class, with the gate as it is and held."""

    name: str
    log_odds: float
    held: float
    """Log-odds with the gate held at its mean weights over the data."""
    weights: Tensor
    """The gate's weights for the image (C)."""


def draw_classes(records: Sequence[GateRecord], classes: Mapping[int, str]) -> "Figure":
    """Draw the mean weight of each channel for the ``classes`` (names by label), one panel for each gate."""
    figure, panels = _make_panels(len(records))
    for one, axes in zip(records, panels, strict=True):
        for label in classes:
            axes.plot(one.class_means[label], linewidth=0.8)
        axes.plot(one.mean, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylim(-0.02 * one.ceiling, 1.02 * one.ceiling)
        axes.set_title(f"{one.name}, {one.channels} channels", fontsize=8)
    names = [*map(_shorten, classes.values()), "all classes"]
    columns = int(figure.get_figwidth() // 2.2)  # a name of 24 letters takes about 2 inches
    legend = figure.legend(panels[0].lines, names, loc="outside lower center", ncols=columns, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # class names may hold dollar signs
    return figure


def draw_image(records: Sequence[GateRecord], effects: Sequence[Effect]) -> "Figure":
    """Draw an image's weights over the data's mean and two standard deviations, one panel for each gate."""
    figure, panels = _make_panels(len(records))
    for one, effect, axes in zip(records, effects, panels, strict=True):
        _draw_band(axes, one)
        axes.plot(effect.weights, color="tab:red", linewidth=0.8, label="this image")
        axes.set_title(f"{one.name}: {effect.log_odds - effect.held:+.2f}", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def draw_weights(records: Sequence[GateRecord]) -> "Figure":
    """Draw each channel's mean weight over the images and two standard deviations, one panel for each gate."""
    figure, panels = _make_panels(len(records))
    for one, axes in zip(records, panels, strict=True):
        _draw_band(axes, one)
        axes.plot(one.mean, color="black", linewidth=0.8, label="mean")
        axes.set_ylim(-0.02 * one.ceiling, 1.02 * one.ceiling)
        axes.set_title(f"{one.name}, {one.channels} channels", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _draw_band(axes: Any, one: GateRecord) -> None:
    """Shade two standard deviations on each side of each channel's mean weight."""
    low, high = one.mean - 2 * one.deviation, one.mean + 2 * one.deviation
    label = "all images, 2 deviations"
    axes.fill_between(range(one.channels), low, high, color="tab:gray", alpha=0.3, linewidth=0, label=label)


def draw_cams(pairs: Sequence[Pair], spec: DataSpec) -> "Figure":
    """Draw each image, its class-activation map with the gates switched off, and the map with them."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(8.4, 3.1 * len(pairs)), layout="constrained")
    for row, pair in zip(figure.subplots(len(pairs), 3, squeeze=False), pairs, strict=True):
        picture = spec.denormalize(pair.image.cpu()).expand(3, -1, -1).permute(1, 2, 0).numpy()
        explained = _shorten(spec.class_names[pair.explained])
        titles = [f"{_shorten(pair.title)}\nmaps explain {explained!r}"]
        for head, one in (("gates off", pair.plain), ("gates on", pair.gated)):
            answer = f"{head}: {_shorten(spec.class_names[one.answer])}"
            titles.append(f"{answer}\n{explained!r} {one.probability:.1%}")
        for axes, title, one in zip(row, titles, (None, pair.plain, pair.gated), strict=True):
            axes.imshow(picture)
            if one is not None:
                axes.imshow(one.heat.numpy(), cmap="inferno", alpha=0.55, vmin=0, vmax=1)
            axes.set_axis_off()
            axes.set_title(title, fontsize=8, parse_math=False)
    return figure


def _shorten(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:23]}…"


def _make_panels(count: int) -> tuple[Any, list[Any]]:
    """Return a figure and ``count`` panels (matplotlib's Axes) in rows of four."""
    from matplotlib.figure import Figure

    columns = min(4, count)
    rows = -(-count // columns)
    figure: Any = Figure(figsize=(3.2 * columns, 1.7 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in panels[count:]:
        unused.set_axis_off()
    for axes in panels:
        axes.tick_params(labelsize=7)
    return figure, panels[:count]


def draw_spread(records: Sequence[GateRecord]) -> "Figure":
    """Draw how much the weights of each gate differ between images, and between classes if there are several."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(max(5, 0.45 * len(records) + 2), 3.4), layout="constrained")
    axes = figure.add_subplot(ylabel="standard deviation")
    positions = torch.arange(len(records))
    if len(records[0].counts) > 1:
        axes.bar(positions - 0.2, [one.spread for one in records], 0.4, label="between classes' means")
    axes.bar(positions + 0.2, [float(one.deviation.mean()) for one in records], 0.4, label="between images")
    axes.set_xticks(positions, [one.name for one in records], rotation=60, ha="right", fontsize=7)
    axes.legend(fontsize=8)
    return figure


def draw_kernels(records: Sequence[GateRecord]) -> "Figure":
    """Draw ECA's learned kernels, one row of squares for each gate: red where a neighbour raises the weight."""
    from matplotlib.figure import Figure

    kernels = {one.name: one.kernel for one in records if one.kernel is not None}
    widest = max(map(len, kernels.values()))
    table = torch.full((len(kernels), widest), torch.nan)
    for row, kernel in zip(table, kernels.values(), strict=True):
        start = (widest - len(kernel)) // 2
        row[start : start + len(kernel)] = kernel
    limit = max(float(kernel.abs().max()) for kernel in kernels.values()) or 1.0
    figure: Any = Figure(figsize=(1.6 + 0.6 * widest, 1.2 + 0.25 * len(kernels)), layout="constrained")
    axes = figure.add_subplot(xlabel="neighbouring channel")
    shown = axes.imshow(table.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(widest), [str(k - widest // 2) for k in range(widest)])
    axes.set_yticks(range(len(kernels)), list(kernels), fontsize=7)
    figure.colorbar(shown, ax=axes)
    return figure
