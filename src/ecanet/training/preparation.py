"""Complete a recipe before its run: what follows from the network and from the data."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from ecanet import data, networks
from ecanet.data import ClassificationData, DataSpec, DetectionData, Split
from ecanet.errors import CheckpointError, EcanetError
from ecanet.models import read_file
from ecanet.recipes import DataConfig, Recipe, from_dict, has_photographs, to_dict

__all__ = ["Description", "build_data", "complete", "find_description", "find_seen", "lengthen", "read_description"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What a run writes beside its weights: its recipe, its data, and the split of a flat folder."""

    recipe: Recipe
    spec: DataSpec
    split: Split | None

    def to_dict(self) -> dict[str, object]:
        """Return the description as plain values."""
        return {"recipe": to_dict(self.recipe), "spec": asdict(self.spec), "split": self.split and self.split.to_dict()}


def read_description(path: Path) -> Description | None:
    """Return what the run that wrote the weights file ``path`` says about itself; None if no run wrote it.

    A folder that `ecanet.save_pretrained` has written describes itself; its recipe has data without a name if nobody
    knows what it was trained on.

    Raises:
        CheckpointError: the file is missing, broken or unsafe, or a value in the description is out of bounds.
    """
    if networks.is_pretrained(path):
        return _describe_folder(path)
    return find_description(path, read_file(path))


def _describe_folder(folder: Path) -> Description:
    config = networks.read_pretrained(folder)
    try:
        spec = DataSpec.from_dict({**to_dict(config.preprocessing), "class_names": list(config.class_names)})
        known = Recipe(data=DataConfig(name="")) if config.recipe is None else from_dict(Recipe, config.recipe)
    except EcanetError as error:
        raise CheckpointError(f"{folder / networks.CONFIG}: {error}; take another copy of the folder") from None
    return Description(recipe=known.but(model=config.network), spec=spec, split=None)


def find_description(path: Path, content: object) -> Description | None:
    """Return the description in the ``content`` of the file ``path``, checked: anybody may have written it.

    Raises:
        CheckpointError: a value is out of bounds.
    """
    about = cast(dict[str, object], content).get("ecanet") if isinstance(content, dict) else None
    if about is None:
        return None
    values = cast(dict[str, object], about) if isinstance(about, dict) else {}
    recipe, spec, split = (values.get(name) for name in ("recipe", "spec", "split"))
    if not isinstance(recipe, dict) or not isinstance(spec, dict):
        raise CheckpointError(f"{path}: what its run says about itself is broken; take another checkpoint")
    try:
        return Description(
            recipe=from_dict(Recipe, cast(dict[str, object], recipe)),
            spec=DataSpec.from_dict(cast(dict[str, object], spec)),
            # Files of version 0.1.0 may have no split.
            split=None if split is None else Split.from_dict(cast(dict[str, object], split)),
        )
    except EcanetError as error:
        raise CheckpointError(
            f"{path}: what its run says about itself cannot be used: {error}; take another checkpoint"
        ) from None


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
    return None if about is None or about.split is None else Split(train=about.split.train, held_out=())


def complete(recipe: Recipe, *, trusted: bool) -> Recipe:
    """Return ``recipe`` with the settings that follow from its network.

    A network's file and an attention's package are code: unless the recipe is ``trusted``, because the user has named
    them, they must have been named on this machine before. The file of a network ``FILE.py:FACTORY`` gets its absolute
    path, so that the run can be used from another folder. Photographs for another library's network get that network's
    size, and are resized as its library says.

    Raises:
        ConfigError: the network's file is missing, there is no such library, or nobody has named the code.
    """
    name = recipe.model.name
    if "." in recipe.model.attention:
        (networks.trust_class if trusted else networks.check_class)(recipe.model.attention)
    if recipe.task != "classification" or networks.is_ours(name):
        return recipe
    library, _ = networks.find_library(name)
    if library == "file":
        return recipe.but(model=recipe.model.but(name=networks.trust(name))) if trusted else recipe
    if not has_photographs(recipe.data.name):
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
    if recipe.task == "classification" and has_photographs(recipe.data.name):
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
