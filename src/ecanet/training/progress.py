"""The output of a run while it trains: a progress bar, a line per epoch, and a table in a file."""

import csv
import io
import os
import sys
import time
import warnings
from collections.abc import Generator, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NotRequired, TypedDict

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ecanet import progress
from ecanet.errors import DataError
from ecanet.models import quiet_loggers
from ecanet.report import Report, write_file
from ecanet.training.tasks import Task, get_data

__all__ = ["Display", "EvaluationBar", "History", "quiet_lightning"]


class HistoryState(TypedDict):
    """The part of `History` that a checkpoint holds."""

    rows: list[dict[str, float]]
    images: NotRequired[int]
    seconds: NotRequired[tuple[float, float]]
    learning_rate: NotRequired[float]


class History(L.Callback):
    """One row of metrics per epoch. The rows are in the checkpoints, so that a resumed run has all of them.

    So are the images and the time of the present epoch: the clock stands still while the run is stopped.

    ``evaluated`` says whether validation ran, so that the task has artifacts for the report.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.evaluated = False
        self.images, self.learning_rate = 0, 0.0
        self.seconds = (0.0, 0.0)
        self.started = self.last_batch_ended = time.perf_counter()

    def state_dict(self) -> HistoryState:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the rows so far, and the present epoch's share of the next one."""
        seconds = time.perf_counter() - self.started, self.last_batch_ended - self.started
        return {"rows": self.rows, "images": self.images, "seconds": seconds, "learning_rate": self.learning_rate}

    def load_state_dict(self, state_dict: HistoryState) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Restore the rows of the run that is resumed."""
        self.rows = [dict(row) for row in state_dict["rows"]]
        self.images, self.learning_rate = state_dict.get("images", 0), state_dict.get("learning_rate", 0.0)
        self.seconds = state_dict.get("seconds", (0.0, 0.0))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the clock of an epoch within which the run was stopped."""
        self.started = time.perf_counter() - self.seconds[0]
        self.last_batch_ended = self.started + self.seconds[1]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and count images from 0."""
        self.images = 0
        self.started = self.last_batch_ended = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: tuple[object, object], batch_idx: int
    ) -> None:
        """Note the learning rate of this step: after the epoch's last step, the optimizer has the next epoch's."""
        self.learning_rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: tuple[Sized, object],
        batch_idx: int,
    ) -> None:
        """Count the images of all processes."""
        self.images += len(batch[0]) * trainer.world_size
        self.last_batch_ended = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that validation ran, so the report can show predictions."""
        self.evaluated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch's row, log it, and write the table.

        Raises:
            ConfigError: the loss is not finite.
            DataError: no process could read a training image.
        """
        images = torch.tensor(float(self.images), device=trainer.strategy.root_device)
        if not trainer.strategy.reduce(images, reduce_op="sum"):  # pyright: ignore[reportUnknownMemberType]
            raise DataError(f"{get_data(trainer).config.name}: not one training image could be read")
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch + 1,
            **metrics,
            "learning_rate": self.learning_rate,
            "images_per_second": self.images_per_second,
            "seconds": time.perf_counter() - self.started,
        }
        self.rows.append(row)
        for logger in trainer.loggers:
            logged = {name: row[name] for name in ("learning_rate", "images_per_second")}
            logger.log_metrics(logged, step=trainer.global_step)
        if trainer.is_global_zero:
            self._write_table()

    @property
    def images_per_second(self) -> float:
        """Return the training speed of this epoch over all devices, without the time for validation."""
        return self.images / max(self.last_batch_ended - self.started, 1e-9)

    def _write_table(self) -> None:
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(self.rows[-1]))
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.path, table.getvalue())


class OptionalConsole(Console):
    """A console that a run can do without: where nobody reads it any more, it is quiet."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on, and say so on standard error."""
        self.quiet = True
        # Python itself writes what is left when it ends, which must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        print("standard output is closed; the run goes on without it, see metrics.csv", file=sys.stderr, flush=True)


