"""How images of classification are changed: in training at random, in evaluation to the network's size."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2  # pyright: ignore[reportMissingTypeStubs]
from torchvision.transforms.v2.functional import center_crop  # pyright: ignore[reportMissingTypeStubs]

from ecanet.data.folders import Transform
from ecanet.data.randomness import Draw, draw_uniform, use_sample_stream
from ecanet.data.sources import DataSpec
from ecanet.recipes import DataConfig

__all__ = [
    "Augmentation",
    "build_eval_transform",
    "build_train_transform",
    "choose_augmentation",
    "flip_images",
    "shift_images",
]

LONGEST = 16
"""Ratio of an image's sides beyond which evaluation cuts off its ends before it resizes it."""

Augmentation = Callable[[Tensor, list[Draw]], Tensor]
"""A function of a whole batch of images (N, C, H, W), and the draw of each."""


def choose_augmentation(config: DataConfig, seed: int) -> Augmentation | None:
    """Return the augmentation of a batch of small images, or None if ``config`` has none."""
    augment_one = cast(Transform, v2.RandAugment(magnitude=config.random_augment))

    def augment(images: Tensor, drawn: list[Draw]) -> Tensor:
        if config.crop_padding:
            images = shift_images(images, config.crop_padding, draw_uniform(seed, drawn, stream=0, count=2))
        if config.flip:
            images = flip_images(images, draw_uniform(seed, drawn, stream=1, count=1)[0])
        if not config.random_augment:
            return images
        changed: list[Tensor] = []
        for image, draw in zip(images, drawn, strict=True):
            with use_sample_stream(seed, draw.epoch, draw.image, draw.repeat):
                changed.append(augment_one(image))
        return torch.stack(changed)

    return augment if config.crop_padding or config.flip or config.random_augment else None


def build_train_transform(config: DataConfig, spec: DataSpec) -> Transform:
    """Return the transform of training: a random crop of ``spec.size`` pixels, mirrored and changed by ``config``."""
    mode = v2.InterpolationMode(spec.interpolation)
    transforms: list[v2.Transform] = [v2.RandomResizedCrop(spec.size, interpolation=mode, antialias=True)]
    if config.flip is not False:
        transforms.append(v2.RandomHorizontalFlip())
    if config.random_augment:
        transforms.append(v2.RandAugment(magnitude=config.random_augment))
    return cast(Transform, v2.Compose(transforms))


def build_eval_transform(spec: DataSpec) -> Transform:
    """Return the transform of evaluation: resize the short side to ``spec.size / spec.crop``, crop the center."""
    mode = v2.InterpolationMode(spec.interpolation)
    resize = v2.Resize(round(spec.size / spec.crop), interpolation=mode, antialias=True)
    return cast(Transform, v2.Compose([cut_ends, resize, v2.CenterCrop(spec.size)]))


def cut_ends(image: Tensor) -> Tensor:
    """Return the central part of a very long ``image`` (C, H, W), at most 16 times as long as wide; others unchanged.

    An image of 1 × 65,000 pixels would be resized to 256 × 16,640,000.
    """
    height, width = image.shape[1:]
    longest = LONGEST * min(height, width)
    if max(height, width) <= longest:
        return image
    return center_crop(image, [min(height, longest), min(width, longest)])


def shift_images(images: Tensor, padding: int, where: Tensor) -> Tensor:
    """Return images (N, C, H, W), each shifted by up to ``padding`` pixels along each axis.

    ``where`` has two numbers from 0 up to 1 for each image (2, N): 0 is the farthest shift down, or to the right. Zeros
    fill the border. With random numbers this equals a random crop after zero padding, independently for each image.
    """
    n, _, h, w = images.shape
    padded = F.pad(images, [padding] * 4)
    # The integers are found in float64 on the CPU: rounded to float32, a number below 1 may become 1.
    top, left = _send((where * (2 * padding + 1)).long(), images.device)[:, :, None]
    rows = top + torch.arange(h, device=images.device)  # N H
    columns = left + torch.arange(w, device=images.device)  # N W
    each = torch.arange(n, device=images.device)[:, None, None]
    # Advanced indices on both sides of a slice put the sliced axis last: N H W C.
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip_images(images: Tensor, chance: Tensor) -> Tensor:
    """Return images (N, C, H, W), flipped left to right where ``chance`` (N,), from 0 up to 1, is below 1/2."""
    flip = _send(chance < 0.5, images.device)[:, None, None, None]
    return torch.where(flip, images.flip(-1), images)


def _send(x: Tensor, device: torch.device) -> Tensor:
    """Return ``x`` on ``device``. The program does not wait for a GPU, which copies from pinned memory by itself."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
