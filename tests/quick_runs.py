"""Leave out what a run does again and again and what is the same each time: the tests train for a second or less."""

import functools
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

reads_back = False
"""Whether a checkpoint is read again before it has its name; a test that needs it takes the fixture ``read_back``."""


def speed_up_runs() -> None:
    """Find each package's version once, and read no checkpoint that has just been written.

    The versions and the callbacks of other packages stand in a hundred files, which each run would read. Reading a
    checkpoint takes longer than training for the epoch before it.
    """
    metadata.version = functools.cache(metadata.version)
    metadata.entry_points = functools.cache(metadata.entry_points)
    load = torch.load

    @functools.wraps(load)
    def load_named(file: Any, *args: Any, **options: Any) -> Any:
        if not reads_back and isinstance(file, Path) and file.name.endswith(".ckpt.part"):
            return None
        return load(file, *args, **options)

    torch.load = load_named
