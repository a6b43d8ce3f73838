"""``run(recipe)`` trains what the recipe describes, writes the results into a folder, and returns the report.

The folder is ``runs/NAME-DATE`` by default. It contains recipe.json, environment.json, metrics.csv, metrics.json,
report.html, checkpoints/best.ckpt and last.ckpt, the logs, a few held-out images as examples, and split.json if the run
has split a flat folder.
"""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ecanet import data
from ecanet.errors import ConfigError, EcanetError, summarize
from ecanet.models import load_state_dict
from ecanet.networks import find_device
from ecanet.recipes import Recipe, find, to_dict
from ecanet.report import Report, environment, write_file
from ecanet.training import hardware, tasks
from ecanet.training.averaging import MovingAverage
from ecanet.training.checkpoints import AtomicCheckpointIO, RunCheckpoint, find_last_checkpoint, share_batch
from ecanet.training.failures import explain_failure
from ecanet.training.gates import summarize_gates
from ecanet.training.loggers import choose_loggers, open_loggers
from ecanet.training.preparation import build_data, complete, find_seen, lengthen
from ecanet.training.processes import join_restarted
from ecanet.training.progress import Display, History, quiet_lightning
from ecanet.training.run_dirs import choose_run_dir, count_epochs, has_run, lock_run_dir, read_recipe
from ecanet.training.sharding import ShardedStrategy, check_sharding, gather
from ecanet.training.states import check_state, find_position
from ecanet.training.steps import StepWatch
from ecanet.training.stopping import StopRequest, find_scheduler, stop_on_signals, take_over_signals

__all__ = ["remake_report", "run"]

SPLIT_FILE = "split.json"


def run(
    recipe: Recipe | str,
    *,
    folder: str | Path | None = None,
    resume: bool | Literal["auto"] = False,
    device: str | torch.device = "auto",
    devices: int | str = "auto",
    loggers: str | Sequence[str | Logger] | None = None,
    callbacks: Sequence[L.Callback] = (),
    quiet: bool = False,
) -> Report:
    """Train what ``recipe`` describes; the same recipe on the same machine gives the same result.

    Under torchrun, or with several devices, every process makes the same call.

    Args:
        recipe: a recipe, or the name of a recipe or data set, as for ``ecanet.recipes.find``.
        folder: the run's folder, ``runs/NAME-DATE`` by default.
        resume: continue the run in ``folder`` from its last checkpoint. A finished run returns its results. "auto"
            starts a new run where there is none, so that a scheduler may give the same command again.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        devices: number of devices of that kind that train; all by default.
        loggers: ``tensorboard`` (the default), ``csv``, ``wandb``, ``mlflow`` or ``none``; several comma-separated, or
            a list, which may hold Lightning's loggers. A resumed run logs to those that its folder names, by default.
        callbacks: Lightning callbacks beside the run's own. Give them again to resume: the checkpoint has their state.
        quiet: print nothing.

    Raises:
        ConfigError: a setting or a logger does not exist or does not fit, this machine does not have the ``device``, or
            ``folder`` holds another run.
        DataError: data are missing or broken.
        CheckpointError: weights or a checkpoint cannot be used.
    """
    recipe = complete(_check_recipe(recipe), trusted=resume is not True)
    resume = has_run(folder) if resume == "auto" else resume
    torch_device = find_device(device)
    run_dir = choose_run_dir(recipe, folder, resume)
    chosen = choose_loggers(loggers, run_dir, resume=resume)
    with quiet_lightning(), ExitStack() as held:
        if resume:
            held.enter_context(lock_run_dir(run_dir, new=False))
        # A run keeps the split of a flat folder that it began with, whatever has become of the folder.
        split = data.read_split(run_dir / SPLIT_FILE) if resume else find_seen(recipe)
        images = build_data(recipe, split=split)
        recipe = lengthen(recipe, images)
        if quiet:
            images.notices = []
        torch.manual_seed(recipe.seed)  # pyright: ignore[reportUnknownMemberType]
        checkpoint = find_last_checkpoint(run_dir) if resume else None
        task = _build_task(recipe, images.spec, from_checkpoint=checkpoint is not None)
        history = History(run_dir / "metrics.csv")
        display = Display(history, quiet=quiet)
        display.show_network(task)
        if resume and checkpoint is None:
            display.say("the run was stopped before its first checkpoint: it begins again")
        watch = StepWatch(run_dir / "checkpoints" / "last.ckpt", recipe.checkpoint, StopRequest())
        trainer = _make_trainer(
            recipe, task, run_dir, [*_check_callbacks(callbacks), history, display, watch], torch_device, devices
        )
        if checkpoint is not None:
            _take_over(checkpoint, trainer, task, images)
        if not resume:  # now that nothing is wrong, the directory may be made
            held.enter_context(lock_run_dir(run_dir, new=True))
        with open_loggers(chosen, recipe, run_dir, resume=resume) as trainer.loggers:
            if trainer.is_global_zero:
                _write_settings(recipe, task, run_dir, images.split, again=checkpoint is not None)
            _fit(trainer, task, images, checkpoint, watch, run_dir)
            if not history.evaluated:
                # The run had already finished. Its checkpoint has the metrics, but not the artifacts of an evaluation.
                trainer.validate(task, images, verbose=False)
        gather(task.model)  # for the report
        report = _make_report(recipe, task, history, run_dir)
        if trainer.is_global_zero:
            report.artifacts["gates"] = summarize_gates(task)
            _write_results(report, task)
            display.show_report(report)
    return report


