"""The directory of a run: a new one, or one to resume, which holds the recipe."""

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import cast

from lightning.fabric.utilities.rank_zero import rank_zero_only

from ecanet.errors import ConfigError
from ecanet.recipes import Recipe, from_dict, to_dict

__all__ = ["choose_run_dir", "read_recipe"]


def read_recipe(folder: str | Path) -> Recipe:
    """Return the recipe of the run in ``folder``.

    Raises:
        ConfigError: there is no run, or its recipe does not fit this version.
    """
    path = Path(folder) / "recipe.json"
    try:
        return from_dict(Recipe, json.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no run to resume here (recipe.json is missing)") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def choose_run_dir(recipe: Recipe, folder: str | Path | None, resume: bool) -> Path:
    """Return the run directory, without making it: first the data and the network must prove good.

    Raises:
        ConfigError: the directory cannot be written, or it holds a run that does not fit.
    """
    if folder is None:
        if resume:
            raise ConfigError("resume=True needs the folder of the run")
        stamp = f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
        return next(p for n in range(1, 1000) if not (p := Path("runs", stamp + (f"-{n}" if n > 1 else ""))).exists())
    folder = Path(folder)
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        problem = "read-only" if nearest.is_dir() else "a file"
        raise ConfigError(f"{folder}: cannot write a run there; {nearest} is {problem}")
    if resume:
        old = read_recipe(folder)
        # A run may be lengthened; and one with a least number of steps has more epochs than its recipe had.
        longer = recipe.epochs > old.epochs or recipe.min_steps
        same = old.but(epochs=recipe.epochs, min_steps=recipe.min_steps) == recipe
        if old != recipe and not (longer and same):
            raise ConfigError(f"{folder} holds another recipe: {_describe_difference(to_dict(old), to_dict(recipe))}")
    elif getattr(rank_zero_only, "rank", 0) == 0 and (folder / "recipe.json").exists():
        raise ConfigError(f"{folder} already holds a run; continue it (--resume {folder}) or choose another folder")
    return folder


def _describe_difference(old: Mapping[str, object], new: Mapping[str, object], at: str = "") -> str:
    """Return a message about the first setting in which two recipes differ."""
    key = next(k for k in new if old[k] != new[k])
    before, after = old[key], new[key]
    if isinstance(before, dict) and isinstance(after, dict):
        groups = cast(dict[str, object], before), cast(dict[str, object], after)
        if groups[0].keys() == groups[1].keys():
            return _describe_difference(*groups, f"{at}{key}.")
    return f"{at}{key} is {before!r} there and {after!r} here"
