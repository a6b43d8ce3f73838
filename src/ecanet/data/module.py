"""The data module: what the data of classification and of detection have in common."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import lightning as L

from ecanet.data.pictures import HOW_TO_SKIP, Unreadable
from ecanet.data.sources import DataSpec
from ecanet.data.split import Split
from ecanet.errors import DataError
from ecanet.recipes import DataConfig

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "DataModule", "outlive_sigterm"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Progress(TypedDict):
    """A data module's state in a checkpoint: the epoch to go on with, and how many of its batches are done."""

    first_epoch: int
    first_batch: NotRequired[int]
    images: NotRequired[int]


def outlive_sigterm(_: int) -> None:
    """Let SIGTERM end this process, which reads images, only if the run's main process has sent it.

    A scheduler sends the signal to all processes, and the run still needs images for its last step; PyTorch's handler
    would end this one at once. macOS and Windows do not say who has sent a signal: there PyTorch's handler stays.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_main_process, daemon=True).start()


def _obey_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)


class DataModule(L.LightningDataModule):
    """Training and held-out images of a run; ``spec`` describes them as a network sees them.

    ``skipped`` holds the message of each unreadable image that was skipped. The run begins in the epoch
    ``first_epoch``, counted from 0, after ``first_batch`` of its batches. ``position`` is the number of batches that
    are done when a checkpoint is written within an epoch, else 0. ``drawn`` says which images the last batch has, for
    `name_images`. ``split`` has the images of a flat folder. ``notices`` are lines about the files, and
    are printed once.
    """

    def __init__(self, config: DataConfig, spec: DataSpec, *, seed: int):
        super().__init__()
        self.config, self.spec, self.seed = config, spec, seed
        self.skipped: set[str] = set()
        self.first_epoch, self.first_batch, self.position = 0, 0, 0
        self.drawn: list[Any] = []
        self.split: Split | None = None
        self.notices: list[str] = []

    def setup(self, stage: str) -> None:
        """Print the notices, and check that all processes have the same split.

        Raises:
            DataError: this process found other images than the first one.
        """
        assert self.trainer is not None
        if self.trainer.is_global_zero:
            for line in self.notices:
                print(line, file=sys.stderr, flush=True)
        self.notices = []
        if self.split is not None:
            mine = hashlib.blake2b(json.dumps(self.split.to_dict()).encode()).hexdigest()
            if self.trainer.strategy.broadcast(mine) != mine:
                raise DataError(
                    f"{self.config.name}: process {self.trainer.global_rank} found other images than process 0; every "
                    "machine needs the same files"
                )

    def state_dict(self) -> Progress:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the position in this epoch or, at its end, the beginning of the next one."""
        assert self.trainer is not None
        epoch = self.trainer.current_epoch + (self.position == 0)
        return {"first_epoch": epoch, "first_batch": self.position, "images": self.count_images()}

    def load_state_dict(self, state_dict: Progress) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begin where the checkpoint was written.

        Raises:
            DataError: that is within an epoch, and there are other images now.
        """
        self.first_epoch, self.first_batch = state_dict["first_epoch"], state_dict.get("first_batch", 0)
        before, now = state_dict.get("images"), self.count_images()
        if self.first_batch and before != now:
            raise DataError(
                f"{self.config.name} has {now} training images, and had {before} when the run was stopped in epoch "
                f"{self.first_epoch + 1}; to go on within that epoch, give it the same images again"
            )

    def count_images(self) -> int:
        """Return the number of training images."""
        raise NotImplementedError

    def name_images(self, drawn: Sequence[Any]) -> list[str]:
        """Return a name for each training image of a batch, whose value of ``drawn`` was this one."""
        raise NotImplementedError

    def get_rank(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def weigh_share(self) -> float:
        """Return the weight of this process's loss in a training step: 1 where all have equally many images."""
        return 1.0

    def share_held_out(self, count: int) -> range:
        """Return the indices that this process evaluates, of ``count`` held-out images.

        Raises:
            DataError: there are more processes than images.
        """
        rank, world = self.get_rank()
        if world > count:
            raise DataError(f"{world} processes cannot share {count} held-out images; use fewer")
        return range(rank, count, world)

    def count_workers(self) -> int:
        """Return the number of processes that read image files."""
        return min(8, os.cpu_count() or 1) if self.config.workers is None else self.config.workers

    def report_unreadable(self, unreadable: Sequence[Unreadable]) -> None:
        """Raise DataError for an unreadable image, or print each once if the configuration says to skip them.

        The data module calls it in the main process, so that a worker's message arrives without a traceback.
        """
        for problem in unreadable:
            if self.config.on_corrupt == "error":
                raise DataError(f"{problem.message}; {HOW_TO_SKIP}")
            if problem.message not in self.skipped:
                self.skipped.add(problem.message)
                print(f"skipped: {problem.message}", file=sys.stderr, flush=True)
