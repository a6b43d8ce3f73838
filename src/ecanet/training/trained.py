"""Use a trained network: evaluate it, predict the classes of images."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from ecanet.data import IMAGE_SUFFIXES, DataSpec, build_eval_transform, check_classes, read_image, to_tensor
from ecanet.errors import ConfigError, DataError
from ecanet.networks import find_device
from ecanet.recipes import ModelConfig, with_settings
from ecanet.report import write_file
from ecanet.training import tasks
from ecanet.training.preparation import build_data
from ecanet.training.progress import EvaluationBar, quiet_lightning
from ecanet.training.restoring import find_source, restore_task

__all__ = ["Prediction", "evaluate", "image_files", "predict"]

BATCH, BATCH_PIXELS = 64, 2**24
"""Largest number of images, and of their pixels, that `predict` passes to the network at once."""

ImageLike = str | Path | Image | NDArray[np.generic] | Tensor
"""One image for `predict`."""


def evaluate(
    checkpoint: str | Path | None = None,
    *,
    model: ModelConfig | None = None,
    data_name: str | None = None,
    data_dir: str | None = None,
    on_corrupt: str | None = None,
    device: str | torch.device = "auto",
) -> dict[str, float]:
    """Return the metrics of ``checkpoint`` on held-out images, by default those of its run.

    A detector's results are also written as COCO's result files into the folder NAME-results beside the checkpoint
    NAME. If that fails, a line on standard error says so.

    Args:
        checkpoint: a file, the folder of a run (its best checkpoint), or a folder of `ecanet.save_pretrained`. None
            evaluates ``model`` with its weights.
        model: the network, for a checkpoint that was not written by a run; a run's checkpoint knows its own.
        data_name: the data set. Weights that were not written by a run need it.
        data_dir: the directory of the data files.
        on_corrupt: "error" or "skip", for unreadable images.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        CheckpointError: the file is broken or unsafe, or its weights are for another network or other classes.
        ConfigError: ``model`` or ``data_name`` is missing, or this machine does not have the ``device``.
        DataError: the data are missing or broken, or have other classes than the network.
    """
    torch_device = find_device(device)
    source = find_source(checkpoint, model, data_name, data_dir)
    path, recipe = source.path, source.recipe
    if not recipe.data.name or (data_name is None and source.spec is None):
        raise ConfigError("these weights do not say what they were trained on: give the data set with --data")
    if on_corrupt is not None:
        recipe = with_settings(recipe, {"data.on_corrupt": on_corrupt})
    with quiet_lightning():
        images = build_data(recipe, train=False, split=source.split)
        if source.spec is not None:
            check_classes(recipe.data.name, images.spec, source.spec)
            images.spec = replace(images.spec, mean=source.spec.mean, std=source.spec.std)
        task = restore_task(path, recipe, images.spec)
        trainer = L.Trainer(
            accelerator=torch_device.type,
            devices=1 if torch_device == torch.device(torch_device.type) else [torch_device.index],
            precision=recipe.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[EvaluationBar()],
            enable_model_summary=False,
        )
        metrics = trainer.validate(task, images, verbose=False)[0]
        results = None if path is None else path.with_name(f"{path.stem}-results")
        try:
            for name, content in task.files().items():
                if results is not None:
                    write_file(results / name, content)
        except OSError as error:  # Do not lose metrics that may have taken hours to compute.
            print(f"result files were not written: {error}", file=sys.stderr)
        return {name: float(value) for name, value in metrics.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The most probable classes of one image with their probabilities, the most probable first.

    ``path`` is the image's file, or "image 3" for the fourth of the images if it did not come from one.
    """

    path: str
    classes: tuple[tuple[str, float], ...]


def predict(
    task: tasks.Task, images: Sequence[ImageLike], *, top: int = 5, device: str | torch.device = "auto"
) -> Iterator[Prediction | DataError]:
    """Yield the ``top`` classes of each image by the restored classifier ``task``, or a DataError.

    An image is a file, a Pillow image, an array (H, W), (H, W, 1) or (H, W, 3) of bytes, or a tensor (C, H, W) of bytes
    or of values from 0 to 1.

    Raises:
        ConfigError: the network is a detector, or this machine does not have the ``device``.
    """
    if not isinstance(task, tasks.Classification):
        raise ConfigError(f"{task.recipe.model.name} is a detector; use ecanet detect for detectors")
    spec, transform = task.spec, build_eval_transform(task.spec)
    torch_device = find_device(device)
    task = task.to(torch_device).eval()
    size = min(BATCH, max(1, BATCH_PIXELS // spec.size**2))
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        names = [str(one) if isinstance(one, str | Path) else f"image {start + at}" for at, one in enumerate(batch)]
        # Each image is shrunk as soon as it is read: 64 photographs of 24 megapixels would be 4.6 GB.
        pictures = [_try_read_image(image, name, spec, transform) for image, name in zip(batch, names, strict=True)]
        ready = [picture for picture in pictures if isinstance(picture, Tensor)]
        logits = torch.empty(0, 1)
        if ready:
            with torch.inference_mode():
                logits = cast(Tensor, task(spec.normalize(torch.stack(ready)).to(torch_device)))
        probabilities = iter(logits.float().softmax(1))
        for name, picture in zip(names, pictures, strict=True):
            if isinstance(picture, DataError):
                yield picture
                continue
            best = next(probabilities).topk(min(top, len(spec.class_names)))
            classes = [spec.class_names[int(index)] for index in best.indices]
            yield Prediction(path=name, classes=tuple(zip(classes, map(float, best.values), strict=True)))


def image_files(path: str | Path) -> list[Path]:
    """Return ``path`` itself if it is a file, else the sorted images in the folder and below it; links are followed.

    Raises:
        DataError: ``path`` does not exist, or the folder has no images.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    files = sorted(p for p in _walk(path) if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise DataError(f"{path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files in ``folder`` and below it; links are followed, and a folder is read once."""
    visited = set[tuple[int, int]]()
    for at, folders, names in os.walk(folder, followlinks=True):
        status = Path(at).stat()
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder above would lead round in a circle
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        yield from (Path(at, name) for name in names)


def _try_read_image(
    image: ImageLike, name: str, spec: DataSpec, transform: Callable[[Tensor], Tensor]
) -> Tensor | DataError:
    """Return what ``transform`` makes of the image, or why it cannot be read."""
    try:
        whole = read_image(image, spec.channels) if isinstance(image, str | Path) else to_tensor(image, spec.channels)
        return transform(whole)
    except DataError as error:
        return error if isinstance(image, str | Path) else DataError(f"{name}: {error}")
