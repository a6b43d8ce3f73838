"""Inspect the gates of a trained network on held-out data: a classifier's by class, a detector's over all images."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecanet.attention import GateRecord, compute_image_weights, find_gates, record_gates, run_with_held_gates
from ecanet.data import (
    ClassificationData,
    DataSpec,
    DetectionData,
    build_eval_transform,
    check_classes,
    read_image,
)
from ecanet.errors import ConfigError
from ecanet.recipes import suggestion
from ecanet.studies.gates.cams import Pair, compare, prepare_maps
from ecanet.studies.gates.drawings import Effect
from ecanet.training import Detection, Task, build_data

POSTER = ("hammerhead shark", "ambulance", "medicine chest", "butternut squash")
"""The ImageNet classes on the authors' poster."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The records of one network's gates and, if an image was given, their effects on it."""

    task: Task
    records: list[GateRecord]
    images: int
    """Number of held-out images."""
    classes: list[int]
    """Labels of the classes that are drawn; none for a detector, whose images show several."""
    effects: list[Effect]
    answer: str
    """The image's file name, likeliest class and probability; empty without an image."""
    layer: str = ""
    """The module whose activations the class-activation maps show; empty without maps."""
    maps: Sequence[Pair] = ()
    """The class-activation maps of a few images."""


def inspect(task: Task, classes: Sequence[str], image: str | Path | None, *, cam: bool) -> Inspection:
    """Record the gates of a trained network on held-out data; arguments and errors are those of `pages.run`."""
    find_gates(task.model)  # raises if there is none, before the data are read
    if isinstance(task, Detection):
        return _inspect_detector(task, {"--classes": classes, "--image": image, "--cam": cam})
    return _inspect_classifier(task, classes, image, cam=cam)


def _inspect_classifier(task: Task, classes: Sequence[str], image: str | Path | None, *, cam: bool) -> Inspection:
    spec, names = task.spec, task.spec.class_names
    drawn = [_find_class(name, names) for name in classes or [n for n in POSTER if n in names] or names[:4]]
    layer = prepare_maps(task.model, (spec.channels, spec.size, spec.size)) if cam else ""
    images = _load_held_out(task)
    first: dict[int, Tensor] = {}
    records = record_gates(task.model, _iterate_batches(images, first), len(names))
    effects, answer = ([], "") if image is None else explain(task, records, image)
    chosen = [] if image is None else [(Path(image).name, _prepare(spec, image)[0])]
    chosen += [(f"is {names[label]}", first[label]) for label in drawn if label in first]
    maps = compare(task.model, layer, chosen) if cam else []
    return Inspection(
        task=task,
        records=records,
        images=int(records[0].counts.sum()),
        classes=drawn,
        effects=effects,
        answer=answer,
        layer=layer,
        maps=maps,
    )


def _inspect_detector(task: Task, refused: Mapping[str, object]) -> Inspection:
    """Record the gates of a detector over all images; ``refused`` are options that are for classifiers alone."""
    if given := [name for name, value in refused.items() if value]:
        raise ConfigError(
            f"{given[0]} is for classifiers, and {task.recipe.model.name} is a detector: leave it out to see its gates "
            f"over all images"
        )
    images, counts = _load_held_out(task), list[int]()
    records = record_gates(task.model, _iterate_lists(images, counts), 1)
    return Inspection(task=task, records=records, images=sum(counts), classes=[], effects=[], answer="")


def _load_held_out(task: Task) -> ClassificationData | DetectionData:
    """Return the images that the run of ``task`` held out, and print what was noticed about their files."""
    images = build_data(task.recipe, train=False, split=task.split)
    check_classes(task.recipe.data.name, images.spec, task.spec)
    for line in images.notices:
        print(line, file=sys.stderr, flush=True)
    return images


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


def _iterate_lists(images: Any, counts: list[int]) -> Iterator[tuple[list[Tensor], None]]:
    """Yield the validation batches of a DetectionData as a detector takes them, and add their sizes to ``counts``."""
    for batch in images.val_dataloader():
        x, _ = images.on_after_batch_transfer(images.on_before_batch_transfer(batch, 0), 0)
        if x:
            counts.append(len(x))
            yield x, None


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
