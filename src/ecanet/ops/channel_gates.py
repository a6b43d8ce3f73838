"""Gates whose weights a kernel can compute: a few taps on neighbouring channels, and a sigmoid.

ECA, SE-Var1, SE-Var2 and ECA-NS are of this form. Any other gate is a function that only PyTorch can run.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

from torch import Tensor
from torch.nn import functional as F

from ecanet.ops.reference import Gate

__all__ = ["ChannelGate", "compute_weights", "describe_gate", "sum_taps"]

MOST_TAPS = 16
"""The kernels compute gates with fewer taps. The paper's rule gives 9 taps for 65,536 channels."""


class ChannelGate(NamedTuple):
    """``gain * sigmoid(sum_j weight[j] p[c + j - K // 2] + bias)`` with K taps."""

    weight: Tensor | None
    """K numbers for all channels or, with ``own_taps``, C K numbers. None for one tap of 1."""
    bias: Tensor | None = None
    """One number."""
    taps: int = 1
    own_taps: bool = False
    circular: bool = False
    """Neighbours are counted around the end; else those that do not exist are 0."""
    gain: float = 1.0


def describe_gate(gate: Gate | None, channels: int) -> ChannelGate | None:
    """Return the form of ``gate`` if it is the ``weigh`` of a module that has one for these channels, else None.

    Such a module has a method ``describe_gate`` without arguments, which may return None too.
    """
    owner = getattr(gate, "__self__", None)
    describe = cast("Callable[[], ChannelGate | None] | None", getattr(owner, "describe_gate", None))
    if describe is None or getattr(owner, "weigh", None) != gate:
        return None
    form = describe()
    if form is None or form.taps >= MOST_TAPS or (form.circular and form.taps // 2 > channels):
        return None
    if form.weight is not None and form.weight.numel() != form.taps * (channels if form.own_taps else 1):
        return None  # PyTorch's own error says what does not fit
    return form


def compute_weights(p: Tensor, form: ChannelGate) -> Tensor:
    """Return the weights (N, C) for channel means ``p`` (N, C), in differentiable operations."""
    return form.gain * sum_taps(p, form).sigmoid()


def sum_taps(p: Tensor, form: ChannelGate) -> Tensor:
    """Return the sums (N, C) over the taps and the bias, of which the sigmoid is taken."""
    r = form.taps // 2
    padded = F.pad(p[:, None], (r, r), mode="circular")[:, 0] if form.circular else F.pad(p, (r, r))
    q = padded.unfold(1, form.taps, 1)  # N C K
    if form.weight is not None:
        weight = form.weight.to(p.dtype)
        q = q * (weight.reshape(-1, form.taps) if form.own_taps else weight.flatten())
    q = q.sum(-1)
    return q if form.bias is None else q + form.bias.to(p.dtype)
