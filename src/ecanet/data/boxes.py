"""Images for detection, from any folder in COCO's layout: lists of images, and of one target per image.

A target is a dictionary as torchvision's detectors take it: ``boxes`` (N, 4) as left, top, right and bottom in pixels,
``labels`` (N,) counted from 1 in the order of the category ids, ``image_id``, and ``masks`` (N, H, W) where the
annotations have them. Crowds are in no target, but the evaluation uses them. Images without objects are kept: they
teach a detector what the background looks like.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ecanet.data.annotations import Annotations, Picture, clip_box, read_annotations
from ecanet.data.coco import decode_mask
from ecanet.data.module import IMAGENET_MEAN, IMAGENET_STD, DataModule, outlive_sigterm
from ecanet.data.pictures import Unreadable, read_image
from ecanet.data.samplers import GroupedBatchSampler
from ecanet.data.scenes import SPRITES, SceneConfig, make_scenes
from ecanet.data.sources import DataSpec
from ecanet.errors import ConfigError, DataError
from ecanet.recipes import DataConfig, suggestion

__all__ = ["DetectionData", "DetectionDataset", "Target", "flip_sample", "has_boxes", "load_boxes"]

Target = dict[str, Tensor]
LoadedBatch = tuple[list[Tensor], list[Target], list[Unreadable]]


def has_boxes(name: str) -> bool:
    """Return whether the data set ``name`` is one for detection, which `load_boxes` can load."""
    return name.startswith("coco:") or name.partition(":")[0] == "scenes"


def load_boxes(config: DataConfig, *, seed: int = 0, train: bool = True, masks: bool = True) -> "DetectionData":
    """Return the images and targets that ``config`` describes; with ``train=False`` only the held-out ones.

    Without ``masks`` the targets have boxes and labels only.

    Raises:
        ConfigError: the kind of scenes does not exist, or a setting has no meaning for detection.
        DataError: files are missing or broken.
    """
    for name in ("crop_padding", "random_augment", "eval_crop", "interpolation", "val_share", "sampler"):
        if getattr(config, name) != getattr(DataConfig(), name):
            raise ConfigError(f"data.{name} is for classification; images with boxes are only resized and flipped")
    folder = _find_folder(config)
    held_out = _read_split(config, folder, "val2017", masks)
    training = _read_split(config, folder, "train2017", masks) if train else None
    if training and training.class_names != held_out.class_names:
        raise DataError(f"{folder}: train2017 and val2017 have different categories; they must be the same")
    spec = DataSpec(
        class_names=held_out.class_names,
        channels=3,
        size=config.image_size or 800,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    dataset = DetectionDataset(training) if training else None
    return DetectionData(config, spec, dataset, DetectionDataset(held_out), seed=seed)


def _find_folder(config: DataConfig) -> Path:
    """Return the COCO folder that ``config`` names; scenes are generated if they do not exist."""
    kind, _, rest = config.name.partition(":")
    if kind == "coco":
        if config.root:
            raise ConfigError(f"--data-dir {config.root} has no meaning for {config.name}, which is a path")
        return Path(rest).expanduser()
    if rest and rest not in SPRITES:
        raise ConfigError(f"no scenes of {rest!r}; {suggestion(rest, list(SPRITES))}")
    # The scenes do not depend on the run's seed: runs with different seeds must see the same data.
    return make_scenes(SceneConfig(sprites=rest or SPRITES[0]), config.root)


def _read_split(config: DataConfig, folder: Path, split: str, masks: bool) -> Annotations:
    """Return one split of a COCO folder; print the first few skipped entries, and how many more there are."""
    path, skip = folder / "annotations" / f"instances_{split}.json", config.on_corrupt == "skip"
    annotations = read_annotations(path, folder / split, masks=masks, skip=skip)
    for problem in annotations.problems[:5]:
        print(f"skipped: {problem}", file=sys.stderr, flush=True)
    if len(annotations.problems) > 5:
        print(f"skipped: {len(annotations.problems) - 5} more in {split}", file=sys.stderr, flush=True)
    if split == "train2017" and (count := annotations.count_clipped_away()):
        print(f"not trained on: {count} boxes in {split} with less than a pixel inside their image", file=sys.stderr)
    return annotations


class DetectionDataset(Dataset[tuple[Tensor, Target] | Unreadable]):
    """Images as uint8 tensors (3, H, W) with their targets; an item's key is (index, whether to flip it)."""

    def __init__(self, annotations: Annotations):
        self.annotations = annotations
        self.labels = {number: label for label, number in enumerate(annotations.category_ids, start=1)}

    def __len__(self) -> int:
        return len(self.annotations.pictures)

    def __getitem__(self, index: tuple[int, bool]) -> tuple[Tensor, Target] | Unreadable:
        at, flip = index
        picture = self.annotations.pictures[at]
        expected = (picture.height, picture.width)
        try:
            image = read_image(picture.path, 3)
            if image.shape[1:] != expected:
                # Some data sets annotate the pixels as they are stored, without the EXIF orientation.
                image = read_image(picture.path, 3, upright=False)
        except DataError as error:
            return Unreadable(str(error))
        if image.shape[1:] != expected:
            return Unreadable(
                f"{picture.path}: the image is {image.shape[2]} × {image.shape[1]} pixels, its annotation says "
                f"{picture.width} × {picture.height}"
            )
        target = self.make_target(picture)
        return flip_sample(image, target) if flip else (image, target)

    def make_target(self, picture: Picture) -> Target:
        """Return the target of ``picture``: boxes clipped to the image, without those that lie outside it."""
        clipped = [(o, clip_box(o["bbox"], picture.width, picture.height)) for o in picture.objects]
        objects = [o for o, corners in clipped if corners]
        target = {
            "boxes": torch.tensor([corners for _, corners in clipped if corners], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([self.labels[o["category_id"]] for o in objects], dtype=torch.int64),
            "image_id": torch.tensor(picture.id),
        }
        segmentations = [o["segmentation"] for o in objects if "segmentation" in o]
        if len(segmentations) == len(objects):
            masks = torch.zeros(len(objects), picture.height, picture.width, dtype=torch.uint8)
            for at, segmentation in enumerate(segmentations):
                masks[at] = torch.as_tensor(decode_mask(segmentation, picture.height, picture.width))
            target["masks"] = masks
        return target


def flip_sample(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Return ``image`` (C, H, W) and its ``target`` flipped left to right."""
    width, corners = image.shape[-1], target["boxes"]
    flipped = {
        **target,
        "boxes": torch.stack([width - corners[:, 2], corners[:, 1], width - corners[:, 0], corners[:, 3]], 1),
    }
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return image.flip(-1), flipped


class DetectionData(DataModule):
    """Training and held-out images with targets; ``drawn`` has the images' ids in the annotations."""

    def __init__(
        self,
        config: DataConfig,
        spec: DataSpec,
        train: DetectionDataset | None,
        held_out: DetectionDataset,
        *,
        seed: int = 0,
    ):
        super().__init__(config, spec, seed=seed)
        self.train, self.held_out = train, held_out

    def count_images(self) -> int:
        """Return the number of training images."""
        return len(self.train) if self.train is not None else 0

    def name_images(self, drawn: Sequence[int]) -> list[str]:
        """Return the path of each image."""
        assert self.train is not None
        paths = {picture.id: str(picture.path) for picture in self.train.annotations.pictures}
        return [paths[number] for number in drawn]

    def train_dataloader(self) -> DataLoader[object]:
        """Return batches, and flips, that depend only on the seed and the epoch."""
        assert self.train is not None
        rank, world = self.get_rank()
        batches = GroupedBatchSampler(
            [picture.width > picture.height for picture in self.train.annotations.pictures],
            self.config.batch_size,
            flip=bool(self.config.flip),
            seed=self.seed,
            rank=rank,
            world=world,
        )
        # Lightning sets the later epochs, but in the first one the workers begin before it does.
        batches.begin(self.first_epoch, self.first_batch)
        return self._make_loader(self.train, batches=batches)

    def val_dataloader(self) -> DataLoader[object]:
        """Return batches of the held-out images in order; each image is evaluated by exactly one process."""
        items = [(index, False) for index in self.share_held_out(len(self.held_out))]
        return self._make_loader(self.held_out, items=items)

    test_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: LoadedBatch, dataloader_idx: int) -> tuple[list[Tensor], list[Target]]:
        """Return the images and targets after reporting the images that could not be read.

        Raises:
            DataError: an image could not be read, and ``on_corrupt`` is "error".
        """
        images, targets, unreadable = batch
        self.report_unreadable(unreadable)
        self.drawn = [int(target["image_id"]) for target in targets]
        return images, targets

    def on_after_batch_transfer(
        self, batch: tuple[list[Tensor], list[Target]], dataloader_idx: int
    ) -> tuple[list[Tensor], list[Target]]:
        """Return the images with values from 0 to 1; the detectors resize and normalize them themselves."""
        images, targets = batch
        return [image.float() / 255 for image in images], targets

    def _make_loader(
        self,
        dataset: DetectionDataset,
        *,
        batches: GroupedBatchSampler | None = None,
        items: list[tuple[int, bool]] | None = None,
    ) -> DataLoader[object]:
        workers = self.count_workers()
        return DataLoader(
            dataset,
            batch_size=1 if batches else self.config.batch_size,
            sampler=items,
            batch_sampler=batches,
            num_workers=workers,
            worker_init_fn=outlive_sigterm,
            collate_fn=_collate,
            persistent_workers=workers > 0,
            # Without its own generator, the loader would draw a seed for its workers from the run's random state.
            generator=torch.Generator(),
        )


def _collate(samples: Sequence[tuple[Tensor, Target] | Unreadable]) -> LoadedBatch:
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    return [image for image, _ in readable], [target for _, target in readable], unreadable