def _take_over(
    checkpoint: Path, trainer: L.Trainer, task: tasks.Task, images: data.ClassificationData | data.DetectionData
) -> None:
    """Check, before anything is written, that the run can go on from ``checkpoint`` with these processes."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    share_batch(checkpoint, content, images, trainer.world_size)
    task.trainer = images.trainer = trainer  # the learning rate and the batches depend on them
    cast(Any, trainer).datamodule = images
    if task.recipe.model.weights is not None:  # the kernel sizes are those of the weights that the run began with
        load_state_dict(task.model, content, source=str(checkpoint))
    check_state(checkpoint, content, trainer, task, images)
    task.resumed = find_position(content, images)


def remake_report(folder: str | Path, *, device: str | torch.device = "auto", quiet: bool = False) -> Report:
    """Evaluate the finished run in ``folder`` again, and write its report anew.

    Raises:
        ConfigError: there is no run, or it is not finished.
    """
    recipe = read_recipe(folder)
    done = count_epochs(folder)
    if done < recipe.epochs:
        raise ConfigError(
            f"{folder} has finished {done} of {recipe.epochs} epochs, and a report is for a finished run; first finish "
            f"it: ecanet train --resume {folder}"
        )
    return run(recipe, folder=folder, resume=True, device=device, quiet=quiet)


def _write_results(report: Report, task: tasks.Task) -> None:
    """Write the report and the files of results.

    Raises:
        ConfigError: they cannot be written. The run itself is safe in its checkpoints.
    """
    try:
        report.write()
        for name, content in task.files().items():
            write_file(report.folder / "results" / name, content)
    except Exception as error:  # a plot or a page may fail in many ways, hours after the run began
        raise ConfigError(
            f"{report.folder}: the run is finished and its checkpoints are whole, but its report failed "
            f"({summarize(error)}); then make it again: ecanet report {report.folder}"
        ) from error


def _build_task(recipe: Recipe, spec: data.DataSpec, *, from_checkpoint: bool) -> tasks.Task:
    """Return the task of ``recipe``. A checkpoint has all weights, so the recipe's are not loaded then."""
    task = tasks.build(recipe.but(model=recipe.model.but(weights=None)) if from_checkpoint else recipe, spec)
    task.recipe = recipe
    return task


def _check_recipe(recipe: object) -> Recipe:
    """Return ``recipe``, or the recipe of that name.

    Raises:
        ConfigError: ``recipe`` is neither a recipe nor the name of one, or a setting is for the other task.
    """
    if isinstance(recipe, str):
        return find(recipe)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"run needs a recipe or the name of one, such as run('quickstart'), got {recipe!r}")
    if recipe.task == "detection":
        for name in ("loss", "label_smoothing", "class_weights", "mixup", "cutmix"):
            if getattr(recipe, name) != getattr(Recipe(), name):
                raise ConfigError(f"{name} is for classification, and detectors have their own losses; leave it out")
    return recipe


def _check_callbacks(callbacks: Sequence[L.Callback]) -> Sequence[L.Callback]:
    """Return ``callbacks``; raise ConfigError if they are not Lightning's."""
    if not isinstance(callbacks, Sequence) or not all(isinstance(one, L.Callback) for one in callbacks):
        raise ConfigError(f"callbacks must be a list of Lightning callbacks (lightning.Callback), got {callbacks!r}")
    return callbacks


