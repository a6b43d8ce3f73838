"""Operations with one meaning and several implementations; ``reference.py`` is the meaning."""

from typing import Literal

import torch
from torch import Tensor

from ecanet.errors import ConfigError
from ecanet.ops import reference
from ecanet.ops.reference import Gate

__all__ = ["Gate", "Impl", "squeeze_scale"]

Impl = Literal["auto", "reference"]


def squeeze_scale(x: Tensor, gate: Gate, *, mask: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """``x * gate(mean(x))`` over the spatial axes of ``x`` (N, C, ...); see `reference.squeeze_scale`.

    Raises:
        ConfigError: ``impl`` is unknown, ``x`` is not a float tensor of 2 to 5 axes, or ``mask`` does not fit it.
    """
    check(x, mask)
    match impl:
        case "auto" | "reference":
            return reference.squeeze_scale(x, gate, mask)
        case _:
            raise ConfigError(f"unknown impl {impl!r}; choose 'auto' or 'reference'")


def check(x: Tensor, mask: Tensor | None) -> None:
    """Raise ConfigError unless ``x`` is (N, C[, L | H, W | D, H, W]) and ``mask`` is its boolean (N[, ...])."""
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
