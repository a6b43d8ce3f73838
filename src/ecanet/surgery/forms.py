"""The forms in which a module gives the factor of each channel, and how to read the factor off its output."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ecanet.surgery.recording import iterate_tensors

TOLERANCE = 1e-4
"""Largest relative difference that counts as rounding: the copy computes in float64, but may round inside."""


@dataclass(frozen=True)
class Form:
    """How a module gives its factor (N, C)."""

    returns: Literal["product", "planes", "flat", "input"]
    """The product x * factor; or the factor alone, as (N, C, 1, ...), as (N, C), or in the shape of x."""
    axis: int
    """The axis of the channels."""
    in_tuple: bool = False


def split(x: Tensor, y: object) -> tuple[Form, Tensor] | None:
    """Return how ``y`` holds a factor (N, C) for the planes of ``x``, and the factor; None if it does not."""
    if not isinstance(y, Tensor):
        found = next(filter(None, (split(x, t) for t in iterate_tensors(y))), None)
        return (Form(found[0].returns, found[0].axis, in_tuple=True), found[1]) if found else None
    if not y.is_floating_point() or x.dim() < 3:
        return None
    n, c = x.shape[:2]
    if y.shape == x.shape:
        for axis in dict.fromkeys((1, x.dim() - 1)):
            a, b = x.movedim(axis, 1).flatten(2), y.movedim(axis, 1).flatten(2)
            factor = ((a * b).sum(-1) / (a * a).sum(-1)).nan_to_num()
            if agree(factor[..., None] * a, b):
                return Form("product", axis), factor
        factor = y.flatten(2).mean(-1)
        return (Form("input", 1), factor) if agree(factor[..., None].expand_as(y.flatten(2)), y.flatten(2)) else None
    if y.shape == (n, c):
        return Form("flat", 1), y
    return (Form("planes", 1), y.flatten(1)) if y.shape == (n, c, *(1 for _ in x.shape[2:])) else None


def agree(a: Tensor, b: Tensor) -> bool:
    """Return whether ``a`` and ``b`` are equal up to rounding."""
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    eps, size = max(TOLERANCE, 4 * torch.finfo(b.dtype).eps), float(b.abs().max())
    return size < math.inf and float((a - b).abs().max()) <= eps * size
