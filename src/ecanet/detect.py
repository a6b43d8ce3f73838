"""What a trained detector sees in picture files: boxes and masks drawn onto them, and as numbers beside."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecanet.data.annotations import encode
from ecanet.data.sources import read_image
from ecanet.errors import ConfigError
from ecanet.figures import drawn, png
from ecanet.report import write_file
from ecanet.tasks import Detection, Task

__all__ = ["detect"]


def detect(
    task: Task, paths: Sequence[str | Path], folder: str | Path, *, threshold: float = 0.5, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Draw what the restored detector ``task`` finds in each image file into ``folder``, with JSON beside.

    NAME.png shows the image with boxes, masks, names and scores of at least ``threshold``, a small one enlarged;
    NAME.json lists them: ``name``, ``score``, ``box`` as left, top, width, height in the image's pixels, and, where the
    network cuts out, ``mask`` as COCO's run lengths. The value has, for each image, ``path``, ``picture`` and
    ``objects``.

    Raises:
        ConfigError: the network is no detector.
        DataError: a file that cannot be read.
    """
    if not isinstance(task, Detection):
        raise ConfigError(f"{task.recipe.model.name} is no detector; ecanet predict names what is in images")
    task = task.to(device).eval()
    answers = []
    taken: set[str] = set()
    for path in map(Path, paths):
        image = read_image(path, 3)
        with torch.inference_mode():
            found = task([image.to(device).float() / 255])[0]
        sure = found["scores"] >= threshold
        found = {name: value[sure].cpu() for name, value in found.items()}
        # files of one name from several folders are kept apart
        name = next(n for n in (path.stem, *(f"{path.stem}-{i}" for i in range(2, len(paths) + 2))) if n not in taken)
        taken.add(name)
        picture = Path(folder, f"{name}.png")
        write_file(picture, png(drawn(image, found, task.look.class_names)))
        answer = {"path": str(path), "picture": str(picture), "objects": _objects(found, task.look.class_names)}
        write_file(picture.with_suffix(".json"), json.dumps(answer, indent=2))
        answers.append(answer)
    return answers


def _objects(found: dict[str, Tensor], class_names: Sequence[str]) -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = [
        {"name": class_names[label - 1], "score": score, "box": [left, top, right - left, bottom - top]}
        for label, score, (left, top, right, bottom) in zip(
            found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True
        )
    ]
    if "masks" in found:
        for entry, mask in zip(objects, found["masks"][:, 0], strict=True):
            entry["mask"] = encode((mask > 0.5).numpy().astype(np.uint8))
    return objects
