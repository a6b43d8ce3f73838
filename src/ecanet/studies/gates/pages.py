"""Inspect the gates of a trained network on held-out data, and write numbers, figures and one HTML page."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ecanet.data import DataSpec, build_eval_transform, check_classes, read_image
from ecanet.errors import ConfigError
from ecanet.recipes import ModelConfig, suggestion, to_dict
from ecanet.report import environment, figures, page, write_file
from ecanet.studies.gates.cams import Pair, compare, prepare_maps
from ecanet.studies.gates.drawings import Effect, draw_cams, draw_classes, draw_image, draw_kernels, draw_spread
from ecanet.studies.gates.records import (
    GateRecord,
    compute_image_weights,
    find_gates,
    record,
    run_with_held_gates,
    to_list,
    to_number,
)
from ecanet.training import Classification, Task, build_data, restore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POSTER = ("hammerhead shark", "ambulance", "medicine chest", "butternut squash")
"""The ImageNet classes on the authors' poster."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The records of one network's gates and, if an image was given, their effects on it."""

    task: Task
    records: list[GateRecord]
    classes: list[int]
    """Labels of the classes that are drawn."""
    effects: list[Effect]
    answer: str
    """The image's file name, likeliest class and probability; empty without an image."""
    layer: str = ""
    """The module whose activations the class-activation maps show; empty without maps."""
    maps: Sequence[Pair] = ()
    """The class-activation maps of a few images."""


def run(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    model: ModelConfig | None = None,
    data_name: str | None = None,
    data_dir: str | None = None,
    classes: Sequence[str] = (),
    image: str | Path | None = None,
    cam: bool = False,
) -> Inspection:
    """Record the gates of a trained network on held-out data, and write numbers, figures and a page.

    Args:
        checkpoint: A checkpoint file, or the folder of a run.
        folder: Folder for the files.
        model: As for `ecanet.training.evaluate`.
        data_name: As for `ecanet.training.evaluate`.
        data_dir: As for `ecanet.training.evaluate`.
        classes: Names of the classes to draw (default: those of the authors' poster, or the first four).
        image: An image file to explain.
        cam: Draw class-activation maps with the gates and without, for ``image`` and the first image of each class.

    Raises:
        ConfigError: a class does not exist, the network has no channel gates or is a detector, ``image`` would be
            overwritten, or there can be no class-activation maps.
        CheckpointError: the checkpoint is missing, broken or for another network.
        DataError: data or image are missing or broken.
    """
    task = restore(checkpoint, model=model, data_name=data_name, data_dir=data_dir)
    taken = [Path(folder) / name for name in ("image.png", "cams.png")]
    if image is not None and Path(image).resolve() in [path.resolve() for path in taken]:
        raise ConfigError(f"{image} would be overwritten; choose another --out")
    if not isinstance(task, Classification):
        raise ConfigError(f"{task.recipe.model.name} is a detector; inspect shows the gates of classifiers")
    find_gates(task.model)  # raises if there is none, before the data are read
    spec, names = task.spec, task.spec.class_names
    drawn = [_find_class(name, names) for name in classes or [n for n in POSTER if n in names] or names[:4]]
    layer = prepare_maps(task.model, (spec.channels, spec.size, spec.size)) if cam else ""
    images = build_data(task.recipe, train=False, split=task.split)
    check_classes(task.recipe.data.name, images.spec, spec)
    for line in images.notices:
        print(line, file=sys.stderr, flush=True)
    first: dict[int, Tensor] = {}
    records = record(task.model, _iterate_batches(images, first), len(names))
    effects, answer = ([], "") if image is None else explain(task, records, image)
    chosen = [] if image is None else [(Path(image).name, _prepare(spec, image)[0])]
    chosen += [(f"is {names[label]}", first[label]) for label in drawn if label in first]
    maps = compare(task.model, layer, chosen) if cam else []
    found = Inspection(
        task=task, records=records, classes=drawn, effects=effects, answer=answer, layer=layer, maps=maps
    )
    write(found, Path(folder))
    return found


