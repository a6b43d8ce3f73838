"""How a run writes its checkpoint files, and finds them again."""

import math
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from ecanet.data import ClassificationData, DetectionData
from ecanet.errors import CheckpointError, ConfigError, show_value, summarize
from ecanet.models import read_file
from ecanet.report import describe_disk, replace_file

__all__ = ["AtomicCheckpointIO", "RunCheckpoint", "find_last_checkpoint", "share_batch"]

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""The checkpoint of the last epoch and that of the epoch before it, which is used if the last one is damaged."""


def find_last_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run that is whole, or None if the run was stopped before its first.

    A damaged one is named on standard error.

    Raises:
        CheckpointError: the run has finished epochs, but no checkpoint that can be read.
    """
    damaged: list[CheckpointError] = []
    for path in (run_dir / "checkpoints" / name for name in (LAST, PREVIOUS)):
        if not path.exists():
            continue
        try:
            read_file(path)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for error in damaged:
            print(f"{error}; resuming from the checkpoint before it, {path.name}", file=sys.stderr, flush=True)
        return path
    if damaged:
        raise damaged[0]
    if (run_dir / "metrics.csv").exists():
        raise CheckpointError(
            f"{run_dir} has finished epochs, but no checkpoints/{LAST}: it would begin again and overwrite them; put "
            "the file back, or train in another folder"
        )
    return None


def share_batch(checkpoint: Path, content: object, images: ClassificationData | DetectionData, processes: int) -> None:
    """Give each of the ``processes`` its share of the images that the run had in a batch, as ``content`` says.

    So the gradient, the learning rate and the schedule stay the same with another number of processes.

    Raises:
        ConfigError: the images cannot be shared evenly, or they are a detector's, which are grouped by their shapes.
        CheckpointError: the checkpoint does not say how many images a batch had, or something impossible.
    """
    about = cast(dict[str, Any], content).get("ecanet") if isinstance(content, dict) else None
    batch = cast(dict[str, Any], about).get("batch") if isinstance(about, dict) else None
    if batch is None:
        raise CheckpointError(
            f"{checkpoint}: it does not say how many images a step had, as checkpoints of earlier versions do not; "
            f"train in another folder, from its weights (--weights {checkpoint})"
        )
    mine = images.config.batch_size
    if type(batch) is not int or batch < 1 or batch % mine:
        raise CheckpointError(
            f"{checkpoint}: the run cannot go on from it, since its entry 'ecanet.batch' is {show_value(batch)} and "
            f"not {mine} images for each process; put a good copy in its place (such as {PREVIOUS})"
        )
    if batch == mine * processes:
        return
    if batch % processes or isinstance(images, DetectionData):
        raise ConfigError(
            f"{checkpoint.parent.parent}: its run had {batch} images in a batch of {batch // mine} processes, which "
            f"{processes} cannot {'take over' if batch % processes == 0 else 'share evenly'}; start as many as before"
        )
    images.config = images.config.but(batch_size=batch // processes)


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint callback that finds its files after the run's folder has moved, and of equals keeps the lower loss.

    Lightning's own one would forget which checkpoint was the best. And with a dozen held-out images the first epoch may
    name all classes right by chance; later ones that do so with confidence are better.
    """

    lowest_loss = math.inf
    """Held-out loss of the best checkpoint, if its task has one."""

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        """Return whether this epoch is better than the best one: in the metric or, if that is equal, in the loss."""
        loss = float(trainer.callback_metrics.get("val_loss", math.inf))
        equal = current is not None and self.best_model_score is not None and bool(current == self.best_model_score)
        better = super().check_monitor_top_k(trainer, current) or (equal and loss < self.lowest_loss)
        if better:
            self.lowest_loss = loss
        return better

    def state_dict(self) -> dict[str, object]:
        """Return the state with the lowest loss."""
        return {**super().state_dict(), "lowest_loss": self.lowest_loss}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Restore the state, with every path changed to the present folder."""
        folder = Path(str(self.dirpath))
        paths = {
            key: str(folder / Path(str(old)).name) for key, old in state_dict.items() if key.endswith("_path") and old
        }
        self.lowest_loss = cast(float, state_dict.get("lowest_loss", math.inf))
        best = cast(dict[str, object], state_dict.get("best_k_models", {}))
        scores = {str(folder / Path(old).name): score for old, score in best.items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": scores, "dirpath": self.dirpath})


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint completely or not at all, and read it without running code from it."""

    def save_checkpoint(
        self, checkpoint: Mapping[str, object], path: str | Path, storage_options: object = None
    ) -> None:
        """Write a temporary file, and rename it: a process that is killed leaves the old checkpoint.

        Raises:
            CheckpointError: the file cannot be written; the one before it is kept.
            ConfigError: a callback has put something into the checkpoint that could not be read again.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        try:
            torch.save(checkpoint, temporary)
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)  # reads no tensor's values
            if path.name == LAST and path.exists():
                path.replace(path.with_name(PREVIOUS))
            replace_file(temporary, path)
        except (pickle.PickleError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{path.name} was not written, since it could not be read again: a callback's state may hold tensors "
                f"and plain values alone ({summarize(error)})"
            ) from error
        except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError where the disk is full
            reason = getattr(error, "strerror", None) or summarize(error)
            raise CheckpointError(
                f"{path}: cannot be written ({reason}); {describe_disk(path.parent)}, then continue from the "
                f"checkpoint before it: ecanet train --resume {path.parent.parent}"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, *_: object, **__: object) -> dict[str, object]:
        """Return the content of the checkpoint.

        Raises:
            CheckpointError: the file is missing, truncated, not a checkpoint, or would run code.
        """
        return cast(dict[str, object], read_file(path))
