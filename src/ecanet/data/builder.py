"""Data for runs: ``build`` finds the loader for a name."""

from typing import Any

from ecanet.data import boxes
from ecanet.data.images import images, knows
from ecanet.data.sources import SMALL_SETS
from ecanet.errors import ConfigError
from ecanet.recipes import DataConfig, suggestion

__all__ = ["build"]


def build(config: DataConfig, *, seed: int = 0, train: bool = True, masks: bool = False) -> Any:
    """The LightningDataModule for ``config``; with ``train=False`` only its evaluation part.

    ``masks`` says whether objects' masks are read beside their boxes, where there are objects.

    >>> from ecanet.recipes import DataConfig
    >>> digits = build(DataConfig(name="digits"))
    >>> len(digits.train), len(digits.held_out), digits.spec.size
    (1437, 360, 8)

    Raises:
        ConfigError: no such data.
        DataError: files are missing or broken, and what to do.
    """
    if knows(config.name):
        return images(config, seed=seed, train=train)
    if boxes.knows(config.name):
        return boxes.boxes(config, seed=seed, train=train, masks=masks)
    names = [*SMALL_SETS, "folder:PATH", "coco:PATH", "scenes"]
    raise ConfigError(f"unknown data {config.name!r}; {suggestion(config.name, names)}")
