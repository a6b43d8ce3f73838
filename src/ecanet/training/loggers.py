"""Where a run logs its metrics: Lightning's loggers by name. They decide nothing about the run."""

import json
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import cast

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import loggers
from lightning.pytorch.loggers import Logger

from ecanet.errors import ConfigError, summarize
from ecanet.recipes import Recipe, read_json, suggestion, to_dict
from ecanet.report import write_file

__all__ = ["choose_loggers", "open_loggers"]

NAMES = ("tensorboard", "csv", "wandb", "mlflow")
FILE = "loggers.json"
"""This file in a run's directory names its loggers, each with what it calls the run, so that a resume goes on there."""

OTHER_PACKAGES = ("wandb", "mlflow")
"""Loggers whose package is not in the train extra. Their extras have the same names."""

REMEDY = {
    "wandb": "; WANDB_MODE=offline logs into the run's directory alone",
    "mlflow": "; check MLFLOW_TRACKING_URI, such as sqlite:///mlflow.db",
}


def choose_loggers(chosen: str | Sequence[str | Logger] | None, run_dir: Path, *, resume: bool) -> list[str | Logger]:
    """Return ``chosen`` as a list. None is what the run in ``run_dir`` has logged to, or TensorBoard for a new run.

    Raises:
        ConfigError: there is no such logger, or its package is not installed.
    """
    if chosen is None:
        chosen = list(_read_versions(run_dir)) if resume and (run_dir / FILE).exists() else ["tensorboard"]
    listed = chosen.split(",") if isinstance(chosen, str) else chosen
    names = list(dict.fromkeys(one.strip() if isinstance(one, str) else one for one in listed))
    if names == ["none"]:
        return []
    for name in names:
        if isinstance(name, Logger):
            continue
        if name not in NAMES:
            remedy = "leave it out beside others" if name == "none" else suggestion(str(name), [*NAMES, "none"])
            raise ConfigError(f"unknown logger {name!r}; {remedy}")
        _check_package(name)
    return names


def _check_package(name: str) -> None:
    """Raise ConfigError if the logger's package is not installed."""
    if name in OTHER_PACKAGES:
        spec = find_spec(name)
        # Both write folders of these names where they run, and to Python such a folder looks like an empty package.
        if spec is None or spec.origin is None:
            raise ConfigError(f"logger {name!r} needs a package: pip install 'ecanet[{name}]'")


@contextmanager
def open_loggers(
    chosen: Sequence[str | Logger], recipe: Recipe, run_dir: Path, *, resume: bool
) -> Generator[list[Logger]]:
    """Yield the loggers for the run in ``run_dir``. What logs elsewhere gets the ``recipe``, once.

    Raises:
        ConfigError: a logger cannot be opened, for example because its server does not answer.
    """
    versions = _read_versions(run_dir) if resume else {}
    # A run that the caller has begun (a sweep does) is logged to and left open.
    began = _is_wandb_running()
    failed = True
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        opened = [one if isinstance(one, Logger) else _open(one, recipe, run_dir, versions) for one in chosen]
        if getattr(rank_zero_only, "rank", 0) == 0:
            write_file(run_dir / FILE, json.dumps(versions, indent=2))
        yield opened
        failed = False
    finally:
        if _is_wandb_running() and not began:
            # Otherwise the next run of this process would be logged to the same one.
            sys.modules["wandb"].finish(exit_code=int(failed))


def _open(name: str, recipe: Recipe, run_dir: Path, versions: dict[str, str | None]) -> Logger:
    """Return the logger ``name`` for the run that it calls ``versions[name]``, or for a new one, which is noted there.

    Raises:
        ConfigError: it cannot be opened.
    """
    version = versions.get(name)
    try:
        logger = _make(name, run_dir, version)
        attrgetter("experiment")(logger)  # only with this a logger begins
    except Exception as error:  # whatever these packages and their servers raise
        raise ConfigError(f"cannot log to {name}: {summarize(error)}{REMEDY.get(name, '')}") from error
    if name in OTHER_PACKAGES and version is None:
        logger.log_hyperparams(to_dict(recipe))
    versions[name] = None if logger.version is None else str(logger.version)
    return logger


def _make(name: str, run_dir: Path, version: str | None) -> Logger:
    """Return Lightning's logger ``name``; ``version`` is what it has called the run before."""
    environ = os.environ
    if name == "tensorboard":
        return loggers.TensorBoardLogger(run_dir, name="", version="tensorboard")
    if name == "csv":
        # A new version each time: this logger would delete what it has written before.
        return loggers.CSVLogger(run_dir, name="csv")
    if name == "wandb":
        project = environ.get("WANDB_PROJECT", "ecanet")
        return loggers.WandbLogger(project=project, name=run_dir.name, save_dir=run_dir, id=version)
    return loggers.MLFlowLogger(
        experiment_name=environ.get("MLFLOW_EXPERIMENT_NAME", "ecanet"),
        run_name=run_dir.name,
        # Lightning's own default is a folder of files, which newer versions of mlflow refuse.
        tracking_uri=import_module("mlflow").get_tracking_uri(),
        run_id=version,
    )


def _read_versions(run_dir: Path) -> dict[str, str | None]:
    """Return the loggers of the run, each with what it calls the run; none if the run does not say.

    Raises:
        ConfigError: the file is broken.
    """
    path = run_dir / FILE
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({summarize(error)}); remove it, and choose loggers") from None
    if not isinstance(content, dict) or not set(cast(dict[str, object], content)) <= set(NAMES):
        raise ConfigError(f"{path}: not the loggers of a run; remove it, and choose loggers")
    return cast(dict[str, str | None], content)


def _is_wandb_running() -> bool:
    return getattr(sys.modules.get("wandb"), "run", None) is not None