def _find_class(name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise ConfigError(f"there is no class {name!r}; {suggestion(name, list(names))}")
    return list(names).index(name)


def _iterate_batches(images: Any, first: dict[int, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the validation batches of a LightningDataModule as the network receives them.

    The first image of each class is kept in ``first``, by label.
    """
    for batch in images.val_dataloader():
        x, labels = images.on_after_batch_transfer(images.on_before_batch_transfer(batch, 0), 0)
        for image, label in zip(x, labels.tolist(), strict=True):
            if label not in first:
                first[label] = image.clone()  # alone, so that its batch can be freed
        yield x, labels


def _prepare(spec: DataSpec, path: str | Path) -> Tensor:
    """Return the image file ``path`` as the network receives it (1, C, H, W)."""
    return spec.normalize(build_eval_transform(spec)(read_image(path, spec.channels))[None])


def explain(task: Task, records: Sequence[GateRecord], path: str | Path) -> tuple[list[Effect], str]:
    """Return the effect of each gate on the image file ``path``, and the network's answer in one line."""
    spec = task.spec
    images = _prepare(spec, path)
    with torch.inference_mode():
        logits = task.model(images).double()[0]
    best = int(logits.argmax())
    weights = compute_image_weights(task.model, images)
    held = run_with_held_gates(task.model, images, records)
    effects = [
        Effect(
            name=one.name,
            log_odds=compute_log_odds(logits, best),
            held=compute_log_odds(held[one.name].double()[0], best),
            weights=weights[one.name][0].float().cpu(),
        )
        for one in records
    ]
    return effects, f"{Path(path).name}: {spec.class_names[best]}, {float(logits.softmax(0)[best]):.1%}"


def compute_log_odds(logits: Tensor, label: int) -> float:
    """Return ``log(p / (1 - p))`` of the class ``label``. It still changes where p is almost 1.

    >>> round(compute_log_odds(torch.tensor([1.0, 3.0]), 1), 6)
    2.0
    """
    return float(logits[label] - torch.cat([logits[:label], logits[label + 1 :]]).logsumexp(0))


# files


def write(found: Inspection, folder: Path) -> None:
    """Write inspect.json, the figures as PNG, and inspect.html."""
    names = found.task.spec.class_names
    drawn = {
        "classes": draw_classes(found.records, {label: names[label] for label in found.classes}),
        "spread": draw_spread(found.records),
    }
    if any(one.kernel is not None for one in found.records):
        drawn["kernels"] = draw_kernels(found.records)
    if found.effects:
        drawn["image"] = draw_image(found.records, found.effects)
    if found.maps:
        drawn["cams"] = draw_cams(found.maps, found.task.spec)
    # An earlier inspection may have drawn other images. In other folders these files are somebody else's.
    if (folder / "inspect.json").exists():
        for name in ("image.png", "cams.png"):
            (folder / name).unlink(missing_ok=True)
    for name, figure in drawn.items():
        write_file(folder / f"{name}.png", figures.to_png(figure, dpi=110))
    write_file(folder / "inspect.json", to_json(found))
    write_file(folder / "inspect.html", to_html(found, drawn))


def to_json(found: Inspection) -> str:
    """Return the numbers of every gate: means, spread, alarms, kernel, and its effect on the image."""
    names = found.task.spec.class_names
    effects = {effect.name: effect for effect in found.effects}
    rows: list[dict[str, object]] = [
        {
            "gate": one.name,
            "channels": one.channels,
            "gain": one.gain,
            "highest_possible_weight": one.ceiling,
            "mean": to_list(one.mean),
            "deviation": to_list(one.deviation),
            "class_means": {names[label]: to_list(one.class_means[label]) for label in found.classes},
            "spread_between_classes": to_number(one.spread),
            "saturated": one.saturated,
            "dead_channels": to_list(one.dead.nonzero().flatten()),
            "alarms": one.find_alarms(),
            "kernel": None if one.kernel is None else to_list(one.kernel),
            "image": _describe_effect(effects.get(one.name)),
        }
        for one in found.records
    ]
    content = {"environment": environment(), "image": found.answer, "gates": rows, "cams": _describe_maps(found)}
    return json.dumps(content, indent=2, allow_nan=False)


def _describe_effect(effect: Effect | None) -> dict[str, object] | None:
    if effect is None:
        return None
    numbers = {"log_odds": to_number(effect.log_odds), "held_at_mean": to_number(effect.held)}
    return {**numbers, "weights": to_list(effect.weights)}


def _describe_maps(found: Inspection) -> dict[str, object] | None:
    """Return the layer of the class-activation maps and the network's answers with the gates on and off."""
    if not found.maps:
        return None
    names = found.task.spec.class_names
    rows = [
        {"image": pair.title, "explained": names[pair.explained]}
        | {
            state: {"answer": names[one.answer], "probability_of_explained": to_number(one.probability)}
            for state, one in (("gates_on", pair.gated), ("gates_off", pair.plain))
        }
        for pair in found.maps
    ]
    return {"layer": found.layer, "images": rows}


def to_html(found: Inspection, drawn: Mapping[str, "Figure"]) -> str:
    """Return one page that needs no other file."""
    recipe, spec = found.task.recipe, found.task.spec
    alarms = [f"<li>{one.name}: {alarm}</li>" for one in found.records for alarm in one.find_alarms()]
    effect = "The number is the change in the likeliest class's log-odds against holding that gate at its mean weights."
    notes = {
        "image": (f"One image: {found.answer}", effect),
        "classes": ("Weights by gate and class", "Mean weight of each channel over the held-out images of a class."),
        "spread": ("Spread", "How much the weights differ between classes, and between images; 0 is a constant gate."),
        "cams": (
            f"Class-activation maps at {found.layer}",
            "Grad-CAM for the class that the network with its gates finds likeliest: with every gate switched off (it "
            "multiplies by one number, its average over these images) and with the gates. Both maps have the same "
            "weights: they show what the gates do in this network, not how one trained without gates would look. Each "
            "map is scaled to its own range.",
        ),
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