def _write_settings(recipe: Recipe, task: tasks.Task, run_dir: Path, split: data.Split | None, *, again: bool) -> None:
    try:
        write_file(run_dir / "recipe.json", json.dumps(to_dict(recipe), indent=2))
    except OSError as error:
        raise ConfigError(f"{run_dir}: cannot write a run there ({error.strerror})") from None
    write_file(run_dir / "environment.json", json.dumps(environment(), indent=2))
    if task.network and not again:
        write_file(run_dir / "network.json", json.dumps(task.network, indent=2))
    if split is not None:
        write_file(run_dir / SPLIT_FILE, json.dumps(split.to_dict(), indent=1))


def _make_trainer(
    recipe: Recipe,
    task: tasks.Task,
    run_dir: Path,
    callbacks: list[L.Callback],
    device: torch.device,
    devices: int | str,
) -> L.Trainer:
    """Return Lightning's Trainer with this library's callbacks and files.

    Raises:
        ConfigError: the devices or the precision cannot be used.
    """
    if recipe.strategy == "fsdp":
        check_sharding(recipe)
    folder = run_dir / "checkpoints"
    callbacks = [
        *callbacks,
        RunCheckpoint(
            folder, "best", monitor=task.monitor, mode="max", save_on_train_epoch_end=True, enable_version_counter=False
        ),
        RunCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False),
    ]
    if recipe.ema_decay is not None:
        callbacks.append(MovingAverage(recipe.ema_decay))
    try:
        trainer = L.Trainer(
            max_epochs=recipe.epochs,
            precision=recipe.precision,
            strategy=ShardedStrategy() if recipe.strategy == "fsdp" else "auto",
            accumulate_grad_batches=recipe.accumulate,
            sync_batchnorm=recipe.sync_batchnorm,
            accelerator=device.type,
            devices=hardware.choose_devices(device, devices),
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            logger=False,  # they are opened when all else is known to be right
            callbacks=callbacks,
            default_root_dir=run_dir,  # Lightning would look for checkpoints in the current folder
            plugins=[AtomicCheckpointIO(), *find_scheduler()],
            # cuDNN would search for the fastest algorithm again at every new shape, and detection has many shapes.
            benchmark=torch.cuda.is_available() and recipe.task == "classification",
            # The data's own samplers share the images among the processes.
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=50,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot train like this: {str(error).strip().splitlines()[0]}") from None
    hardware.check(recipe, trainer.strategy.root_device, trainer.world_size)
    return trainer


def _fit(
    trainer: L.Trainer,
    task: tasks.Task,
    images: L.LightningDataModule,
    checkpoint: Path | None,
    watch: StepWatch,
    run_dir: Path,
) -> None:
    """Train to the end, from ``checkpoint`` if there is one.

    SIGTERM ends the process with exit code 143, so that a script which waits for the run stops too.
    """
    take_over_signals(trainer)
    try:
        with stop_on_signals(watch.request):
            join_restarted(trainer)
            trainer.fit(task, images, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    except SystemExit as stop:  # Lightning raises it after Ctrl-C and SIGTERM.
        if isinstance(stop, SIGTERMException):
            if trainer.is_global_zero:
                print(
                    f"{watch.describe()}; continue with: ecanet train --resume {run_dir}", file=sys.stderr, flush=True
                )
            raise SystemExit(143) from None
        raise KeyboardInterrupt from None
    except (ValueError, RuntimeError, OSError, EOFError, MemoryError) as error:
        problem = None if isinstance(error, EcanetError) else explain_failure(error, task.recipe, run_dir)
        if problem is None:
            raise
        raise problem from None


def _make_report(recipe: Recipe, task: tasks.Task, history: History, run_dir: Path) -> Report:
    last = history.rows[-1]
    best = max(row[task.monitor] for row in history.rows)
    not_metrics = ("epoch", "seconds", "learning_rate")
    return Report(
        recipe=recipe,
        metrics={k: v for k, v in last.items() if k not in not_metrics} | {f"best_{task.monitor}": best},
        history=history.rows,
        seconds=sum(row["seconds"] for row in history.rows),
        parameters=sum(p.numel() for p in task.model.parameters()),
        folder=run_dir,
        environment=environment(),
        artifacts=task.artifacts(),
    )
