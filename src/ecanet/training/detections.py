"""What a trained detector sees in picture files: boxes and masks drawn onto them, and as numbers beside."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecanet.data import encode_mask, find_size_problem, read_image
from ecanet.errors import ConfigError, DataError
from ecanet.networks import find_device
from ecanet.report import figures, write_file
from ecanet.training.tasks import Detection, Task

__all__ = ["detect"]


def detect(
    task: Task,
    paths: Sequence[str | Path],
    folder: str | Path,
    *,
    threshold: float = 0.5,
    device: str | torch.device = "auto",
) -> Iterator[dict[str, Any] | DataError]:
    """Draw what the restored detector ``task`` finds in each image file into ``folder``, with JSON beside.

    NAME.png shows the image with boxes, masks, names and scores of at least ``threshold``, a small one enlarged;
    NAME.json lists them: ``name``, ``score``, ``box`` as left, top, width, height in the image's pixels, and, where the
    network cuts out, ``mask`` as COCO's run lengths. What comes back for each image has ``path``, ``picture`` and
    ``objects``; a file that cannot be read gives its DataError.

    Raises:
        ConfigError: the network is not a detector, this machine does not have the ``device``, or the pictures cannot be
            written into ``folder`` (one of them would overwrite one of ``paths``).
    """
    if not isinstance(task, Detection):
        raise ConfigError(f"{task.recipe.model.name} is no detector; ecanet predict names what is in images")
    place = find_device(device)
    task = task.to(place).eval()
    for path, picture in _pictures(paths, Path(folder)):
        try:
            image = read_image(path, 3)
            if problem := find_size_problem(image.shape[2], image.shape[1]):
                raise DataError(f"{path}: {problem}")
        except DataError as error:
            yield error
            continue
        with torch.inference_mode():
            found = task([image.to(place).float() / 255])[0]
        sure = found["scores"] >= threshold
        found = {name: value[sure].cpu() for name, value in found.items()}
        write_file(picture, figures.to_png(figures.draw_detections(image, found, task.spec.class_names)))
        answer = {"path": str(path), "picture": str(picture), "objects": _objects(found, task.spec.class_names)}
        write_file(picture.with_suffix(".json"), json.dumps(answer, indent=2))
        yield answer


def _pictures(paths: Sequence[str | Path], folder: Path) -> list[tuple[Path, Path]]:
    """Each of ``paths`` with the picture to draw; files of one name from several folders are kept apart."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; pictures need a folder: choose another --out")
    given = {Path(path).resolve() for path in paths}
    found: dict[str, tuple[Path, Path]] = {}
    for path in map(Path, paths):
        names = (path.stem, *(f"{path.stem}-{i}" for i in range(2, len(paths) + 2)))
        name = next(n for n in names if n not in found)
        found[name] = path, folder / f"{name}.png"
        for suffix in (".png", ".json"):
            if (folder / f"{name}{suffix}").resolve() in given:
                raise ConfigError(f"{folder / name}{suffix} would be written over; choose another --out")
    return list(found.values())


def _objects(found: dict[str, Tensor], class_names: Sequence[str]) -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = [
        {"name": class_names[label - 1], "score": score, "box": [left, top, right - left, bottom - top]}
        for label, score, (left, top, right, bottom) in zip(
            found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True
        )
    ]
    if "masks" in found:
        for entry, mask in zip(objects, found["masks"][:, 0], strict=True):
            entry["mask"] = encode_mask((mask > 0.5).numpy().astype(np.uint8))
    return objects
