"""A test in two processes of one group: this one and a new one, whose start takes seconds."""

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def run_in_two(function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` here as rank 0 and in a new process as rank 1, both in a group of gloo.

    Raises:
        AssertionError: the other process failed, whose traceback is on standard error.
        Exception: what ``function`` raised here.
    """
    other = torch.multiprocessing.get_context("spawn").Process(
        target=_call, args=(1, str(folder / "store"), function, arguments), daemon=True
    )
    other.start()
    try:
        _call(0, str(folder / "store"), function, arguments)
        other.join(60)
    finally:
        failed = sys.exc_info()[0] is not None
        other.join(5 if failed else 0)
        other.kill()
        other.join()
    assert other.exitcode == 0


def _call(rank: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        function(rank, *arguments)
    finally:
        distributed.destroy_process_group()
