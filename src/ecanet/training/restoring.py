"""Restore a trained network: from the checkpoint of a run, which knows everything, or from anybody's weights."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ecanet import networks, recipes
from ecanet.data import DataSpec, Split
from ecanet.errors import CheckpointError, ConfigError
from ecanet.models import load_checkpoint
from ecanet.recipes import DetectorConfig, ModelConfig, Recipe, has_photographs
from ecanet.training import tasks
from ecanet.training.preparation import Description, build_data, complete, read_description

__all__ = ["Source", "find_source", "restore", "restore_task"]

AUXILIARY = re.compile(r"(.*\.)?(aux\d*|AuxLogits|aux_classifier|num_batches_tracked)(\.|$)")
"""Tensors of a file that are used in training alone, by name."""


def restore(
    checkpoint: str | Path | None = None,
    *,
    model: ModelConfig | None = None,
    data_name: str | None = None,
    data_dir: str | None = None,
) -> tasks.Task:
    """Return the task of ``checkpoint`` with its trained ``model``, in evaluation mode.

    The arguments and errors are those of `evaluate`. Weights that were not written by a run, and come without
    ``data_name``, are taken to be for ImageNet's 1,000 classes, or COCO's if the network is a detector.
    """
    source = find_source(checkpoint, model, data_name, data_dir)
    recipe, spec = source.recipe, source.spec
    if spec is None:
        spec = build_data(recipe, train=False).spec if data_name else _describe_training_data(recipe.model.name)
    task = restore_task(source.path, recipe, spec).eval()
    task.split = source.split
    return task


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a trained network comes from.

    Attributes:
        path: the checkpoint; None if the recipe's network loads its weights itself.
        recipe: the recipe to build the task.
        spec: the data of the run that wrote the checkpoint; None without a run.
        split: the run's split of a flat folder. For other data it holds out nothing, so that all images are evaluated
            except those with the path of a training image: they may be the run's folder in another place.
    """

    path: Path | None
    recipe: Recipe
    spec: DataSpec | None = None
    split: Split | None = None


def find_source(
    checkpoint: str | Path | None, model: ModelConfig | None, data_name: str | None, data_dir: str | None
) -> Source:
    """Return where the network comes from that the arguments of `restore` mean.

    Raises:
        CheckpointError: the file is broken or unsafe.
        ConfigError: the network or its weights are not named.
    """
    if model is not None:
        model = complete(Recipe(model=model), trusted=True).model
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.is_dir() and not networks.is_pretrained(path):
        path = path / "checkpoints" / "best.ckpt"
    weights = None if model is None else model.weights
    file = Path(weights) if path is None and weights not in (None, "default") else path
    own = None if file is None else read_description(file)
    # A file that a run has written says which images it was trained on, whatever option names it.
    source = _take_own(file, own) if own else _name_foreign(path, model, data_name)
    recipe, split = source.recipe, source.split
    if own and model is not None and networks.find_library(model.name)[0] == "file":
        model = recipe.model.but(name=model.name)  # where the network's file is now
    network = recipe.model if model is None or not own else model
    # The recipe does not know where other data are stored.
    same = data_name in (None, recipe.data.name)
    images = recipe.data.but(name=data_name or recipe.data.name, root=data_dir or (recipe.data.root if same else None))
    if not own and has_photographs(images.name):
        images = images.but(eval_crop=networks.find_preprocessing(network.name).crop)
    elif own and not (same and recipe.data.name) and not has_photographs(recipe.data.name):
        # A folder that does not know its data, or a run on small images, still says how it takes other images.
        images = images.but(image_size=own.spec.size)
        if has_photographs(images.name):  # which are not shifted as small images are
            images = images.but(eval_crop=own.spec.crop, interpolation=own.spec.interpolation, crop_padding=0)
    # A checkpoint holds the weights, so the recipe's own are not loaded.
    network = network.but(weights=None) if source.path is not None else network
    recipe = complete(recipe.but(model=network, data=images, compile=False), trusted=False)
    return replace(source, recipe=recipe, split=split if same or split is None else replace(split, held_out=()))


def _take_own(path: Path | None, about: Description) -> Source:
    """Return what a run has written into its checkpoint beside the weights.

    Its recipe may ask for the processes of a larger machine.
    """
    images = about.recipe.data
    if images.workers is not None:
        images = images.but(workers=min(images.workers, os.cpu_count() or 1))
    path = None if path is None else networks.find_weights(path)
    return Source(path=path, recipe=about.recipe.but(data=images), spec=about.spec, split=about.split)


def _name_foreign(path: Path | None, model: ModelConfig | None, data_name: str | None) -> Source:
    """Return the source of weights that no run has written.

    ``model`` loads them itself, but this library's detectors have theirs at ``path``.
    """
    if model is None:
        raise ConfigError(f"{path or 'these weights'} do not say what network they are for: name it with --model")
    recipe = recipes.find(data_name) if data_name else Recipe()
    if networks.find_kind(model.name) == "detection":
        images = recipe.data.but(name=data_name or "coco:", image_size=networks.find_preprocessing(model.name).size)
        recipe = recipe.but(task="detection", data=images, detector=DetectorConfig(frozen_stages=0))
    if path is None and model.weights is None:
        raise ConfigError("there are no weights: give a checkpoint, or weights with --weights")
    if path is not None and (recipe.task == "classification" or not networks.is_ours(model.name)):
        model, path = model.but(weights=str(path)), None
    return Source(path=path, recipe=recipe.but(model=model))


def _describe_training_data(network: str) -> DataSpec:
    """Return ImageNet's classes, or COCO's for a detector, and the images that ``network`` was made for."""
    made_for = networks.find_preprocessing(network)
    detects = networks.find_kind(network) == "detection"
    return DataSpec(
        class_names=networks.detector_classes(network) if detects else networks.imagenet_classes(),
        channels=made_for.channels,
        size=made_for.size,
        mean=made_for.mean,
        std=made_for.std,
        crop=made_for.crop,
        interpolation=made_for.interpolation,
    )


def restore_task(path: Path | None, recipe: Recipe, spec: DataSpec) -> tasks.Task:
    """Return the task of ``recipe`` with the weights of the checkpoint ``path``, or with its network's own weights.

    Raises:
        CheckpointError: the weights do not fit the network, or are not finite. Gates that the file does not have are
            allowed.
    """
    if path is None:
        task = tasks.build(recipe, spec)
        if lost := [name for name in task.unexpected if not AUXILIARY.match(name)]:
            raise CheckpointError(
                f"{recipe.model.weights}: {len(lost)} of its tensors have no place in {recipe.model.name} with "
                f"attention {recipe.model.attention!r}, first {lost[0]!r}; "
                f"name the network and the --attention that they are for"
            )
        if task.exchanged:
            raise CheckpointError(
                f"{recipe.model.weights}: the weights of {recipe.model.name} are for other classes than these "
                f"{len(spec.class_names)}; name the data that they were trained on with --data"
            )
        return task
    with networks.limit_numbers(path):
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
