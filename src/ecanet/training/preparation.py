"""Complete a recipe before its run: what follows from the network and from the data."""

import math
from dataclasses import replace

from ecanet import data, networks
from ecanet.data import ClassificationData, DetectionData, Split
from ecanet.recipes import Recipe

__all__ = ["build_data", "complete", "lengthen"]


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

    ``split`` is the one that a run has made of a flat folder.

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
