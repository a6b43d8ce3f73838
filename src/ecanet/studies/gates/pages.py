"""Write what an inspection found: numbers, figures and one HTML page."""

import html
import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import cast

from torch import Tensor

from ecanet.errors import ConfigError
from ecanet.recipes import ModelConfig
from ecanet.report import environment, figures, make_table, page, write_file
from ecanet.studies.gates.drawings import (
    Drawing,
    Effect,
    draw_cams,
    draw_classes,
    draw_image,
    draw_kernels,
    draw_spread,
    draw_weights,
)
from ecanet.studies.gates.inspection import Inspection, inspect
from ecanet.training import restore

PICTURES = ("image.png", "classes.png", "weights.png", "spread.png", "cams.png", "kernels.png")
"""The pictures that an inspection may write."""

TABLE = (
    "Mean weight; standard deviation between the classes' means, and between images, averaged over the channels; share "
    "of the weights near the ends of the range; channels whose weight is always near 0."
)


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

    A detector's images show objects of several classes, so its gates are shown over all images, without classes.

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
        ConfigError: a class does not exist, the network has no channel gates, ``image`` would be overwritten, there can
            be no class-activation maps, or one of ``classes``, ``image`` and ``cam`` is given for a detector.
        CheckpointError: the checkpoint is missing, broken or for another network.
        DataError: data or image are missing or broken.
    """
    taken = [(Path(folder) / name).resolve() for name in PICTURES]
    if image is not None and Path(image).resolve() in taken:
        raise ConfigError(f"{image} would be overwritten; choose another --out")
    task = restore(checkpoint, model=model, data_name=data_name, data_dir=data_dir)
    found = inspect(task, classes, image, cam=cam)
    write(found, Path(folder))
    return found


def write(found: Inspection, folder: Path) -> None:
    """Write inspect.json, the figures as PNG, and inspect.html."""
    names = found.task.spec.class_names
    if found.classes:
        drawn = {"classes": draw_classes(found.records, {label: names[label] for label in found.classes})}
    else:
        drawn = {"weights": draw_weights(found.records)}
    drawn["spread"] = draw_spread(found.records)
    if any(one.kernel is not None for one in found.records):
        drawn["kernels"] = draw_kernels(found.records)
    if found.effects:
        drawn["image"] = draw_image(found.records, found.effects)
    if found.maps:
        drawn["cams"] = draw_cams(found.maps, found.task.spec)
    # An earlier inspection may have drawn other images. In other folders these files are somebody else's.
    if (folder / "inspect.json").exists():
        for name in PICTURES:
            (folder / name).unlink(missing_ok=True)
    for name, drawing in drawn.items():
        write_file(folder / f"{name}.png", figures.to_png(drawing.to_figure(), dpi=110))
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
            "spread_between_classes": to_number(one.spread) if found.classes else None,
            "saturated": one.saturated,
            "dead_channels": to_list(one.dead.nonzero().flatten()),
            "alarms": one.find_alarms(),
            "kernel": None if one.kernel is None else to_list(one.kernel),
            "image": _describe_effect(effects.get(one.name)),
        }
        for one in found.records
    ]
    content = {
        "environment": environment(),
        "images": found.images,
        "image": found.answer,
        "gates": rows,
        "cams": _describe_maps(found),
    }
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


def to_list(x: Tensor) -> list[float | None]:
    """Return the numbers of a 1-D tensor, as `to_number` does."""
    return [to_number(number) for number in cast(list[float], x.tolist())]  # pyright: ignore[reportUnknownMemberType]


def to_number(x: float) -> float | None:
    """Return ``x``, or None for NaN and infinity, which JSON does not have."""
    return x if isfinite(x) else None


def list_rows(found: Inspection) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, and one row for each gate, as the terminal and the page show them."""
    columns = ["gate", "channels", "mean", "spread: classes", "spread: images", "saturated", "dead"]
    rows = [
        [
            gate.name,
            str(gate.channels),
            f"{float(gate.mean.mean()):.3f}",
            f"{gate.spread:.3f}" if found.classes else "-",  # a detector's images have no single class
            f"{float(gate.deviation.mean()):.3f}",
            f"{gate.saturated:.1%}",
            str(int(gate.dead.sum())),
        ]
        for gate in found.records
    ]
    return columns, rows


def to_html(found: Inspection, drawn: Mapping[str, Drawing]) -> str:
    """Return one page that needs no other file."""
    recipe, spec = found.task.recipe, found.task.spec
    alarms = [f"<li>{html.escape(one.name)}: {alarm}</li>" for one in found.records for alarm in one.find_alarms()]
    effect = "The number is the change in the likeliest class's log-odds against holding that gate at its mean weights."
    notes = {
        "image": (f"One image: {found.answer}", effect),
        "classes": ("Weights by gate and class", "Mean weight of each channel over the held-out images of a class."),
        "weights": (
            "Weights by gate",
            "Mean weight of each channel over the held-out images, with two standard deviations on each side; a gate "
            "that reacts to nothing has no band.",
        ),
        "spread": (
            "Spread",
            f"How much the weights differ between {'classes, and between ' * bool(found.classes)}images; 0 is a "
            f"constant gate.",
        ),
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
    sections += [("Table", TABLE, make_table(*list_rows(found)))]
    sections += [(*notes[name], drawn[name].to_html()) for name in notes if name in drawn]
    return page(
        title=f"The gates of {recipe.model.name} with {recipe.model.attention}",
        subtitle=f"on {recipe.data.name}, {found.images:,} held-out images of {len(spec.class_names)} classes",
        tiles=[(str(len(found.records)), "gates"), (str(len(alarms)), "alarms")],
        sections=sections,
        recipe=recipe,
        environment=environment(),
    )
