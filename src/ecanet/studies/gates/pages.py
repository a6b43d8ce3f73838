"""A trained network's gates, drawn: by layer and class as on the authors' poster, and for one image."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecanet import data
from ecanet.data import check_classes, fitted, read_image
from ecanet.errors import ConfigError
from ecanet.recipes import ModelConfig, suggestion, to_dict
from ecanet.report import environment, figures, page, write_file
from ecanet.studies.gates import records as inspect
from ecanet.studies.gates.records import GateRecord
from ecanet.training import Classification, Task, restore

POSTER = ("hammerhead shark", "ambulance", "medicine chest", "butternut squash")
"""The classes that the authors' poster shows."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one gate did to one image: the likeliest class's log-odds, and those with the gate held at its mean."""

    name: str
    log_odds: float
    held: float
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found in one network; ``effects`` and ``answer`` are of one image, where one was given."""

    task: Task
    records: list[GateRecord]
    classes: list[int]
    effects: list[Effect]
    answer: str


def run(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    model: ModelConfig | None = None,
    data_name: str | None = None,
    data_dir: str | None = None,
    classes: Sequence[str] = (),
    image: str | Path | None = None,
) -> Inspection:
    """Record the gates of ``checkpoint`` (a file or a run's folder) on held-out data, and draw them in ``folder``.

    ``classes`` are the ones to draw, by default the poster's four, or the first four. ``image`` is one file to explain.
    ``model``, ``data_name`` and ``data_dir`` are as for `trained.evaluate`.

    Raises:
        ConfigError: a class does not exist, or the network has no channel gates.
        CheckpointError, DataError: as `trained.evaluate` raises them.
    """
    task = restore(checkpoint, model=model, data_name=data_name, data_dir=data_dir)
    if image is not None and Path(image).resolve() == (Path(folder) / "image.png").resolve():
        raise ConfigError(f"{image} would be written over; choose another --out")
    if not isinstance(task, Classification):
        raise ConfigError(f"{task.recipe.model.name} is a detector; inspect shows the gates of classifiers")
    inspect.gates(task.model)
    names = task.spec.class_names
    shown = [_class(name, names) for name in classes or [n for n in POSTER if n in names] or names[:4]]
    images = data.build(task.recipe.data, seed=task.recipe.seed, train=False)
    check_classes(task.recipe.data.name, images.spec, task.spec)
    records = inspect.record(task.model, _batches(images), len(names))
    effects, answer = ([], "") if image is None else explain(task, records, image)
    found = Inspection(task=task, records=records, classes=shown, effects=effects, answer=answer)
    write(found, Path(folder))
    return found


