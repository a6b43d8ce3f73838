"""The inputs of an operation: their checks, and the memory layouts that its passes take."""

import torch
from torch import Tensor

from ecanet.errors import ConfigError

__all__ = ["check_input", "make_dense"]


def check_input(x: Tensor, mask: Tensor | None) -> None:
    """Check an input ``x`` (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W) and its mask.

    Raises:
        ConfigError: ``x`` has another rank or is not floating-point, or ``mask`` is not boolean or has another shape
            than ``x`` without its channel axis.
    """
    if not 2 <= x.dim() <= 5:
        raise ConfigError(f"expected (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ConfigError(f"expected a floating-point tensor, got {x.dtype}; convert it with x.float()")
    if mask is None:
        return
    if x.dim() == 2:
        raise ConfigError("mask= needs spatial axes to mask, but the input is (N, C)")
    expected = (x.shape[0], *x.shape[2:])
    if mask.shape != expected:
        raise ConfigError(f"mask must have shape {expected} for input {tuple(x.shape)}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        raise ConfigError(f"mask must be boolean (True = counts), got {mask.dtype}")


def make_dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return ``x`` contiguous or channels-last, a copy only if it is neither.

    With ``like``, the result has the layout of ``like``, which is one of the two.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if like is not None:
        last = x.dim() in formats and not like.is_contiguous()
        return x.contiguous(memory_format=formats[x.dim()]) if last else x.contiguous()
    if x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]):
        return x
    return x.contiguous()
