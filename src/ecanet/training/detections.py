"""Run a trained detector on image files: pictures with the objects drawn, and the objects as JSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode  # pyright: ignore[reportMissingTypeStubs]
from torchvision.transforms.v2.functional import resize  # pyright: ignore[reportMissingTypeStubs]

from ecanet.data import RunLengths, encode_mask, find_size_problem, read_image
from ecanet.errors import ConfigError, DataError
from ecanet.networks import find_device
from ecanet.report import figures, pictures, write_file
from ecanet.training.tasks import Detection, Task

__all__ = ["FoundObject", "ImageDetections", "detect"]

MOST_PIXELS = 2**21
"""Pixels of an image that the detector sees, which resizes it to half as many. It may find 100 masks of that size."""


class FoundObject(TypedDict):
    """One object in an image. ``box`` is left, top, width and height in pixels; a mask has COCO's run lengths."""

    name: str
    score: float
    box: list[float]
    mask: NotRequired[RunLengths]


class ImageDetections(TypedDict):
    """The objects in one image file, and the path of the picture that shows them."""

    path: str
    picture: str
    objects: list[FoundObject]


def detect(
    task: Task,
    paths: Sequence[str | Path],
    folder: str | Path,
    *,
    threshold: float = 0.5,
    device: str | torch.device = "auto",
) -> Iterator[ImageDetections | DataError]:
    """Run the restored detector ``task`` on image files, and write a picture and a JSON file for each to ``folder``.

    NAME.png is the image with boxes, masks, class names and scores of at least ``threshold``; small images are
    enlarged, and images of more than 2 megapixels shrunk, before the detector sees them. NAME.json has the same
    objects, in the pixels of the file. Yield the content of NAME.json for each image, or a DataError for a file
    that cannot be read.

    Raises:
        ConfigError: the network is not a detector, this machine does not have the ``device``, or the pictures cannot be
            written into ``folder`` (one of them would overwrite one of ``paths``).
    """
    if not isinstance(task, Detection):
        raise ConfigError(f"{task.recipe.model.name} is not a detector; use ecanet predict for classifiers")
    torch_device = find_device(device)
    task = task.to(torch_device).eval()
    for path, picture in _choose_pictures(paths, Path(folder)):
        try:
            image = read_image(path, 3)
            if problem := find_size_problem(image.shape[2], image.shape[1]):
                raise DataError(f"{path}: {problem}")
        except DataError as error:
            yield error
            continue
        whole, image = image.shape[1:], _shrink(image)
        with torch.inference_mode():
            detections = cast(list[dict[str, Tensor]], task([image.to(torch_device).float() / 255]))[0]
        certain = detections["scores"] >= threshold
        found = {name: value[certain].cpu() for name, value in detections.items()}
        write_file(picture, figures.to_png(pictures.draw_detections(image, found, task.spec.class_names)))
        answer: ImageDetections = {
            "path": str(path),
            "picture": str(picture),
            "objects": _list_objects(found, task.spec.class_names, image.shape[1:], whole),
        }
        write_file(picture.with_suffix(".json"), json.dumps(answer, indent=2))
        yield answer


def _choose_pictures(paths: Sequence[str | Path], folder: Path) -> list[tuple[Path, Path]]:
    """Return each of ``paths`` with the path of its picture; equal file names get a number.

    Raises:
        ConfigError: ``folder`` is a file, or a picture would overwrite one of ``paths``.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; pictures need a folder: choose another --out")
    images = {Path(path).resolve() for path in paths}
    chosen: dict[str, tuple[Path, Path]] = {}
    for path in map(Path, paths):
        names = (path.stem, *(f"{path.stem}-{i}" for i in range(2, len(paths) + 2)))
        name = next(n for n in names if n not in chosen)
        chosen[name] = path, folder / f"{name}.png"
        for suffix in (".png", ".json"):
            if (folder / f"{name}{suffix}").resolve() in images:
                raise ConfigError(f"{folder / name}{suffix} would be overwritten; choose another --out")
    return list(chosen.values())


def _shrink(image: Tensor) -> Tensor:
    """Return an image (3, H, W) of at most `MOST_PIXELS`."""
    factor = (MOST_PIXELS / (image.shape[1] * image.shape[2])) ** 0.5
    if factor >= 1:
        return image
    return resize(image, [max(1, int(side * factor)) for side in image.shape[1:]], antialias=True)


def _list_objects(
    found: dict[str, Tensor], class_names: Sequence[str], seen: torch.Size, whole: torch.Size
) -> list[FoundObject]:
    """Return the objects ``found`` in an image of the size ``seen``, in the pixels of the ``whole`` one (H, W)."""
    y, x = (new / old for new, old in zip(whole, seen, strict=True))
    objects: list[FoundObject] = []
    for label, score, box in zip(found["labels"], found["scores"], found["boxes"], strict=True):
        left, top, right, bottom = (float(value) * factor for value, factor in zip(box, (x, y, x, y), strict=True))
        box_sides = [left, top, right - left, bottom - top]
        objects.append({"name": class_names[int(label) - 1], "score": float(score), "box": box_sides})
    if "masks" in found:
        for entry, mask in zip(objects, found["masks"][:, 0], strict=True):
            pixels = (mask > 0.5).to(torch.uint8)
            if whole != seen:
                pixels = resize(pixels[None], [*whole], interpolation=InterpolationMode.NEAREST)[0]
            entry["mask"] = encode_mask(pixels.numpy())
    return objects
