"""``run(recipe)`` trains what the recipe describes, keeps it in a folder, and returns the report.

The folder, ``runs/NAME-DATE`` unless said otherwise, holds recipe.json, environment.json, metrics.csv and metrics.json,
report.html, checkpoints/best.ckpt and last.ckpt, TensorBoard's logs, and a few held-out images as examples.
"""

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ecanet import data
from ecanet.errors import ConfigError
from ecanet.models import read_file
from ecanet.networks import find_device
from ecanet.recipes import Recipe, find, from_dict, to_dict
from ecanet.report import Report, environment, write_file
from ecanet.training import tasks
from ecanet.training.progress import Display, History, quiet_lightning

__all__ = ["read_recipe", "run"]


def run(
    recipe: Recipe | str,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    device: str | torch.device = "auto",
    devices: int | str = "auto",
    quiet: bool = False,
) -> Report:
    """Train what ``recipe`` describes; the same recipe on the same machine gives the same result.

    ``resume=True`` goes on with the run in ``folder`` from its last checkpoint, and with a finished one returns what it
    found. ``device`` is ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; ``devices`` says how many of that kind take
    part, by default all. Under torchrun, or with several devices, every process calls this alike.

    Raises:
        ConfigError: a setting does not exist or does not fit, this machine does not have the ``device``, or ``folder``
            holds another run.
        DataError: data that is missing or broken.
        CheckpointError: weights or a checkpoint that cannot be used.
    """
    recipe = _check_recipe(recipe)
    if recipe.task == "detection":
        for name in ("loss", "label_smoothing", "mixup", "cutmix"):
            if getattr(recipe, name) != getattr(Recipe(), name):
                raise ConfigError(f"{name} is for classification; detectors have their own losses")
    found = find_device(device)
    place = _claimed(recipe, folder, resume)
    with quiet_lightning():
        images = data.build(recipe.data, seed=recipe.seed, masks=recipe.learns_masks)
        torch.manual_seed(recipe.seed)
        task = tasks.build(recipe, images.spec)
        history = History(place / "metrics.csv")
        display = Display(history, quiet=quiet)
        trainer = _trainer(recipe, task, place, [history, display], found, devices)
        if recipe.precision == "16-mixed" and trainer.strategy.root_device.type == "cpu":
            # Lightning would compute in bfloat16, and say so in a warning only
            raise ConfigError("precision 16-mixed needs a GPU; on a CPU set precision=bf16-mixed or precision=32")
        if trainer.is_global_zero:
            try:
                write_file(place / "recipe.json", json.dumps(to_dict(recipe), indent=2))
            except OSError as error:
                raise ConfigError(f"{place}: cannot keep a run there ({error.strerror})") from None
            write_file(place / "environment.json", json.dumps(environment(), indent=2))
        last = place / "checkpoints" / "last.ckpt"
        _fit(trainer, task, images, last if resume and last.is_file() else None, place)
        if not history.evaluated:
            # resumed after the last epoch: the figures are in the checkpoint, the artifacts is not
            trainer.validate(task, images, verbose=False)
        report = _report(recipe, task, history, place)
        if trainer.is_global_zero:
            report.write()
            for name, content in task.files().items():
                write_file(place / "results" / name, content)
            display.done(report)
    return report


def _check_recipe(recipe: object) -> Recipe:
    """Return ``recipe``, or the recipe of that name.

    Raises:
        ConfigError: ``recipe`` is neither a recipe nor the name of one.
    """
    if isinstance(recipe, str):
        return find(recipe)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"run needs a recipe or the name of one, such as run('quickstart'), got {recipe!r}")
    return recipe


def _fit(trainer: L.Trainer, task: tasks.Task, images: Any, checkpoint: Path | None, place: Path) -> None:
    """Train to the end, from ``checkpoint`` on; exit code 143 for SIGTERM, so that what waits for the run stops too."""
    try:
        trainer.fit(task, images, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    except SystemExit as stop:  # Lightning's, for Ctrl-C and SIGTERM
        if isinstance(stop, SIGTERMException):
            print(f"stopped by SIGTERM; go on with: ecanet train --resume {place}", file=sys.stderr, flush=True)
            raise SystemExit(143) from None
        raise KeyboardInterrupt from None
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            "batch norm needs more than one value a channel: raise data.batch_size or data.image_size"
        ) from None


