"""Answer for one image: classes, class-activation map and gate weights, with gates switched off from the last on."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecanet.attention import Attention, Gate, compute_image_weights
from ecanet.data import build_eval_transform, read_image
from ecanet.errors import ConfigError, DataError
from ecanet.studies.gates import explain, find_layer, measure_scales, switch_gates_off
from ecanet.training import Classification, Task, detect

__all__ = ["Answer", "Detected", "answer", "detect_objects", "list_gates"]

SHOWN = 5
"""Number of classes in an answer."""

COLUMNS = 256
"""Width of the picture of all gates: each gate's channels are stretched or averaged to it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a classifier says of one image."""

    classes: dict[str, float]
    """The likeliest classes with their probabilities, with the gates that are on."""
    plain: dict[str, float]
    """The same with every gate switched off."""
    heat: Tensor | None
    """Grad-CAM of the likeliest class (H, W), 0 to 1; None without the package grad-cam, or without such a layer."""
    picture: Tensor
    """The image as the network sees it, uint8 (3, H, W)."""
    weights: list[tuple[str, Tensor]]
    """The weights of each channel gate (C), from the first gate to the last."""


@dataclass(frozen=True, kw_only=True)
class Detected:
    """What a detector finds in one image."""

    picture: Tensor
    """The image with boxes and masks, uint8 (3, H, W)."""
    objects: list[tuple[str, float]]
    """Names and scores."""


def list_gates(task: Task) -> list[nn.Module]:
    """Return the attention modules of ``task``'s network in the order of their names, which is from front to back."""
    return [module for module in task.model.modules() if isinstance(module, Attention)]


def answer(task: Classification, path: str | Path, switched_off: int = 0) -> Answer:
    """Return what ``task`` says of the image file ``path``, with its last ``switched_off`` gates off.

    A gate that is off multiplies by one number: the factor by which it scales this image on average.

    Raises:
        DataError: the file is no image.
    """
    spec, gates = task.spec, list_gates(task)
    image = spec.normalize(build_eval_transform(spec)(read_image(path, spec.channels))[None])[0]
    scales = measure_scales(task, [image])
    off = {gate: scales[gate] for gate in gates[len(gates) - switched_off :] if gate in scales}
    with switch_gates_off(task, off):
        classes, heat = _classify(task, image), _explain(task, image)
        weights = [*compute_image_weights(task, image[None]).items()] if _has_channel_gates(task) else []
    with switch_gates_off(task, scales):
        plain = _classify(task, image)
    return Answer(
        classes=classes,
        plain=plain,
        heat=heat,
        picture=spec.denormalize(image).expand(3, -1, -1),
        weights=[(name.removeprefix("model."), one[0].float().cpu()) for name, one in weights],
    )


def _has_channel_gates(task: Task) -> bool:
    return any(isinstance(module, Gate) for module in task.model.modules())


@torch.no_grad()
def _classify(task: Classification, image: Tensor) -> dict[str, float]:
    """Return the likeliest classes of ``image`` (C, H, W), with their probabilities."""
    names = task.spec.class_names
    best = cast(Tensor, task(image[None]))[0].float().softmax(0).topk(min(SHOWN, len(names)))
    return {names[int(label)]: float(share) for share, label in zip(best.values, best.indices, strict=True)}


def _explain(task: Classification, image: Tensor) -> Tensor | None:
    """Return the class-activation map of ``image``; None where there can be none."""
    try:
        with torch.no_grad():
            label = int(cast(Tensor, task(image[None]))[0].argmax())
        return explain(task, find_layer(task, tuple(image.shape)), image, label).heat
    except ConfigError:
        return None


def stack_weights(weights: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Return one row of `COLUMNS` numbers for each gate, whatever its number of channels.

    >>> stack_weights([("a", torch.tensor([0.0, 1.0])), ("b", torch.ones(512))]).shape
    torch.Size([2, 256])
    """
    return torch.stack([F.adaptive_avg_pool1d(one[None, None], COLUMNS)[0, 0] for _, one in weights])


def detect_objects(task: Task, path: str | Path, threshold: float) -> Detected:
    """Return what the detector ``task`` finds in the image file ``path`` with a score of at least ``threshold``.

    Raises:
        DataError: the file is no image.
    """
    with tempfile.TemporaryDirectory(prefix="ecanet-app-") as folder:
        (found,) = detect(task, [path], folder, threshold=threshold, device=next(task.parameters()).device)
        if isinstance(found, DataError):
            raise found
        picture = read_image(found["picture"], 3)
    return Detected(picture=picture, objects=[(one["name"], one["score"]) for one in found["objects"]])
