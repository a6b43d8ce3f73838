"""Images for classification: batches of images (N, C, H, W) and labels (N,), changed and normalised on the device.

Small sets stay in memory and are augmented a batch at a time; photographs are read and cropped by worker processes.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from ecanet.data.pictures import HOW_TO_SKIP
from ecanet.data.sources import SMALL_SETS, DataSpec, Folder, Memory, Unreadable, class_folders
from ecanet.errors import DataError
from ecanet.recipes import DataConfig

__all__ = ["ImageData", "fitted", "images", "knows", "mirrored", "shifted"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Change = Callable[[Tensor], Tensor]


def knows(name: str) -> bool:
    """Whether ``name`` is a set of images that `images` can load."""
    return name in SMALL_SETS or name.startswith("folder:")


def images(config: DataConfig, *, seed: int = 0, train: bool = True) -> "ImageData":
    """The images that ``config`` describes; with ``train=False`` only the part for evaluation.

    Raises:
        DataError: files are missing or broken, and what to do.
    """
    if config.name.startswith("folder:"):
        return _from_folder(config, seed, train)
    return _in_memory(config, seed, train)


class ImageData(L.LightningDataModule):
    """Training and held-out images; ``spec`` says the form in which a network gets them."""

    def __init__(
        self,
        config: DataConfig,
        spec: DataSpec,
        train: Dataset[Any] | None,
        held_out: Dataset[Any],
        *,
        augment: Change | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.config, self.spec, self.augment, self.seed = config, spec, augment, seed
        self.train, self.held_out = train, held_out
        self.skipped: set[str] = set()
        self.first_epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """The epoch with which a run goes on from a checkpoint that is written at the end of one."""
        assert self.trainer is not None
        return {"first_epoch": self.trainer.current_epoch + 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin with the checkpoint's next epoch."""
        self.first_epoch = state_dict["first_epoch"]

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled by the seed and the epoch alone, so that a resumed run sees what it would have seen."""
        assert self.train is not None
        rank, world = self._place()
        randomness = torch.Generator()
        sampler = _Shuffled(self.train, num_replicas=world, rank=rank, seed=self.seed)
        sampler.randomness = randomness
        # Lightning names later epochs to the sampler, but workers have begun with the first one by then
        sampler.set_epoch(self.first_epoch)
        whole = len(sampler) > self.config.batch_size
        # workers of its own for each epoch: those that live on would draw on where a resumed run begins anew
        return self._loader(
            self.train, sampler=sampler, generator=randomness, drop_last=whole, persistent_workers=False
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Every held-out image once, in order; several processes take turns, and none sees an image twice."""
        return self._loader(self.held_out, sampler=self._share())

    test_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Report images that could not be read: here, in the main process."""
        pictures, labels, unreadable = batch
        for problem in unreadable:
            if self.config.on_corrupt == "error":
                raise DataError(f"{problem.message}; {HOW_TO_SKIP}")
            if problem.message not in self.skipped:
                self.skipped.add(problem.message)
                print(f"skipped: {problem.message}", file=sys.stderr, flush=True)
        if pictures is None:
            # a batch of none, which a step passes over
            pictures = torch.empty(0, self.spec.channels, self.spec.size, self.spec.size, dtype=torch.uint8)
            labels = torch.empty(0, dtype=torch.int64)
        return pictures, labels

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment while training, and normalise, on the device."""
        pictures, labels = batch
        if self.augment is not None and self.trainer is not None and self.trainer.training:
            pictures = self.augment(pictures)
        return self.spec.normalize(pictures), labels

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _share(self) -> range:
        """Which held-out images this process evaluates."""
        rank, world = self._place()
        count = len(self.held_out)  # pyright: ignore[reportArgumentType]
        if world > count:
            raise DataError(f"{world} processes cannot share {count} held-out images; use fewer")
        return range(rank, count, world)

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        in_memory = isinstance(dataset, Memory)
        workers = self.config.workers
        if workers is None:
            workers = 0 if in_memory else min(8, os.cpu_count() or 1)
        return DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            num_workers=workers,
            collate_fn=_as_they_are if in_memory else _together,  # pyright: ignore[reportArgumentType]
            pin_memory=torch.cuda.is_available(),
            **{"persistent_workers": workers > 0, **options},
        )


class _Shuffled(DistributedSampler[Any]):
    """Another order each epoch, the same for all processes, and random numbers for each one's workers."""

    randomness: torch.Generator

    def __init__(self, *args: Any, seed: int, **options: Any):
        super().__init__(*args, **options)
        self.of_run = seed

    def set_epoch(self, epoch: int) -> None:
        # mixed, and not added: the next seed's order is not the next epoch's
        self.seed = derive_seed(self.of_run, epoch)
        self.randomness.manual_seed(derive_seed(self.of_run, epoch, self.rank))