def read_recipe(folder: str | Path) -> Recipe:
    """The recipe of the run in ``folder``.

    Raises:
        ConfigError: there is no run, or its recipe does not fit this version.
    """
    path = Path(folder) / "recipe.json"
    try:
        return from_dict(Recipe, json.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no run here to go on with (recipe.json is missing)") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _claimed(recipe: Recipe, folder: str | Path | None, resume: bool) -> Path:
    """The run's folder, if it may be used; nothing is written before data and network are known to be good."""
    if folder is None:
        if resume:
            raise ConfigError("resume=True needs the folder of the run to go on with")
        stamp = f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
        return next(p for n in range(1, 1000) if not (p := Path("runs", stamp + (f"-{n}" if n > 1 else ""))).exists())
    folder = Path(folder)
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "read-only" if nearest.is_dir() else "a file"
        raise ConfigError(f"{folder}: cannot keep a run there; {nearest} is {what}")
    if resume:
        if (old := read_recipe(folder)) != recipe:
            raise ConfigError(f"{folder} holds another recipe: {_difference(to_dict(old), to_dict(recipe))}")
    elif getattr(rank_zero_only, "rank", 0) == 0 and (folder / "recipe.json").exists():
        raise ConfigError(f"{folder} already holds a run; go on with it (--resume {folder}) or choose another folder")
    return folder


def _difference(old: dict[str, Any], new: dict[str, Any], at: str = "") -> str:
    """The first setting in which two recipes differ."""
    key = next(k for k in new if old[k] != new[k])
    if isinstance(new[key], dict) and isinstance(old[key], dict) and old[key].keys() == new[key].keys():
        return _difference(old[key], new[key], f"{at}{key}.")
    return f"{at}{key} is {old[key]!r} there and {new[key]!r} here"


def _trainer(
    recipe: Recipe, task: tasks.Task, place: Path, callbacks: list[L.Callback], device: torch.device, devices: int | str
) -> L.Trainer:
    """Lightning's Trainer with our callbacks and files."""
    checkpoints = {"dirpath": place / "checkpoints", "save_on_train_epoch_end": True, "enable_version_counter": False}
    callbacks = [
        *callbacks,
        _Keeper(filename="best", monitor=task.monitor, mode="max", **checkpoints),
        _Keeper(filename="last", **checkpoints),
    ]
    if recipe.ema_decay is not None:
        callbacks.append(WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay)))
    try:
        return L.Trainer(
            max_epochs=recipe.epochs,
            precision=recipe.precision,
            accumulate_grad_batches=recipe.accumulate,
            accelerator=device.type,
            devices=_devices_to_use(device, devices),
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            logger=TensorBoardLogger(place, name="", version="tensorboard"),
            callbacks=callbacks,
            plugins=[_WholeFiles()],
            benchmark=torch.cuda.is_available() and recipe.task == "classification",  # else every shape is a new one
            # the data's own samplers know about processes
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=50,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot train like this: {str(error).strip().splitlines()[0]}") from None


def _devices_to_use(device: torch.device, devices: int | str) -> int | str | list[int]:
    """Return Lightning's ``devices``: how many devices of the kind of ``device`` train, or the number of the one GPU.

    Raises:
        ConfigError: ``device`` is one GPU, and several devices are to train.
    """
    if devices == "auto" and "LOCAL_WORLD_SIZE" in os.environ:
        # torchrun started one process per device; Lightning's "auto" would mean a single device on a CPU
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
    if device.index is None:
        return devices
    if devices not in ("auto", 1):
        raise ConfigError(f"device {str(device)!r} is one GPU, but devices={devices!r}; use device='cuda' for several")
    return [device.index]


class _Keeper(ModelCheckpoint):
    """Knows its files again when the run's folder has moved; Lightning would forget which was best."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath))
        moved = {key: str(here / Path(old).name) for key, old in state_dict.items() if key.endswith("_path") and old}
        scores = {str(here / Path(old).name): score for old, score in state_dict.get("best_k_models", {}).items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": scores, "dirpath": self.dirpath})


class _WholeFiles(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, and are read without running what is in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        torch.save(checkpoint, temporary)
        temporary.replace(path)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return read_file(path)  # pyright: ignore[reportReturnType]


def _report(recipe: Recipe, task: tasks.Task, history: History, place: Path) -> Report:
    last = history.rows[-1]
    best = max(row[task.monitor] for row in history.rows)
    described = ("epoch", "seconds", "learning_rate")
    return Report(
        recipe=recipe,
        metrics={k: v for k, v in last.items() if k not in described} | {f"best_{task.monitor}": best},
        history=history.rows,
        seconds=sum(row["seconds"] for row in history.rows),
        parameters=sum(p.numel() for p in task.model.parameters()),
        folder=place,
        environment=environment(),
        artifacts=task.artifacts(),
    )