class Display(L.Callback):
    """A progress bar with images per second during an epoch, and one line after it."""

    def __init__(self, history: History, *, quiet: bool = False):
        self.history = history
        self.console = OptionalConsole(quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.bar: Progress | None = None

    def show_network(self, task: Task) -> None:
        """Print what was loaded into the network and attached to it."""
        for line in task.notes:
            self.say(line)

    def say(self, line: str) -> None:
        """Print ``line``, once for all processes."""
        if getattr(rank_zero_only, "rank", 0) == 0:
            self.console.print(line)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the network, the data, and the batch size and learning rate that follow from the recipe."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Task)
        recipe, images = pl_module.recipe, get_data(trainer)
        assert images.train is not None
        parameters = sum(p.numel() for p in pl_module.model.parameters())
        changed = "" if pl_module.rate_before is None else f"; it was {pl_module.rate_before:g} until now"
        start = " (split.json)" if images.split else ""
        if images.first_batch:
            start += f", resumed in epoch {trainer.current_epoch + 1} after batch {images.first_batch}"
        elif trainer.current_epoch:
            start += f", resumed after epoch {trainer.current_epoch}"
        self.console.print(
            f"{recipe.model.name} with {recipe.model.attention}, {parameters:,} parameters, {recipe.epochs} epochs of "
            f"{recipe.data.name}: {len(images.train):,} training and {len(images.held_out):,} held-out images{start}"
        )
        self.console.print(
            f"batch {pl_module.effective_batch} = {images.config.batch_size} images × {trainer.world_size} "
            f"device{'s' * (trainer.world_size > 1)} ({pl_module.device.type}) × {recipe.accumulate} accumulated"
            f"{', or all there are' * (pl_module.effective_batch == len(images.train))}; "
            f"learning rate {pl_module.learning_rate:g} "
            f"({recipe.optimizer.learning_rate:g} for {recipe.optimizer.base_batch}{changed})"
        )
        self.console.print(f"folder {self.history.path.parent}")
        if images.first_batch:
            self._show_bar(trainer, images.first_batch)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show an empty progress bar if the output is a terminal."""
        self._show_bar(trainer, 0)

    def _show_bar(self, trainer: L.Trainer, done: int) -> None:
        if trainer.is_global_zero and self.console.is_terminal and not self.console.quiet and progress.is_shown():
            self.bar = Progress(
                TextColumn(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:,.0f} images/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=progress.shares_terminal(),
            )
            self.bar.add_task("", total=int(trainer.num_training_batches), completed=done, rate=0.0)
            self.bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Advance the progress bar."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=1, rate=self.history.images_per_second)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the epoch's metrics in one line."""
        self._remove_bar()
        if trainer.is_global_zero:
            row = self.history.rows[-1]
            hidden = ("epoch", "learning_rate", "images_per_second", "seconds")
            metrics = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in hidden)
            self.console.print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {metrics}  "
                f"{row['images_per_second']:,.0f} images/s  {row['seconds']:.0f} s"
            )

    def show_report(self, report: Report) -> None:
        """Print the final metrics, the path of the report, and a command to try."""
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())
        self.console.print(f"{metrics}  {report.seconds:.0f} s")
        self.console.print(f"report {report.folder / 'report.html'}")
        if (report.folder / "examples").is_dir():
            self.console.print(f"try    ecanet predict {report.folder} {report.folder / 'examples'}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Print how to continue after Ctrl-C."""
        self._remove_bar()
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            self.console.print(f"interrupted; continue with: ecanet train --resume {self.history.path.parent}")

    def _remove_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class EvaluationBar(L.Callback):
    """A bar over the batches of an evaluation."""

    def __init__(self) -> None:
        self.shown = ExitStack()
        self.advance: progress.Advance = lambda steps, total=None: None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the empty bar."""
        self.advance = self.shown.enter_context(progress.show("evaluating", int(sum(trainer.num_val_batches))))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: object, **more: object
    ) -> None:
        """Advance the bar."""
        self.advance(1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar."""
        self.shown.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the bar."""
        self.shown.close()


@contextmanager
def quiet_lightning() -> Generator[None]:
    """Suppress Lightning's tips, and warnings that do not concern this library's runs. Errors stay errors."""
    with warnings.catch_warnings(), quiet_loggers("lightning.pytorch", "lightning.fabric"):
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        yield
