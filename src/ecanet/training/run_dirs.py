"""The directory of a run: a new one, or one to resume, which holds the recipe; one process at a time trains there."""

import json
import os
import re
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import cast

from lightning.fabric.utilities.rank_zero import rank_zero_only

from ecanet.errors import ConfigError, summarize
from ecanet.recipes import Recipe, from_dict, read_json, to_dict
from ecanet.report import write_file

__all__ = ["choose_run_dir", "count_epochs", "has_run", "lock_run_dir", "read_recipe"]

LARGEST_RECIPE = 2**20
"""Bytes of a recipe; with a weight for each of 20,000 classes it has half as many."""

HOLDER = ".training.json"
"""This file says which process trains in the directory."""


def read_recipe(folder: str | Path) -> Recipe:
    """Return the recipe of the run in ``folder``.

    Raises:
        ConfigError: there is no run, or its recipe does not fit this version.
    """
    path = Path(folder) / "recipe.json"
    try:
        return from_dict(Recipe, read_json(path, largest=LARGEST_RECIPE))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no run to resume here (recipe.json is missing)") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({summarize(error)})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def count_epochs(folder: str | Path) -> int:
    """Return how many epochs the run in ``folder`` has finished."""
    table = Path(folder) / "metrics.csv"
    return len(table.read_text().splitlines()) - 1 if table.exists() else 0


def has_run(folder: str | Path | None) -> bool:
    """Return whether ``folder`` holds a run to resume.

    Raises:
        ConfigError: there is no folder: the next call could not find the run.
    """
    if folder is None:
        raise ConfigError("to start or go on, name the run's directory (--out), so that the next call finds it")
    return (Path(folder) / "recipe.json").exists()


def choose_run_dir(recipe: Recipe, folder: str | Path | None, resume: bool) -> Path:
    """Return the run directory, without making it: first the data and the network must prove good.

    Raises:
        ConfigError: the directory cannot be written, or it holds a run that does not fit.
    """
    if folder is None:
        if resume:
            raise ConfigError("resume=True needs the folder of the run")
        stamp = f"{_name_run(recipe)}-{datetime.now():%Y%m%d-%H%M%S}"
        return next(p for n in range(1, 1000) if not (p := Path("runs", stamp + (f"-{n}" if n > 1 else ""))).exists())
    folder = Path(folder)
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        problem = "read-only" if nearest.is_dir() else "a file"
        raise ConfigError(f"{folder}: cannot write a run there; {nearest} is {problem}")
    if resume:
        old = read_recipe(folder)
        # A run may be lengthened, and go on with another learning rate; and one with a least number of steps has more
        # epochs than its recipe had.
        longer = recipe.epochs > old.epochs or recipe.min_steps
        rate = replace(old.optimizer, learning_rate=recipe.optimizer.learning_rate)
        changed = old.but(optimizer=rate)
        same = changed.but(epochs=recipe.epochs, min_steps=recipe.min_steps) == recipe
        if changed != recipe and not (longer and same):
            raise ConfigError(
                f"{folder} holds another recipe: {_describe_difference(to_dict(old), to_dict(recipe))}; go on with the "
                f"run's own settings (ecanet train --resume {folder}), or choose another folder"
            )
        if rate != old.optimizer and count_epochs(folder) >= max(old.epochs, recipe.epochs):
            raise ConfigError(
                f"{folder} is finished, and another learning rate would change nothing; lengthen it too (--epochs)"
            )
    elif _is_first_process() and (folder / "recipe.json").exists():
        raise _make_taken_error(folder)
    return folder


def _name_run(recipe: Recipe) -> str:
    """Return the folder's or the set's own name if the recipe's data have a path, else the recipe's name.

    >>> from ecanet.recipes import DataConfig
    >>> _name_run(Recipe(name="finetune", data=DataConfig(name="folder:/data/my photos")))
    'my_photos'
    """
    kind, _, path = recipe.data.name.partition(":")
    if kind not in {"folder", "shards", "coco"}:
        return recipe.name
    last = path.rstrip("/").rpartition("/")[2] if "://" in path else Path(path).expanduser().absolute().name
    return re.sub(r"[^\w.-]+", "_", last).strip("_.-") or recipe.name


@contextmanager
def lock_run_dir(folder: Path, *, new: bool) -> Generator[None]:
    """Keep other runs out of ``folder`` in this context; of the processes of one run, the first one does it.

    The operating system takes the lock away when its process ends, however it ends.

    Raises:
        ConfigError: another process trains there, or it has begun a run there and this one is ``new``.
    """
    from filelock import FileLock, Timeout

    if not _is_first_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / HOLDER
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{folder}: {_describe_holder(holder)} trains there now; wait for it, or stop it first"
        ) from None
    try:
        if new and (folder / "recipe.json").exists():
            raise _make_taken_error(folder)
        here = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        write_file(holder, json.dumps(here))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _is_first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _make_taken_error(folder: Path) -> ConfigError:
    return ConfigError(f"{folder} already holds a run; continue it (--resume {folder}) or choose another folder")


def _describe_holder(path: Path) -> str:
    """Return which process wrote the file ``path``, as far as that can be read."""
    try:
        holder = cast(dict[str, object], read_json(path))
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _describe_difference(old: Mapping[str, object], new: Mapping[str, object], at: str = "") -> str:
    """Return a message about the first setting in which two recipes differ."""
    key = next(k for k in new if old[k] != new[k])
    before, after = old[key], new[key]
    if isinstance(before, dict) and isinstance(after, dict):
        groups = cast(dict[str, object], before), cast(dict[str, object], after)
        if groups[0].keys() == groups[1].keys():
            return _describe_difference(*groups, f"{at}{key}.")
    return f"{at}{key} is {before!r} there and {after!r} here"
