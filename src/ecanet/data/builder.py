"""Find the loader of a data set by its name."""

from ecanet.data.boxes import DetectionData, has_boxes, load_boxes
from ecanet.data.images import ClassificationData, has_labels, load_images
from ecanet.data.sources import SMALL_SETS
from ecanet.data.split import Split
from ecanet.errors import ConfigError
from ecanet.recipes import DataConfig, suggestion

__all__ = ["build"]


def build(
    config: DataConfig,
    *,
    seed: int = 0,
    train: bool = True,
    masks: bool = False,
    split: Split | None = None,
) -> ClassificationData | DetectionData:
    """Return the Lightning data module for ``config``; with ``train=False`` it holds only the held-out images.

    ``seed`` decides the order of the images, and which of a flat folder's are held out, unless ``split`` says so: a run
    keeps its split. With ``masks`` the targets of detection data have masks beside boxes.

    >>> from ecanet.recipes import DataConfig
    >>> digits = build(DataConfig(name="digits"))
    >>> len(digits.train), len(digits.held_out), digits.spec.size
    (1437, 360, 8)

    Raises:
        ConfigError: the data set does not exist, or a setting does not fit it.
        DataError: files are missing or broken.
    """
    if has_labels(config.name):
        return load_images(config, seed=seed, train=train, split=split)
    if has_boxes(config.name):
        return load_boxes(config, seed=seed, train=train, masks=masks)
    names = [*SMALL_SETS, "folder:PATH", "shards:PATH", "coco:PATH", "scenes"]
    raise ConfigError(f"unknown data {config.name!r}; {suggestion(config.name, names)}")
