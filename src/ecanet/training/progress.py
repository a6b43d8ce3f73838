"""What a run shows and writes down while it goes on: a bar, a line per epoch, a table on disk."""

import csv
import io
import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ecanet.errors import ConfigError
from ecanet.report import Report, write_file

__all__ = ["Display", "History", "quiet_lightning"]


class History(L.Callback):
    """One row of figures per epoch, kept in the checkpoints, so that a resumed run's table has no gap."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.evaluated = False
        self.images, self.rate = 0, 0.0
        self.started = self.trained = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The rows of the run that is resumed."""
        self.rows = [dict(row) for row in state_dict["rows"]]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.images = 0
        self.started = self.trained = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images."""
        self.images += len(batch[0]) * trainer.world_size
        self.trained = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the rate of this step: after the last one, the schedule has gone on to the next epoch's."""
        self.rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """There is artifacts for the report."""
        self.evaluated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch's row, here, in the log and on disk; a loss that is not finite ends the run."""
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not math.isfinite(measured.get("train_loss", 0.0)):
            raise ConfigError(
                f"the loss is not finite in epoch {trainer.current_epoch + 1}; lower the learning rate "
                "(--learning-rate) or lengthen the warm-up"
            )
        row = {
            "epoch": trainer.current_epoch + 1,
            **measured,
            "learning_rate": self.rate,
            "images_per_second": self.images_per_second,
            "seconds": time.perf_counter() - self.started,
        }
        self.rows.append(row)
        if trainer.logger is not None:
            chosen = {name: row[name] for name in ("learning_rate", "images_per_second")}
            trainer.logger.log_metrics(chosen, step=trainer.global_step)
        if trainer.is_global_zero:
            table = io.StringIO()
            writer = csv.DictWriter(table, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(self.rows)
            write_file(self.path, table.getvalue())

    @property
    def images_per_second(self) -> float:
        """Training images of this epoch by the seconds spent on training them, on all devices."""
        return self.images / max(self.trained - self.started, 1e-9)


class Display(L.Callback):
    """A bar with images per second while an epoch runs, and one line when it is done."""

    def __init__(self, history: History, *, quiet: bool = False):
        self.history, self.console = (
            history,
            Console(quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False),
        )
        self.bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """What is about to be trained, with the batch and the learning rate that come of the recipe."""
        if not trainer.is_global_zero:
            return
        recipe, images = pl_module.recipe, trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        parameters = sum(p.numel() for p in pl_module.model.parameters())
        start = f", resumed after epoch {trainer.current_epoch}" if trainer.current_epoch else ""
        self.console.print(
            f"{recipe.model.name} with {recipe.model.attention}, {parameters:,} parameters, {recipe.epochs} epochs of "
            f"{recipe.data.name}: {len(images.train):,} training and {len(images.held_out):,} held-out images{start}"
        )
        self.console.print(
            f"batch {pl_module.effective_batch} = {recipe.data.batch_size} images × {trainer.world_size} "
            f"device{'s' * (trainer.world_size > 1)} ({pl_module.device.type}) × {recipe.accumulate} accumulated"
            f"{', or all there are' * (pl_module.effective_batch == len(images.train))}; "
            f"learning rate {pl_module.learning_rate:g} "
            f"({recipe.optimizer.learning_rate:g} for {recipe.optimizer.base_batch})"
        )
        self.console.print(f"folder {self.history.path.parent}")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show an empty bar, on a terminal."""
        if trainer.is_global_zero and self.console.is_terminal and not self.console.quiet:
            self.bar = Progress(
                TextColumn(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:,.0f} images/s"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.add_task("", total=int(trainer.num_training_batches), rate=0.0)
            self.bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=1, rate=self.history.images_per_second)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One line for the epoch."""
        self._stop()
        if trainer.is_global_zero:
            row = self.history.rows[-1]
            hidden = ("epoch", "learning_rate", "images_per_second", "seconds")
            figures = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in hidden)
            self.console.print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {figures}  "
                f"{row['images_per_second']:,.0f} images/s  {row['seconds']:.0f} s"
            )

    def done(self, report: Report) -> None:
        """What came out, and where to look."""
        figures = "  ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())
        self.console.print(f"{figures}  {report.seconds:.0f} s")
        self.console.print(f"report {report.folder / 'report.html'}")
        if (report.folder / "examples").is_dir():
            self.console.print(f"try    ecanet predict {report.folder} {report.folder / 'examples'}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """After Ctrl-C, say how to go on."""
        self._stop()
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            self.console.print(f"interrupted; go on with: ecanet train --resume {self.history.path.parent}")

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out Lightning's tips and the warnings that are no news to a run of ours; errors stay errors."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