def _class(name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise ConfigError(f"there is no class {name!r}; {suggestion(name, list(names))}")
    return list(names).index(name)


def _batches(images: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in images.val_dataloader():
        yield images.on_after_batch_transfer(images.on_before_batch_transfer(batch, 0), 0)


def explain(task: Task, records: Sequence[GateRecord], path: str | Path) -> tuple[list[Effect], str]:
    """What each gate did to the image file ``path``, and what the network says of it."""
    spec = task.spec
    images = spec.normalize(fitted(spec)(read_image(path, spec.channels))[None])
    with torch.inference_mode():
        logits = task.model(images).double()[0]
    best = int(logits.argmax())
    weights = inspect.weights_for(task.model, images)
    held = inspect.without(task.model, images, records)
    effects = [
        Effect(
            name=one.name,
            log_odds=log_odds(logits, best),
            held=log_odds(held[one.name].double()[0], best),
            weights=weights[one.name][0].float().cpu(),
        )
        for one in records
    ]
    return effects, f"{Path(path).name}: {spec.class_names[best]}, {float(logits.softmax(0)[best]):.1%}"


def log_odds(logits: Tensor, at: int) -> float:
    """``log(p / (1 - p))`` of class ``at``, which still moves where p is all but 1.

    >>> round(log_odds(torch.tensor([1.0, 3.0]), 1), 6)
    2.0
    """
    return float(logits[at] - torch.cat([logits[:at], logits[at + 1 :]]).logsumexp(0))


# what is written


def write(found: Inspection, folder: Path) -> None:
    """Write inspect.json, the pictures as PNG, and inspect.html."""
    drawn = {"classes": by_class(found), "spread": spread(found.records)}
    if any(one.kernel is not None for one in found.records):
        drawn["kernels"] = kernels(found.records)
    if found.effects:
        drawn["image"] = one_image(found)
    if (folder / "inspect.json").exists():
        (folder / "image.png").unlink(missing_ok=True)  # drawn before, of another image perhaps
    for name, figure in drawn.items():
        write_file(folder / f"{name}.png", figures.to_png(figure, dpi=110))
    write_file(folder / "inspect.json", to_json(found))
    write_file(folder / "inspect.html", html(found, drawn))


def to_json(found: Inspection) -> str:
    """Every gate's numbers: means, spread, alarms, kernel, and what it did to the image."""
    names = found.task.spec.class_names
    effects = {effect.name: effect for effect in found.effects}
    rows = [
        {
            "gate": one.name,
            "channels": one.channels,
            "gain": one.gain,
            "mean": one.mean.tolist(),
            "deviation": one.deviation.tolist(),
            "class_means": {names[k]: one.class_means[k].tolist() for k in found.classes},
            "spread_between_classes": one.spread,
            "saturated": one.saturated,
            "dead_channels": one.dead.nonzero().flatten().tolist(),
            "alarms": one.alarms(),
            "kernel": None if one.kernel is None else one.kernel.tolist(),
            "image": None if one.name not in effects else _plain(effects[one.name]),
        }
        for one in found.records
    ]
    return json.dumps({"environment": environment(), "image": found.answer, "gates": rows}, indent=2)


def _plain(effect: Effect) -> dict[str, Any]:
    return {"log_odds": effect.log_odds, "held_at_mean": effect.held, "weights": effect.weights.tolist()}


def by_class(found: Inspection) -> Any:
    """Mean weight of each channel for the chosen classes, one panel a gate, as on the poster."""
    names = found.task.spec.class_names
    figure, panels = _panels(found.records)
    for one, axes in zip(found.records, panels, strict=True):
        for k in found.classes:
            axes.plot(one.class_means[k], linewidth=0.8, label=names[k])
        axes.plot(one.mean, color="black", linewidth=0.8, linestyle=":", label="all classes")
        axes.set_ylim(-0.02 * one.gain, 1.02 * one.gain)
        axes.set_title(f"{one.name}, {one.channels} channels", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def one_image(found: Inspection) -> Any:
    """The image's weights over the data's mean and two standard deviations, one panel a gate."""
    figure, panels = _panels(found.records)
    for one, effect, axes in zip(found.records, found.effects, panels, strict=True):
        at = range(one.channels)
        low, high = one.mean - 2 * one.deviation, one.mean + 2 * one.deviation
        axes.fill_between(at, low, high, color="tab:gray", alpha=0.3, linewidth=0, label="all images, 2 deviations")
        axes.plot(effect.weights, color="tab:red", linewidth=0.8, label="this image")
        axes.set_title(f"{one.name}: {effect.log_odds - effect.held:+.2f}", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _panels(records: Sequence[GateRecord]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(4, len(records))
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(3.2 * columns, 1.7 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for extra in panels[len(records) :]:
        extra.set_axis_off()
    for axes in panels:
        axes.tick_params(labelsize=7)
    return figure, panels[: len(records)]


def spread(records: Sequence[GateRecord]) -> Any:
    """Spread of the weights between classes and over all images, gate by gate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5, 0.45 * len(records) + 2), 3.4), layout="constrained")
    axes = figure.add_subplot(ylabel="standard deviation")
    at = torch.arange(len(records))
    axes.bar(at - 0.2, [one.spread for one in records], 0.4, label="between classes' means")
    axes.bar(at + 0.2, [float(one.deviation.mean()) for one in records], 0.4, label="between images")
    axes.set_xticks(at, [one.name for one in records], rotation=60, ha="right", fontsize=7)
    axes.legend(fontsize=8)
    return figure


def kernels(records: Sequence[GateRecord]) -> Any:
    """ECA's learned kernels: one row of squares a gate, red where a neighbour raises the weight."""
    from matplotlib.figure import Figure

    learned = [(one.name, one.kernel) for one in records if one.kernel is not None]
    widest = max(len(kernel) for _, kernel in learned)
    table = torch.full((len(learned), widest), torch.nan)
    for row, (_, kernel) in zip(table, learned, strict=True):
        start = (widest - len(kernel)) // 2
        row[start : start + len(kernel)] = kernel
    limit = max(float(kernel.abs().max()) for _, kernel in learned) or 1.0
    figure = Figure(figsize=(1.6 + 0.6 * widest, 1.2 + 0.25 * len(learned)), layout="constrained")
    axes = figure.add_subplot(xlabel="neighbouring channel")
    shown = axes.imshow(table.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(widest), [str(k - widest // 2) for k in range(widest)])
    axes.set_yticks(range(len(learned)), [name for name, _ in learned], fontsize=7)
    figure.colorbar(shown, ax=axes)
    return figure


def html(found: Inspection, drawn: dict[str, Any]) -> str:
    """One page that needs nothing else."""
    recipe, spec = found.task.recipe, found.task.spec
    alarms = [f"<li>{one.name}: {alarm}</li>" for one in found.records for alarm in one.alarms()]
    effect = "Number: the likeliest class's log-odds minus what they are with that gate held at its mean over the data."
    notes = {
        "image": (f"One image: {found.answer}", effect),
        "classes": ("Weights by gate and class", "Mean weight of each channel over the held-out images of a class."),
        "spread": ("Spread", "How much the weights differ between classes, and between images; 0 is a constant gate."),
        "kernels": ("Learned kernels", "ECA's weights for each channel's neighbours; 0 is the channel itself."),
    }
    sections = [("Alarms", "", f"<ul>{''.join(alarms)}</ul>" if alarms else "<p>None.</p>")]
    sections += [(*notes[name], figures.to_svg(drawn[name])) for name in notes if name in drawn]
    return page(
        title=f"The gates of {recipe.model.name} with {recipe.model.attention}",
        subtitle=f"on {recipe.data.name}, {int(found.records[0].counts.sum()):,} held-out images of "
        f"{len(spec.class_names)} classes",
        tiles=[(str(len(found.records)), "gates"), (str(len(alarms)), "alarms")],
        sections=sections,
        recipe=json.dumps(to_dict(recipe), indent=2),
        environment=environment(),
    )