def derive_seed(*numbers: int) -> int:
    """One seed of 32 bits, which is what torch looks at on a CPU, for several ``numbers``."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _as_they_are(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, list[Unreadable]]:
    return (*batch, [])


def _together(samples: list[Any]) -> tuple[Tensor | None, Tensor | None, list[Unreadable]]:
    good = [sample for sample in samples if not isinstance(sample, Unreadable)]
    bad = [sample for sample in samples if isinstance(sample, Unreadable)]
    if not good:
        return None, None, bad
    return torch.stack([picture for picture, _ in good]), torch.tensor([label for _, label in good]), bad


def _in_memory(config: DataConfig, seed: int, train: bool) -> ImageData:
    small = SMALL_SETS[config.name]
    if config.eval_crop != DataConfig().eval_crop:
        raise DataError("data.eval_crop is for photographs; small images are evaluated whole")
    size = config.image_size or small.spec.size

    def part(train: bool) -> Memory:
        pictures, labels = small.load(config.root, train)
        return Memory(v2.functional.resize(pictures, [size, size]) if size != pictures.shape[-1] else pictures, labels)

    changes: list[Change] = []
    if config.crop_padding:
        changes.append(lambda pictures: shifted(pictures, config.crop_padding))
    if config.flip:
        changes.append(mirrored)
    if config.random_augment:
        change = v2.RandAugment(magnitude=config.random_augment)
        changes.append(lambda pictures: torch.stack([change(picture) for picture in pictures]))
    augment = v2.Compose(changes) if changes else None
    spec = replace(small.spec, size=size)
    return ImageData(config, spec, part(True) if train else None, part(False), augment=augment, seed=seed)


def _from_folder(config: DataConfig, seed: int, train: bool) -> ImageData:
    folder = Path(config.name.removeprefix("folder:")).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; folder:PATH needs PATH/train/CLASS/… and PATH/val/CLASS/…")
    names = class_folders(folder / ("train" if train else "val"))
    if len(names) < 2:
        raise DataError(f"{folder}: only one class ({names[0]}); telling images apart takes two folders or more")  # pyright: ignore[reportGeneralTypeIssues]
    if config.root:
        raise DataError(f"--data-dir means nothing for {config.name}, which says itself where it is")
    if config.crop_padding:
        raise DataError("data.crop_padding is for small images; photographs are cropped at random as they are")
    if train and (strange := sorted(set(class_folders(folder / "val")) - set(names))):
        raise DataError(f"{folder / 'val' / strange[0]}: a class that train/ does not have")
    size = config.image_size or 224
    spec = DataSpec(
        class_names=names, channels=3, size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop=config.eval_crop
    )
    changes: list[v2.Transform] = [v2.RandomResizedCrop(size, antialias=True)]
    if config.flip is not False:
        changes.append(v2.RandomHorizontalFlip())
    if config.random_augment:
        changes.append(v2.RandAugment(magnitude=config.random_augment))
    training = Folder(folder / "train", names, spec.channels, v2.Compose(changes)) if train else None
    held_out = Folder(folder / "val", names, spec.channels, fitted(spec))
    return ImageData(config, spec, training, held_out, seed=seed)


def fitted(spec: DataSpec) -> Change:
    """What evaluation does: the short side becomes ``spec.size / spec.crop``, then the middle square is taken."""
    return v2.Compose([v2.Resize(round(spec.size / spec.crop), antialias=True), v2.CenterCrop(spec.size)])


def shifted(pictures: Tensor, padding: int) -> Tensor:
    """Each of the images (N, C, H, W) moved by up to ``padding`` pixels each way on its own; 0 fills what comes in."""
    n, _, h, w = pictures.shape
    wide = F.pad(pictures, [padding] * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=pictures.device)
    rows = top + torch.arange(h, device=pictures.device)  # N H
    columns = left + torch.arange(w, device=pictures.device)  # N W
    each = torch.arange(n, device=pictures.device)[:, None, None]
    # advanced indices around the slice put C last
    return wide[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mirrored(pictures: Tensor) -> Tensor:
    """Each of the images (N, C, H, W) flipped left to right with probability 1/2."""
    flip = torch.rand(len(pictures), 1, 1, 1, device=pictures.device) < 0.5
    return torch.where(flip, pictures.flip(-1), pictures)
