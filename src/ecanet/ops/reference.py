"""The specification in plain PyTorch: every faster implementation must give the same values and gradients.

Sums run in float32 or wider, autocast is off, and the output has the input's dtype and memory format.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ecanet.ops.tracing import is_traced, record_as_one_node


class MomentsGate(NamedTuple):
    """A gate on the mean and the variance of each plane, which the passes of a residual tail compute anyway."""

    weigh: Callable[[Tensor, Tensor | None], Tensor]
    """From ``x`` (N, C, ...) and a mask or None to channel weights (N, C): the specification."""
    weigh_moments: Callable[[Tensor, Tensor, int], Tensor]
    """From mean and biased variance of each plane (N, C), and its number of positions, to the same weights."""


Gate = Callable[[Tensor], Tensor] | MomentsGate
"""A function from channel means (N, C) to channel weights (N, C), or a gate that needs variances too."""

Activation = Literal["relu", "relu6"] | None
"""The activation at the end of a residual block; None is the identity."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums of ``dtype`` values: float64 for float64, float32 for all others.

    >>> accumulation_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.promote_types(dtype, torch.float32)


def disable_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast is off on ``x``'s device.

    Where autocast is off already the context does nothing, so that exported graphs contain no trace of it.
    """
    if is_traced(x):
        return nullcontext()
    kind = x.device.type
    enabled = kind != "meta" and torch.is_autocast_enabled(kind)  # PyTorch raises if the device is "meta"
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


@record_as_one_node
def squeeze(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over the spatial axes: (N, C, ...) -> (N, C), in float32 or wider.

    ``mask`` is boolean and has ``x``'s shape without the channel axis. Only positions where it is True count: values at
    the others (padding, even NaN) have no influence. A sample without a True position gives 0.
    """
    axes = [axis for axis in range(2, x.dim())]  # noqa: C416 - TorchScript has no list(range(...))
    wide = accumulation_dtype(x.dtype)
    if mask is not None:
        inside = mask[:, None]
        total = torch.where(inside, x, 0).sum(axes, dtype=wide)
        return total / inside.sum(axes).clamp(min=1)
    return x.mean(axes, dtype=wide) if axes else x.to(wide)


@record_as_one_node
def scale(x: Tensor, g: Tensor) -> Tensor:
    """Multiply each channel of ``x`` (N, C, ...) by its weight in ``g`` (N, C); keep ``x``'s dtype and layout."""
    for _ in range(x.dim() - 2):  # N C 1 ...; unlike reshape, this puts no shape into an exported graph
        g = g.unsqueeze(-1)
    if x.dtype == g.dtype:  # a conversion that changes nothing takes time, too
        return x * g
    return (x.to(g.dtype) * g).to(x.dtype)


def weigh(x: Tensor, gate: Gate, mask: Tensor | None = None) -> Tensor:
    """Return the channel weights (N, C) that ``gate`` gives for ``x`` (N, C, ...)."""
    return gate.weigh(x, mask) if isinstance(gate, MomentsGate) else gate(squeeze(x, mask))


def squeeze_scale(x: Tensor, gate: Gate, mask: Tensor | None = None) -> Tensor:
    """Return ``x * gate(mean(x))``, the three steps of channel attention on ``x`` (N, C, ...)."""
    with disable_autocast(x):
        return scale(x, weigh(x, gate, mask))


def find_constant_planes(mean: Tensor, variance: Tensor) -> Tensor:
    """Return where ``variance`` (N, C) is no more than the rounding of sums around ``mean`` can leave.

    A mean summed in this precision is off by a few eps. So the mean squared distance from it of equal values is not
    zero but up to ``(few eps mean)^2``. The deviation, its root, would have a gradient of 1 in a random direction.
    """
    return variance <= (8 * torch.finfo(mean.dtype).eps * mean).square()


def residual_tail(
    z: Tensor,
    norm: nn.Module,
    gate: Gate | None = None,
    shortcut: Tensor | None = None,
    shortcut_norm: nn.Module | None = None,
    activation: Activation = "relu",
) -> Tensor:
    """Return ``act(b * gate(mean(b)) + shortcut)`` with ``b = norm(z)``: what follows a block's last convolution.

    Without ``gate`` nothing is multiplied, without ``shortcut`` nothing is added. ``shortcut_norm`` is the norm of the
    shortcut's own convolution. In training the norms update their running statistics once.
    """
    y = norm(z)
    if gate is not None:
        y = squeeze_scale(y, gate)
    if shortcut is not None:
        y = y + (shortcut if shortcut_norm is None else shortcut_norm(shortcut))
    match activation:
        case "relu":
            return y.relu() if y is z else y.relu_()  # y is z where norm is the identity: the input must not change
        case "relu6":
            return y.clamp(0, 6)
        case _:
            return y
