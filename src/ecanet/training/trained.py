"""Use a trained network: restore it from its checkpoint, evaluate it, predict the classes of images."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import lightning as L
import torch
from torch import Tensor

from ecanet import data, recipes
from ecanet.data import IMAGE_SUFFIXES, DataSpec, Split, build_eval_transform, check_classes, read_image
from ecanet.errors import CheckpointError, ConfigError, DataError
from ecanet.models import load_checkpoint, read_file
from ecanet.networks import find_device
from ecanet.recipes import ModelConfig, Recipe, from_dict, with_settings
from ecanet.report import write_file
from ecanet.training import tasks
from ecanet.training.progress import quiet_lightning

__all__ = ["Prediction", "evaluate", "image_files", "predict", "restore"]

BATCH = 64
"""Number of images that `predict` passes to the network at once."""


def evaluate(
    checkpoint: str | Path,
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
        checkpoint: a file, or the folder of a run (its best checkpoint).
        model: the network, for a checkpoint that was not written by a run.
        data_name: the data set. A checkpoint that was not written by a run needs it.
        data_dir: the directory of the data files.
        on_corrupt: "error" or "skip", for unreadable images.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        CheckpointError: the file is broken or unsafe, or its weights are for another network.
        ConfigError: the checkpoint needs ``model`` and ``data_name``, or this machine does not have the ``device``.
        DataError: the data are missing or broken, or have other classes than the network.
    """
    torch_device = find_device(device)
    path, recipe, spec, split = _read_checkpoint(checkpoint, model, data_name, data_dir)
    if on_corrupt is not None:
        recipe = with_settings(recipe, {"data.on_corrupt": on_corrupt})
    with quiet_lightning():
        images = data.build(recipe.data, seed=recipe.seed, train=False, masks=recipe.learns_masks, split=split)
        if spec is not None:
            check_classes(recipe.data.name, images.spec, spec)
        task = _restore_task(path, recipe, images.spec)
        trainer = L.Trainer(
            accelerator=torch_device.type,
            devices=1 if torch_device == torch.device(torch_device.type) else [torch_device.index],
            precision=recipe.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        metrics = trainer.validate(task, images, verbose=False)[0]
        try:
            for name, content in task.files().items():
                write_file(path.with_name(f"{path.stem}-results") / name, content)
        except OSError as error:  # Do not lose metrics that may have taken hours to compute.
            print(f"result files were not written: {error}", file=sys.stderr)
        return {name: float(value) for name, value in metrics.items()}


def restore(
    checkpoint: str | Path,
    *,
    model: ModelConfig | None = None,
    data_name: str | None = None,
    data_dir: str | None = None,
) -> tasks.Task:
    """Return the task of ``checkpoint`` with its trained ``model``, in evaluation mode.

    The arguments and errors are those of `evaluate`.
    """
    path, recipe, spec, split = _read_checkpoint(checkpoint, model, data_name, data_dir)
    if spec is None:
        spec = data.build(recipe.data, train=False).spec
    task = _restore_task(path, recipe, spec).eval()
    task.split = split
    return task


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The most probable classes of one image with their probabilities, the most probable first."""

    path: str
    classes: tuple[tuple[str, float], ...]


def predict(
    task: tasks.Task, paths: Sequence[str | Path], *, top: int = 5, device: str | torch.device = "auto"
) -> Iterator[Prediction | DataError]:
    """Yield the ``top`` classes of each image file by the restored classifier ``task``, or a DataError.

    Raises:
        ConfigError: the network is a detector, or this machine does not have the ``device``.
    """
    if not isinstance(task, tasks.Classification):
        raise ConfigError(f"{task.recipe.model.name} is a detector; use ecanet detect for detectors")
    spec, transform = task.spec, build_eval_transform(task.spec)
    torch_device = find_device(device)
    task = task.to(torch_device).eval()
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        pictures = [_try_read_image(path, spec) for path in batch]
        images = [transform(picture) for picture in pictures if isinstance(picture, Tensor)]
        logits = torch.empty(0, 1)
        if images:
            with torch.inference_mode():
                logits = cast(Tensor, task(spec.normalize(torch.stack(images)).to(torch_device)))
        probabilities = iter(logits.float().softmax(1))
        for path, picture in zip(batch, pictures, strict=True):
            if isinstance(picture, DataError):
                yield picture
                continue
            best = next(probabilities).topk(min(top, len(spec.class_names)))
            names = [spec.class_names[int(index)] for index in best.indices]
            yield Prediction(path=str(path), classes=tuple(zip(names, map(float, best.values), strict=True)))


def image_files(path: str | Path) -> list[Path]:
    """Return ``path`` itself if it is a file, else the sorted images in the folder and in the folders below it.

    Raises:
        DataError: ``path`` does not exist, or the folder has no images.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _read_checkpoint(
    checkpoint: str | Path, model: ModelConfig | None, data_name: str | None, data_dir: str | None
) -> tuple[Path, Recipe, DataSpec | None, Split | None]:
    """Return a checkpoint's file, the recipe to build its task, and its run's data and split, or None without a run.

    The split is the run's, if it has split a flat folder. For other data it holds out nothing, so that all images are
    evaluated except those with the path of a training image: they may be the run's folder in another place.
    """
    path = Path(checkpoint)
    if path.is_dir():
        path = path / "checkpoints" / "best.ckpt"
    content = read_file(path)
    own = cast(dict[str, object], content).get("ecanet") if isinstance(content, dict) else None
    split = None
    if own:
        values = cast(dict[str, dict[str, object]], own)
        recipe, spec = from_dict(Recipe, values["recipe"]), tasks.read_spec(values["spec"])
        if values.get("split"):
            split = Split.from_dict(cast(dict[str, list[str]], values["split"]))
            split = split if data_name in (None, recipe.data.name) else replace(split, held_out=())
    elif model is None or data_name is None:
        raise ConfigError(f"{path} does not say what network it is for; say so with --model and --data")
    else:
        recipe, spec = recipes.find(data_name), None
    # The recipe does not know where other data are stored.
    root = recipe.data.root if data_name in (None, recipe.data.name) else None
    chosen = recipe.data.but(name=data_name or recipe.data.name, root=data_dir or root)
    # The checkpoint holds the weights, so the recipe's own weights are not loaded.
    recipe = recipe.but(model=(model or recipe.model).but(weights=None), data=chosen, compile=False)
    return path, recipe, spec, split


def _restore_task(path: Path, recipe: Recipe, spec: DataSpec) -> tasks.Task:
    """Return the task of ``recipe`` with the weights of the checkpoint ``path``.

    Raises:
        CheckpointError: the weights do not fit the network, or are not finite. Gates that the file does not have are
            allowed.
    """
    task = tasks.build(recipe, spec)
    report = load_checkpoint(task.model, path)
    if report.not_finite:
        raise CheckpointError(
            f"{path}: {len(report.not_finite)} of its tensors hold NaN or infinity, first {report.not_finite[0]!r}; "
            f"take an earlier checkpoint"
        )
    gates = tuple(f"{name}." for name in report.neutral)
    names = (*report.mismatched, *report.missing, *report.unexpected)
    if different := [name for name in names if not name.startswith(gates)]:
        raise CheckpointError(
            f"{path}: not the weights of {recipe.model.name} with {recipe.model.attention} for "
            f"{len(spec.class_names)} classes: {len(different)} tensors differ, first {different[0]!r}"
        )
    return task


def _try_read_image(path: str | Path, spec: DataSpec) -> Tensor | DataError:
    try:
        return read_image(path, spec.channels)
    except DataError as error:
        return error
