"""Complete a recipe before its run: what follows from the network and from the data."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, cast

from ecanet import data, networks
from ecanet.data import ClassificationData, DetectionData, Split
from ecanet.errors import CheckpointError
from ecanet.models import read_file
from ecanet.recipes import Recipe

__all__ = ["Description", "build_data", "complete", "find_seen", "lengthen", "read_description"]


class Description(TypedDict):
    """The plain values that a run writes beside its weights."""

    recipe: dict[str, object]
    spec: dict[str, object]
    split: dict[str, list[str]] | None


def read_description(path: Path) -> Description | None:
    """Return what the run that wrote the weights file ``path`` says about itself; None if no run wrote it.

    Raises:
        CheckpointError: the file is missing, broken or unsafe.
    """
    content = read_file(path)
    about = cast(dict[str, object], content).get("ecanet") if isinstance(content, dict) else None
    if about is None:
        return None
    # Files of version 0.1.0 may have no split.
    values = {"split": None, **cast(dict[str, object], about)} if isinstance(about, dict) else {}
    if not isinstance(values.get("recipe"), dict) or not isinstance(values.get("spec"), dict):
        raise CheckpointError(f"{path}: what its run says about itself is broken; take another checkpoint")
    return cast(Description, values)


def find_seen(recipe: Recipe) -> Split | None:
    """Return the images of a folder that the recipe's weights were trained on, as a split that holds out nothing.

    A run that begins with weights of another run on the same folder must not hold out images which these have seen.

    Raises:
        CheckpointError: the weights' file is missing, broken or unsafe.
    """
    weights = recipe.model.weights
    if weights in (None, "default") or not recipe.data.name.startswith("folder:"):
        return None
    about = read_description(Path(weights))
    split = None if about is None else about["split"]
    return None if split is None else Split(train=tuple(split["train"]), held_out=())


def complete(recipe: Recipe, *, trusted: bool) -> Recipe:
    """Return ``recipe`` with the settings that follow from its network.

    The file of a network ``FILE.py:FACTORY`` gets its absolute path, so that the run can be used from another folder;
    ``trusted`` means that the user has named it. Photographs for another library's network get that network's size, and
    are resized as its library says.

    Raises:
        ConfigError: the network's file is missing, or there is no such library.
    """
    name = recipe.model.name
    if recipe.task != "classification" or networks.is_ours(name):
        return recipe
    library, _ = networks.find_library(name)
    if library == "file":
        return recipe.but(model=recipe.model.but(name=networks.trust(name))) if trusted else recipe
    if not recipe.data.name.startswith("folder:"):
        return recipe
    made_for, images = networks.find_preprocessing(name), recipe.data
    images = images.but(
        image_size=images.image_size or made_for.size, interpolation=images.interpolation or made_for.interpolation
    )
    return recipe.but(data=images)


def build_data(recipe: Recipe, *, train: bool = True, split: Split | None = None) -> ClassificationData | DetectionData:
    """Return the data of ``recipe``; photographs are normalized as its network expects.

    ``split`` is the one that a run has made of a flat folder, or that of `find_seen`.

    Raises:
        ConfigError: there is no such data set.
        DataError: files are missing or broken, or a setting does not fit this data set.
    """
    images = data.build(recipe.data, seed=recipe.seed, train=train, masks=recipe.learns_masks, split=split)
    if recipe.task == "classification" and recipe.data.name.startswith("folder:"):
        made_for = networks.find_preprocessing(recipe.model.name)
        images.spec = replace(images.spec, mean=made_for.mean, std=made_for.std)
    return images


def lengthen(recipe: Recipe, images: ClassificationData | DetectionData) -> Recipe:
    """Return ``recipe`` with more epochs if ``images`` are too few for its least number of steps."""
    assert images.train is not None
    batches = max(1, len(images.train) // recipe.data.batch_size)
    steps = math.ceil(batches / recipe.accumulate)
    epochs = max(recipe.epochs, math.ceil(recipe.min_steps / steps))
    return recipe.but(epochs=epochs, min_steps=recipe.min_steps)
