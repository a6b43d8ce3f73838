"""The specification: what every faster path must equal, in plain PyTorch.

Sums run in float32 or wider, autocast is off, and the output has the input's dtype and memory format.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from ecanet.ops.tracing import is_traced, record_as_one_node

Gate = Callable[[Tensor], Tensor]
"""Maps channel means (N, C) to channel weights (N, C)."""

Activation = Literal["relu", "relu6"] | None
"""What ends a residual block; None is the identity."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` values run: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def disable_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves ``x``'s device alone (none when it is off: exports stay free of it)."""
    if is_traced(x):
        return nullcontext()
    kind = x.device.type
    enabled = kind != "meta" and torch.is_autocast_enabled(kind)  # asked about "meta", torch raises
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


@record_as_one_node
def squeeze(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the spatial axes: (N, C, ...) -> (N, C), float32 or wider.

    With ``mask``, boolean and of shape (N, ...) like ``x`` without its channel axis, only True positions count;
    what stands at the others (padding, even NaN) has no influence. A sample without a True position gives 0.
    """
    axes = tuple(range(2, x.dim()))
    wide = accumulation_dtype(x.dtype)
    if mask is not None:
        inside = mask[:, None]
        total = torch.where(inside, x, 0).sum(axes, dtype=wide)
        return total / inside.sum(axes).clamp(min=1)
    return x.mean(axes, dtype=wide) if axes else x.to(wide)


@record_as_one_node
def scale(x: Tensor, g: Tensor) -> Tensor:
    """Multiply each channel of ``x`` (N, C, ...) by its weight in ``g`` (N, C); dtype and layout are ``x``'s."""
    g = g[(..., *(None,) * (x.dim() - 2))]  # N C 1 ...; no shape is asked for, so exports have none
    return (x.to(g.dtype) * g).to(x.dtype)


def squeeze_scale(x: Tensor, gate: Gate, mask: Tensor | None = None) -> Tensor:
    """``y = x * gate(mean(x))``: the three steps of channel attention on ``x`` (N, C, ...)."""
    with disable_autocast(x):
        return scale(x, gate(squeeze(x, mask)))


def residual_tail(
    z: Tensor,
    norm: nn.Module,
    gate: Gate | None = None,
    shortcut: Tensor | None = None,
    shortcut_norm: nn.Module | None = None,
    activation: Activation = "relu",
) -> Tensor:
    """``act(b * gate(mean(b)) + shortcut)`` with ``b = norm(z)``: what follows a block's last convolution.

    Without ``gate`` the factor, without ``shortcut`` the addend is left out; ``shortcut_norm`` is the norm of the
    shortcut's own convolution. In training the norms update their running statistics, once.
    """
    y = norm(z)
    if gate is not None:
        y = squeeze_scale(y, gate)
    if shortcut is not None:
        y = y + (shortcut if shortcut_norm is None else shortcut_norm(shortcut))
    match activation:
        case "relu":
            return y.relu() if y is z else y.relu_()
        case "relu6":
            return y.clamp(0, 6)
        case _:
            return y
