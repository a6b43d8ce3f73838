"""Tolerances derived, not tuned: a result may be as far from a float64 oracle as its own rounding explains."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_within_budget(name: str, actual: Tensor, reference: Tensor, oracle: Tensor, roundings: int = 1) -> None:
    """``actual`` errs at most twice as much as ``reference`` (same dtype, plain arithmetic) plus some roundings.

    One rounding is that of the output. In float64 there is no wider oracle: pass the number of terms summed there.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    if not oracle.numel():
        return
    assert actual.isfinite().all(), f"{name}: not finite"
    rounding = roundings * torch.finfo(actual.dtype).eps * oracle.abs().max()
    budget = 2 * ((reference.double() - oracle).abs().max() + rounding)
    error = (actual.double() - oracle).abs().max()
    assert error <= budget, f"{name}: error {error:.2e} exceeds budget {budget:.2e}"


def value_and_gradients(function: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    """``function(*inputs)`` and the gradient of its product with ``dy`` in each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def layout(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` in the memory format asked for (rank 4 or 5; other ranks have one layout)."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if channels_last and x.dim() in formats else x.contiguous()
