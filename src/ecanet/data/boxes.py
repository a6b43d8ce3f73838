"""Images with boxes and masks, from any folder in COCO's layout: batches of images, and of what is on each.

A target has ``boxes`` (N, 4) as left, top, right, bottom in pixels, ``labels`` (N,) from 1 in the order of the
categories, ``masks`` (N, H, W) where the annotations have them, and ``image_id``. Crowds are left out of targets and
kept for evaluation. Images without objects stay in: they show what is not one.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ecanet.data.annotations import Annotations, Picture, clipped, decode, read_annotations
from ecanet.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageData, derive_seed
from ecanet.data.pictures import read_image
from ecanet.data.scenes import SPRITES, SceneConfig, scenes
from ecanet.data.sources import DataSpec, Unreadable
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import DataConfig, suggestion

__all__ = ["BoxData", "Boxes", "boxes", "flipped", "knows"]

Target = dict[str, Tensor]


def knows(name: str) -> bool:
    """Whether ``name`` is a set of annotated images that `boxes` can load."""
    return name.startswith("coco:") or name.partition(":")[0] == "scenes"


def boxes(config: DataConfig, *, seed: int = 0, train: bool = True, masks: bool = True) -> "BoxData":
    """The annotated images that ``config`` describes; with ``train=False`` only the part for evaluation.

    Without ``masks`` nothing but boxes is read of their annotations.

    Raises:
        ConfigError: no such kind of scenes, or a setting that means nothing here.
        DataError: files are missing or broken, and what to do.
    """
    kind, _, rest = config.name.partition(":")
    for name in ("crop_padding", "random_augment", "eval_crop"):
        if getattr(config, name) != getattr(DataConfig(), name):
            raise ConfigError(f"data.{name} is for classification; images with boxes are resized and mirrored only")
    if kind == "coco":
        if config.root:
            raise ConfigError(f"--data-dir means nothing for {config.name}, which says itself where it is")
        folder = Path(rest).expanduser()
    elif rest and rest not in SPRITES:
        raise ConfigError(f"no scenes of {rest!r}; {suggestion(rest, list(SPRITES))}")
    else:
        # the same scenes whatever the run's seed: runs differ by their luck and not by their data
        folder = scenes(SceneConfig(sprites=rest or SPRITES[0]), config.root)
    held_out = _part(config, folder, "val2017", masks)
    training = _part(config, folder, "train2017", masks) if train else None
    if training and training.class_names != held_out.class_names:
        raise DataError(f"{folder}: train2017 and val2017 have different categories")
    spec = DataSpec(
        class_names=held_out.class_names,
        channels=3,
        size=config.image_size or 800,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    return BoxData(config, spec, Boxes(training) if training else None, Boxes(held_out), seed=seed)


def _part(config: DataConfig, folder: Path, split: str, masks: bool) -> Annotations:
    """One half of the data set; what was left out of it is said, in lines that name the first few."""
    path, skip = folder / "annotations" / f"instances_{split}.json", config.on_corrupt == "skip"
    found = read_annotations(path, folder / split, masks=masks, skip=skip)
    for problem in found.problems[:5]:
        print(f"skipped: {problem}", file=sys.stderr, flush=True)
    if len(found.problems) > 5:
        print(f"skipped: {len(found.problems) - 5} more in {split}", file=sys.stderr, flush=True)
    if split == "train2017" and (thin := found.degenerate):
        print(f"not trained on: {thin} boxes of {split} with less than a pixel on their image", file=sys.stderr)
    return found


class Boxes(Dataset[Any]):
    """Images as uint8 (3, H, W) with their targets; an item is asked for by its place and whether to mirror it."""

    def __init__(self, annotations: Annotations):
        self.annotations = annotations
        self.labels = {number: label for label, number in enumerate(annotations.category_ids, start=1)}

    def __len__(self) -> int:
        return len(self.annotations.pictures)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, Target] | Unreadable:
        place, mirror = item
        picture = self.annotations.pictures[place]
        try:
            image = read_image(picture.path, 3)
            if tuple(image.shape[1:]) != (picture.height, picture.width):
                image = read_image(picture.path, 3, upright=False)  # some annotate what is stored
        except DataError as error:
            return Unreadable(str(error))
        if tuple(image.shape[1:]) != (picture.height, picture.width):
            return Unreadable(
                f"{picture.path}: the image is {image.shape[2]} × {image.shape[1]} pixels, its annotation says "
                f"{picture.width} × {picture.height}"
            )
        target = self.target(picture)
        return flipped(image, target) if mirror else (image, target)

    def target(self, picture: Picture) -> Target:
        """What is on ``picture``: boxes cut to it, without crowds and what has less than a pixel on it."""
        cut = [(o, clipped(o["bbox"], picture.width, picture.height)) for o in picture.objects]
        objects = [o for o, corners in cut if corners]
        target = {
            "boxes": torch.tensor([c for _, c in cut if c], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([self.labels[o["category_id"]] for o in objects], dtype=torch.int64),
            "image_id": torch.tensor(picture.id),
        }
        if all("segmentation" in o for o in objects):
            masks = torch.zeros(len(objects), picture.height, picture.width, dtype=torch.uint8)
            for at, o in enumerate(objects):
                masks[at] = torch.from_numpy(decode(o["segmentation"], picture.height, picture.width))
            target["masks"] = masks
        return target


def flipped(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """``image`` (C, H, W) and its ``target`` mirrored left to right."""
    width, corners = image.shape[-1], target["boxes"]
    mirrored = {
        **target,
        "boxes": torch.stack([width - corners[:, 2], corners[:, 1], width - corners[:, 0], corners[:, 3]], 1),
    }
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(-1)
    return image.flip(-1), mirrored


class Batches(Sampler[list[tuple[int, bool]]]):
    """Batches of places in a data set, each with whether to mirror it: wide images with wide ones, tall with tall.

    Images of one batch are padded to a common size, so mixing shapes would waste work. Seed and epoch decide all of
    it, so a resumed run sees what it would have seen; of several processes each takes its share of the same batches.
    """

    def __init__(self, pictures: Sequence[Picture], batch_size: int, *, flip: bool, seed: int, rank: int, world: int):
        self.wide = torch.tensor([p.width > p.height for p in pictures])
        self.batch_size, self.flip, self.seed, self.rank, self.world = batch_size, flip, seed, rank, world
        self.epoch = 0
        # where Lightning looks for set_epoch
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, len(self.wide) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        random = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.wide), generator=random)
        mirror = (torch.rand(len(self.wide), generator=random) < 0.5) & self.flip
        waiting: dict[bool, list[tuple[int, bool]]] = {True: [], False: []}
        batches = []
        for place in order.tolist():
            same = waiting[bool(self.wide[place])]
            same.append((place, bool(mirror[place])))
            if len(same) == self.batch_size:
                batches.append(same.copy())
                same.clear()
        # what is left of both kinds makes mixed batches, the last of them perhaps short
        left = waiting[True] + waiting[False]
        batches += [left[at : at + self.batch_size] for at in range(0, len(left), self.batch_size)]
        # no process may be left without one
        batches *= -(-self.world // len(batches))
        yield from batches[self.rank :: self.world][: len(self)]


class BoxData(ImageData):
    """Training and held-out images with targets; ``spec`` says the form in which a network gets them."""

    train: Boxes | None
    held_out: Boxes

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, mirrored and grouped by the seed and the epoch alone."""
        assert self.train is not None
        rank, world = self._place()
        pictures, config = self.train.annotations.pictures, self.config
        batches = Batches(pictures, config.batch_size, flip=bool(config.flip), seed=self.seed, rank=rank, world=world)
        # workers start before Lightning names the epoch to the sampler
        batches.set_epoch(self.first_epoch)
        return self._batches(self.train, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every held-out image once, in order; several processes take turns."""
        items = [(place, False) for place in self._share()]
        return self._batches(self.held_out, sampler=items, batch_size=self.config.batch_size)

    test_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Images from 0 to 1; the detectors resize and normalise them themselves."""
        pictures, targets = batch
        return [picture.float() / 255 for picture in pictures], targets

    def _batches(self, dataset: Boxes, **options: Any) -> DataLoader[Any]:
        workers = min(8, os.cpu_count() or 1) if self.config.workers is None else self.config.workers
        return DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=_together,
            persistent_workers=workers > 0,
            # of its own, or each epoch's loader would take a number from the run's
            generator=torch.Generator(),
            **options,
        )


def _together(samples: list[Any]) -> tuple[list[Tensor] | None, list[Target], list[Unreadable]]:
    good = [sample for sample in samples if not isinstance(sample, Unreadable)]
    bad = [sample for sample in samples if isinstance(sample, Unreadable)]
    return [image for image, _ in good] or None, [target for _, target in good], bad
