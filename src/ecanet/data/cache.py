"""Keep generated data sets between runs: made once, written completely or not at all, and checked when read."""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecanet import progress
from ecanet.errors import DataError
from ecanet.models import get_cache_folder

__all__ = ["digest_arrays", "keep_arrays", "show_progress"]

Made = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (N, H, W, C) and labels (N,)."""


def keep_arrays(
    name: str, ingredients: object, make: Callable[[], Made], root: str | Path | None = None
) -> tuple[Tensor, Tensor]:
    """Return the images (N, C, H, W) and labels of a generated data set; call ``make`` if no complete copy is kept.

    ``ingredients`` is all that decides the images, as a value that JSON can hold. It is part of the file's name, so
    that a set made differently is another file. The file also holds the digest of its content: a file that was
    damaged is made again. ``root`` is the folder of the file; default: the cache.

    Raises:
        DataError: the folder cannot be written.
    """
    from filelock import FileLock

    parent = Path(root) if root else get_cache_folder("sets")
    recipe = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode())
    path = parent / f"{name.replace(':', '-')}-{recipe.hexdigest()[:16]}.npz"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        # The lock makes processes that start together make the set once.
        with FileLock(parent / f".{path.stem}.lock"):
            made = _read(path)
            if made is None:
                made = make()
                _write_atomically(path, made)
    except OSError as error:
        raise DataError(f"{parent}: {name} cannot be written ({error}); give another folder with --data-dir") from None
    images, labels = made
    return torch.as_tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.as_tensor(labels)


def show_progress(numbers: Iterable[int], description: str) -> Iterable[int]:
    """Return ``numbers``, with a progress bar on the terminal while they are taken."""
    return progress.track(numbers, description)


def digest_arrays(arrays: Made) -> str:
    """Return the SHA-256 of the shapes and values of ``arrays``."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read(path: Path) -> Made | None:
    """Return the arrays in ``path``, or None if there is no such file or its content is not what was written."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            made = arrays["images"], arrays["labels"]
            return made if str(arrays["digest"]) == digest_arrays(made) else None
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _write_atomically(path: Path, made: Made) -> None:
    """Write ``made`` under a temporary name and rename the file: an interruption leaves no incomplete one."""
    # The caller holds the lock, so a temporary file that exists is what a killed process left.
    for left_over in path.parent.glob(f".{path.stem}.*.part"):
        left_over.unlink()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, images=made[0], labels=made[1], digest=np.array(digest_arrays(made)))
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
