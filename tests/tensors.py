"""Tensors for tests: their device, memory layouts, NaN around them, values with gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cpu"
"""Where the tests of kernels (marked ``gpu``) make their tensors: "cuda" with ``-m gpu`` on a machine that has one."""


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return normal numbers, drawn on the CPU, so that they are the same on every device."""
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE)


def noise(*shape: int) -> Tensor:
    """Return numbers between 0 and 1, always the same."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def value_and_gradients(function: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Return ``function(*inputs)`` and, for each input, the gradient of its product with ``dy``."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def to_layout(x: Tensor, channels_last: bool) -> Tensor:
    """Return ``x`` channels-last or contiguous. Only tensors of four or five axes can be channels-last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if channels_last and x.dim() in formats else x.contiguous()


def surround_with_nan(x: Tensor) -> Tensor:
    """Return a copy of ``x`` with NaN before and after it in memory, so that a kernel that reads too far shows NaN."""
    field = torch.full((x.numel() + 512,), float("nan"), dtype=x.dtype)
    inside = field[256 : 256 + x.numel()].as_strided(x.shape, x.stride(), 256)
    return inside.copy_(x)
