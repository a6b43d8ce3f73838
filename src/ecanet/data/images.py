"""Images for classification: batches of images (N, C, H, W) and labels (N,), augmented and normalized on the device.

Small data sets stay in memory, and a whole batch is augmented at once. Worker processes read and crop photographs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import v2  # pyright: ignore[reportMissingTypeStubs]

from ecanet.data.augmentation import Augmentation, build_eval_transform, build_train_transform, choose_augmentation
from ecanet.data.folders import FolderDataset, find_images
from ecanet.data.module import IMAGENET_MEAN, IMAGENET_STD, DataModule, outlive_sigterm
from ecanet.data.pictures import Unreadable
from ecanet.data.randomness import Draw
from ecanet.data.samplers import BalancedSampler, EpochSampler
from ecanet.data.shard_files import read_shards
from ecanet.data.shards import ShardDataset
from ecanet.data.sources import SMALL_SETS, DataSpec, MemoryDataset
from ecanet.data.split import Split
from ecanet.errors import DataError
from ecanet.recipes import DataConfig, has_photographs

__all__ = ["ClassificationData", "has_labels", "load_images"]

ImageDataset = MemoryDataset | FolderDataset | ShardDataset
LoadedBatch = tuple[Tensor | None, Tensor | None, list[Draw], list[Unreadable]]
"""Images (N, C, H, W), labels (N,) and draws, or None if no image could be read; and the unreadable images."""


def has_labels(name: str) -> bool:
    """Return whether the data set ``name`` is one for classification, which `load_images` can load."""
    return name in SMALL_SETS or has_photographs(name)


def load_images(
    config: DataConfig, *, seed: int = 0, train: bool = True, split: Split | None = None
) -> "ClassificationData":
    """Return the images that ``config`` describes; with ``train=False`` only the held-out ones.

    ``split`` is the one that the run of a flat folder began with.

    Raises:
        DataError: files are missing or broken, or a setting does not fit this data set.
    """
    if has_photographs(config.name):
        return _load_photographs(config, seed, train, split)
    return _load_small_set(config, seed, train)


class ClassificationData(DataModule):
    """Training and held-out images with labels; ``augment`` changes the training images of a batch.

    ``drawn`` has the sampler's draws, without unreadable images.
    """

    def __init__(
        self,
        config: DataConfig,
        spec: DataSpec,
        train: ImageDataset | None,
        held_out: ImageDataset,
        *,
        augment: Augmentation | None = None,
        seed: int = 0,
    ):
        super().__init__(config, spec, seed=seed)
        self.train, self.held_out, self.augment = train, held_out, augment

    def count_images(self) -> int:
        """Return the number of training images."""
        return len(self.train) if self.train is not None else 0

    def name_images(self, drawn: Sequence[Draw]) -> list[str]:
        """Return the path of each image, or its number among the training images."""
        if isinstance(self.train, FolderDataset | ShardDataset):
            return [self.train.name_image(draw.image) for draw in drawn]
        return [f"training image {draw.image}" for draw in drawn]

    def weigh_share(self) -> float:
        """Return the weight of this process's loss, which makes the mean over processes the mean over images.

        It is not 1 where all images together are fewer than a batch, and cannot be shared evenly.
        """
        rank, world = self.get_rank()
        images = self.count_images()
        if images >= self.config.batch_size * world:
            return 1.0
        return len(range(rank, images, world)) * world / images

    def train_dataloader(self) -> DataLoader[object]:
        """Return batches in an order that depends only on the seed and the epoch."""
        assert self.train is not None
        rank, world = self.get_rank()
        shares = {"batch_size": self.config.batch_size, "seed": self.seed, "rank": rank, "world": world}
        if self.config.sampler == "balanced":
            sampler = BalancedSampler(self.train.get_labels(), **shares)
        else:
            # Shards have an order of their own, which reads few of them at a time.
            order = self.train.get_order if isinstance(self.train, ShardDataset) else None
            sampler = EpochSampler(len(self.train), **shares, order=order)
        # Lightning sets the later epochs, but in the first one the workers begin before it does.
        sampler.begin(self.first_epoch, self.first_batch)
        return self._make_loader(self.train, sampler)

    def val_dataloader(self) -> DataLoader[object]:
        """Return batches of the held-out images in order; each image is evaluated by exactly one process."""
        return self._make_loader(self.held_out, [Draw(at, 0) for at in self.share_held_out(len(self.held_out))])

    test_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: LoadedBatch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Return the images and labels after reporting the images that could not be read.

        Raises:
            DataError: an image could not be read, and ``on_corrupt`` is "error".
        """
        images, labels, self.drawn, unreadable = batch
        self.report_unreadable(unreadable)
        if images is None or labels is None:
            # an empty batch, for which the task takes no step
            images = torch.empty(0, self.spec.channels, self.spec.size, self.spec.size, dtype=torch.uint8)
            labels = torch.empty(0, dtype=torch.int64)
        return images, labels

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Return the images normalized, and augmented in training, on the device."""
        images, labels = batch
        if self.augment is not None and self.trainer is not None and self.trainer.training:
            images = self.augment(images, self.drawn)
        return self.spec.normalize(images), labels

    def _make_loader(self, dataset: ImageDataset, sampler: Sampler[Draw] | list[Draw]) -> DataLoader[object]:
        in_memory = isinstance(dataset, MemoryDataset)
        workers = 0 if in_memory and self.config.workers is None else self.count_workers()
        return DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            sampler=sampler,
            num_workers=workers,
            worker_init_fn=outlive_sigterm,
            collate_fn=cast("Callable[..., LoadedBatch]", _pass_on if in_memory else _collate),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            # Without its own generator, the loader would draw a seed for its workers from the run's random state.
            generator=torch.Generator(),
        )


def _pass_on(batch: tuple[Tensor, Tensor, list[Draw]]) -> LoadedBatch:
    """Return a batch that `MemoryDataset` has made already."""
    return (*batch, [])


def _collate(samples: Sequence[tuple[Tensor, int, Draw] | Unreadable]) -> LoadedBatch:
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    if not readable:
        return None, None, [], unreadable
    images, labels, drawn = zip(*readable, strict=True)
    return torch.stack(images), torch.tensor(labels), list(drawn), unreadable


def _load_small_set(config: DataConfig, seed: int, train: bool) -> ClassificationData:
    small = SMALL_SETS[config.name]
    if config.eval_crop != DataConfig().eval_crop:
        raise DataError("data.eval_crop is for photographs; small images are evaluated whole: leave it out")
    if config.interpolation is not None:
        raise DataError("data.interpolation is for photographs: leave it out")
    if config.val_share is not None:
        raise DataError(
            f"data.val_share is for folder:PATH; {config.name} has held-out images of its own: leave it out"
        )
    size = config.image_size or small.spec.size

    def load(train: bool) -> MemoryDataset:
        images, labels = small.load(config.root, train)
        return MemoryDataset(v2.functional.resize(images, [size, size]) if size != images.shape[-1] else images, labels)

    spec = replace(small.spec, size=size)
    return ClassificationData(
        config, spec, load(True) if train else None, load(False), augment=choose_augmentation(config, seed), seed=seed
    )


def _load_photographs(config: DataConfig, seed: int, train: bool, split: Split | None) -> ClassificationData:
    if config.crop_padding:
        raise DataError("data.crop_padding is for small images; photographs are cropped at random: leave it out")
    if config.root:
        raise DataError(f"--data-dir {config.root} has no meaning for {config.name}, which is a path; leave it out")
    if config.name.startswith("shards:"):
        return _load_shards(config, seed, train)
    found = find_images(config, seed=seed, train=train, split=split)
    spec = _describe_photographs(config, found.class_names)
    augment = build_train_transform(config, spec)
    training = FolderDataset(*found.train, spec.channels, augment, seed=seed) if found.train else None
    held_out = FolderDataset(*found.held_out, spec.channels, build_eval_transform(spec))
    module = ClassificationData(config, spec, training, held_out, seed=seed)
    module.split, module.notices = found.split, found.notices
    return module


def _load_shards(config: DataConfig, seed: int, train: bool) -> ClassificationData:
    if config.val_share is not None:
        raise DataError(
            f"data.val_share ({config.val_share:g}) is for a folder without held-out images; {config.name} has its "
            "own: leave --val-share out"
        )
    shards = read_shards(config.name.removeprefix("shards:"))
    spec = _describe_photographs(config, shards.class_names)
    augment = build_train_transform(config, spec)
    training = ShardDataset(shards, "train", spec.channels, augment, seed=seed) if train else None
    held_out = ShardDataset(shards, "held_out", spec.channels, build_eval_transform(spec))
    return ClassificationData(config, spec, training, held_out, seed=seed)


def _describe_photographs(config: DataConfig, class_names: tuple[str, ...]) -> DataSpec:
    return DataSpec(
        class_names=class_names,
        channels=3,
        size=config.image_size or 224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        crop=config.eval_crop,
        interpolation=config.interpolation or "bilinear",
    )
