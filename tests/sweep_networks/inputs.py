"""Inputs for other people's networks."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tensors import noise

Network = tuple[nn.Module, tuple[Any, ...]]
"""A network and its positional inputs."""
Builder = Callable[[], Network]

SIZES = (64, 96, 128, 224, 256, 299)


def image_for(model: nn.Module) -> Tensor:
    """Return two random images of the smallest size that ``model`` takes.

    Raises:
        RuntimeError: none will do.
    """
    wanted = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    for size in sorted({*SIZES, wanted[-1]}):
        image = noise(2, wanted[0], size, size)
        try:
            with torch.no_grad():
                copy.deepcopy(model).eval()(image)
                copy.deepcopy(model).train()(image)
        except Exception:  # too small, or not the size it was built for
            continue
        return image
    raise RuntimeError("no image size will do")


def pair_with_image(model: nn.Module) -> Network:
    """Return ``model`` and two images that it takes."""
    return model, (image_for(model),)


def strengthen(model: nn.Module) -> nn.Module:
    """Draw convolutions anew, so large that a signal reaches the end: some libraries' own are lost on the way."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
    return model
