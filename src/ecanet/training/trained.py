"""A trained network: restore it from its checkpoint, evaluate it, ask it about images."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ecanet import data, recipes
from ecanet.data import IMAGE_SUFFIXES, DataSpec, build_eval_transform, check_classes, read_image
from ecanet.errors import CheckpointError, ConfigError, DataError
from ecanet.models import load_checkpoint, read_file
from ecanet.networks import find_device
from ecanet.recipes import ModelConfig, Recipe, from_dict, with_settings
from ecanet.report import write_file
from ecanet.training import tasks
from ecanet.training.progress import quiet_lightning

__all__ = ["Prediction", "evaluate", "image_files", "predict", "restore"]


def evaluate(
    checkpoint: str | Path,
    *,
    model: ModelConfig | None = None,
    data_name: str | None = None,
    data_dir: str | None = None,
    on_corrupt: str | None = None,
    device: str | torch.device = "auto",
) -> dict[str, float]:
    """The metrics of ``checkpoint`` (a file, or a run's folder) on held-out data, by default its run's.

    What a detector found is written too, as COCO's result files, into the folder NAME-results beside the checkpoint
    called NAME; where that cannot be, it is said on stderr.

    Weights from elsewhere need ``model`` and ``data_name``; with a run's checkpoint these outrank its recipe, and so
    does ``on_corrupt``, "error" or "skip".

    Raises:
        CheckpointError: the file is broken or unsafe, or its weights are another network's.
        ConfigError: weights from elsewhere without ``model`` and ``data_name``, or a device that this machine does not
            have.
        DataError: data that is missing or broken, or that has other classes than the network.
    """
    place = find_device(device)
    path, recipe, spec = _described(checkpoint, model, data_name, data_dir)
    if on_corrupt is not None:
        recipe = with_settings(recipe, {"data.on_corrupt": on_corrupt})
    with quiet_lightning():
        images = data.build(recipe.data, seed=recipe.seed, train=False, masks=recipe.learns_masks)
        if spec is not None:
            check_classes(recipe.data.name, images.spec, spec)
        task = _loaded(path, recipe, images.spec)
        trainer = L.Trainer(
            accelerator=place.type,
            devices=1 if place.index is None else [place.index],
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
        except OSError as error:  # hours may lie behind the figures
            print(f"result files were not written: {error}", file=sys.stderr)
        return {name: float(value) for name, value in metrics.items()}


def restore(
    checkpoint: str | Path,
    *,
    model: ModelConfig | None = None,
    data_name: str | None = None,
    data_dir: str | None = None,
) -> tasks.Task:
    """The task of ``checkpoint`` (a file, or a run's folder) with its trained ``model``, in evaluation mode.

    ``model``, ``data_name`` and ``data_dir`` are as for `evaluate`; so are the errors.
    """
    path, recipe, spec = _described(checkpoint, model, data_name, data_dir)
    if spec is None:
        spec = data.build(recipe.data, train=False).spec
    return _loaded(path, recipe, spec).eval()


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a network says of one image: its likeliest classes, each with its probability, the likeliest first."""

    path: str
    classes: tuple[tuple[str, float], ...]


def predict(
    task: tasks.Task, paths: Sequence[str | Path], *, top: int = 5, device: str | torch.device = "auto"
) -> Iterator[Prediction | DataError]:
    """What the restored classifier ``task`` says of each image file; a file that cannot be read gives its DataError.

    Raises:
        ConfigError: the network is a detector, or this machine does not have the ``device``.
    """
    if not isinstance(task, tasks.Classification):
        raise ConfigError(f"{task.recipe.model.name} is a detector; ecanet detect shows what it finds")
    spec, fit = task.spec, build_eval_transform(task.spec)
    place = find_device(device)
    task = task.to(place).eval()
    for start in range(0, len(paths), 64):
        some = paths[start : start + 64]
        pictures = [_readable(path, spec) for path in some]
        good = [fit(picture) for picture in pictures if isinstance(picture, Tensor)]
        with torch.inference_mode():
            logits = task(spec.normalize(torch.stack(good)).to(place)) if good else torch.empty(0, 1)
        shares = iter(logits.float().softmax(1))
        for path, picture in zip(some, pictures, strict=True):
            if isinstance(picture, DataError):
                yield picture
                continue
            likely = next(shares).topk(min(top, len(spec.class_names)))
            names = [spec.class_names[at] for at in likely.indices.tolist()]
            yield Prediction(path=str(path), classes=tuple(zip(names, likely.values.tolist(), strict=True)))


def image_files(path: str | Path) -> list[Path]:
    """``path`` itself if it is a file, else the images in and below the folder, sorted.

    Raises:
        DataError: there is nothing of that name, or no image in it.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise DataError(f"{path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _described(
    checkpoint: str | Path, model: ModelConfig | None, data_name: str | None, data_dir: str | None
) -> tuple[Path, Recipe, DataSpec | None]:
    """The checkpoint's file, what to build for it, and what its run's data looked like, if it is a run's."""
    path = Path(checkpoint)
    if path.is_dir():
        path = path / "checkpoints" / "best.ckpt"
    content = read_file(path)
    own: Any = content.get("ecanet") if isinstance(content, dict) else None
    if own:
        recipe, spec = from_dict(Recipe, own["recipe"]), DataSpec(**own["spec"])
    elif model is None or data_name is None:
        raise ConfigError(f"{path} does not say what network it is for; say so with --model and --data")
    else:
        recipe, spec = recipes.find(data_name), None
    root = recipe.data.root if data_name in (None, recipe.data.name) else None  # where other data lie, it does not say
    chosen = recipe.data.but(name=data_name or recipe.data.name, root=data_dir or root)
    # the weights are in the checkpoint: no others are to be looked for
    return path, recipe.but(model=(model or recipe.model).but(weights=None), data=chosen, compile=False), spec


def _loaded(path: Path, recipe: Recipe, spec: DataSpec) -> tasks.Task:
    task = tasks.build(recipe, spec)
    report = load_checkpoint(task.model, path)
    gates = tuple(f"{name}." for name in report.neutral)
    if lost := [n for n in (*report.mismatched, *report.missing, *report.unexpected) if not n.startswith(gates)]:
        raise CheckpointError(
            f"{path}: not the weights of {recipe.model.name} with {recipe.model.attention} for "
            f"{len(spec.class_names)} classes: {len(lost)} tensors differ, first {lost[0]!r}"
        )
    return task


def _readable(path: str | Path, spec: DataSpec) -> Tensor | DataError:
    try:
        return read_image(path, spec.channels)
    except DataError as error:
        return error
