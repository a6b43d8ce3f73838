"""The images that a network is made for, as its library says: size, normalization, crop; and ImageNet's classes."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from ecanet.models import LAYERS
from ecanet.networks.names import find_kind, find_library
from ecanet.recipes import Config, Limits

__all__ = ["Preprocessing", "detector_classes", "find_preprocessing", "image_size", "imagenet_classes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing(Config):
    """How an image becomes a network's input: resized so that its central crop is ``size`` pixels, then normalized.

    ``crop`` is the side of the crop as a share of the resized image's short side; ``mean`` and ``std`` are for pixel
    values from 0 to 1. ``interpolation`` is "bilinear", "bicubic" or "nearest". Three channels are
    red, green and blue, in this order; one channel is grey.
    """

    channels: int = 3
    size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 0.875
    interpolation: str = "bilinear"

    LIMITS: ClassVar[Limits] = {
        "channels": (1, 64),
        "size": (1, 4096),
        "mean": (-1e3, 1e3),
        "std": (1e-6, 1e3),
        "crop": (0.1, 2),
        "interpolation": (None, 32),
    }


def find_preprocessing(name: str) -> Preprocessing:
    """Return what the library of the network ``name`` says about its images.

    This library's networks, and those from a file, take ImageNet's usual 224 px, its small-image ResNets 32 px.
    """
    library, inner = find_library(name)
    if library == "timm":
        from timm.models import get_pretrained_cfg

        cfg = cast(Any, get_pretrained_cfg(inner)).to_dict()
        channels, size, _ = cfg["input_size"]
        shapes = {"channels": channels, "size": size, "crop": cfg["crop_pct"], "interpolation": cfg["interpolation"]}
        return Preprocessing(mean=tuple(cfg["mean"]), std=tuple(cfg["std"]), **shapes)
    if library == "torchvision":
        return _find_torchvision(inner)
    is_small = library == "" and inner in LAYERS and len(LAYERS[inner][1]) == 3
    return Preprocessing(size=32) if is_small else Preprocessing()


def image_size(name: str) -> tuple[int, int, int]:
    """Return the image size (channels, height, width) that the network ``name`` is made for."""
    found = find_preprocessing(name)
    return found.channels, found.size, found.size


def imagenet_classes() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes in the order of their labels, as torchvision has them.

    >>> imagenet_classes()[281]
    'tabby'
    """
    from torchvision.models import ResNet18_Weights

    return tuple(cast(dict[str, list[str]], ResNet18_Weights.DEFAULT.meta)["categories"])


def detector_classes(name: str) -> tuple[str, ...]:
    """Return the classes that the weights of torchvision's detector ``name`` know, by label from 1; COCO's.

    >>> detector_classes("torchvision:fcos_resnet50_fpn")[:2]
    ('person', 'bicycle')
    """
    from torchvision.models import WeightsEnum, get_model_weights  # pyright: ignore[reportUnknownVariableType]

    newest = list(cast(Iterable[WeightsEnum], get_model_weights(find_library(name)[1])))[-1]
    return tuple(cast(dict[str, list[str]], newest.meta)["categories"][1:])


def _find_torchvision(name: str) -> Preprocessing:
    from torchvision.models import WeightsEnum, get_model_weights  # pyright: ignore[reportUnknownVariableType]

    newest = list(cast(Iterable[WeightsEnum], get_model_weights(name)))[-1]
    values = cast(dict[str, Any], getattr(newest.transforms, "keywords", {}))  # functools.partial of the transform
    size, resized = values.get("crop_size"), values.get("resize_size", 256)
    if find_kind(f"torchvision:{name}") == "detection":
        # A detector resizes the short side itself: to 800, or to the number in its name.
        return Preprocessing(size=next((int(number) for number in re.findall(r"\d{3}", name)), 800), crop=1.0)
    if not isinstance(size, int):  # segmentation and video networks
        return Preprocessing()
    interpolation = values.get("interpolation")
    return Preprocessing(
        size=size,
        crop=size / resized,
        mean=tuple(values.get("mean", Preprocessing().mean)),
        std=tuple(values.get("std", Preprocessing().std)),
        interpolation="bilinear" if interpolation is None else interpolation.value,
    )
