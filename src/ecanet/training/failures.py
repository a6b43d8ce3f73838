"""What the machine refuses in the middle of a run, in one line with the remedy."""

import errno
import re
from pathlib import Path

import torch

from ecanet.errors import ConfigError
from ecanet.recipes import Recipe

__all__ = ["explain_failure"]

OUT_OF_MEMORY = ("CUDA out of memory", "MPS backend out of memory", "can't allocate memory", "not enough memory")
LOST_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w+)|exited unexpectedly)"
)


def explain_failure(error: BaseException, recipe: Recipe, run_dir: Path) -> ConfigError | None:
    """Return the line for an ``error`` that is no fault of the program, or None.

    These are: memory that ran out, here or in a process that reads images, more open files than are allowed, and a
    batch that is too small for its norms.
    """
    text = str(error)
    goes_on = f"ecanet train --resume {run_dir}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        return ConfigError(f"memory ran out; {_shrink(recipe)}")
    lost = LOST_WORKER.search(text)
    if lost or isinstance(error, ConnectionError | EOFError):  # its death may be noticed by a broken connection
        process = f"process {lost[1]}, which reads images," if lost else "a process that reads images"
        how = "killed" if lost is None or lost[2] in ("Killed", None) else f"ended by the signal {lost[2]}"
        return ConfigError(
            f"{process} was {how}: most often memory ran out; close other programs, then "
            f"continue with {goes_on}, or begin again with fewer such processes (--set data.workers=1)"
        )
    if "Too many open files" in text or getattr(error, "errno", None) == errno.EMFILE:
        return ConfigError(
            f"more files are open than the system allows; raise the limit (ulimit -n 4096) and continue with {goes_on}"
        )
    if "more than 1 value per channel" in text:
        return ConfigError(
            "batch norm needs more than one value per channel: increase data.batch_size or data.image_size"
        )
    # Lightning may fail itself while it tidies up after the failure, which is then the context of its own.
    return None if error.__context__ is None else explain_failure(error.__context__, recipe, run_dir)


def _shrink(recipe: Recipe) -> str:
    """Return how the same training needs less memory."""
    batch, accumulate = recipe.data.batch_size, recipe.accumulate
    if batch == 1:
        return "begin again with smaller images (--set data.image_size=…) or with --set precision=bf16-mixed"
    # The effective batch stays, or grows by the remainder of the division.
    half = -(-batch // 2)
    return (
        f"begin again with --batch-size {half} --set accumulate={2 * accumulate}: that is the same effective batch in "
        f"{'half' if batch % 2 == 0 else 'about half'} the memory"
    )
