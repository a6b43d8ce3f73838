"""Channel gates of later papers: eSE, ASR, and the base of those on other statistics of a channel than its mean.

All take ``mask`` (N, ...), True where a position counts, so that padding does not influence the result. Sums run in
float32 or wider.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ecanet import ops
from ecanet.attention.base import GatedAttention
from ecanet.attention.gates import ChannelAttention, apply_linear
from ecanet.attention.others import check_input
from ecanet.errors import check_positive_int


class ESE(ChannelAttention):
    """Effective squeeze-and-excitation of VoVNetV2 (Lee and Park, CVPR 2020, arXiv 1911.06667): ``h(W p + b)``.

    There is one C x C matrix W, where SE has two narrow layers. h is the hard sigmoid ``min(max(z + 3, 0), 6) / 6`` of
    the authors' code; their paper calls it a sigmoid.

    >>> sum(p.numel() for p in ESE(64).parameters())
    4160

    Raises:
        ConfigError: ``channels`` is not positive.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.fc = nn.Linear(channels, channels)

    def gate(self, p: Tensor) -> Tensor:
        """Return the hard sigmoid of ``W p + b``."""
        # Not F.hardsigmoid, whose gradient is rounded to float32 even in float64.
        return (apply_linear(self.fc, p) + 3).clamp(0, 6) / 6

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the matrix and the bias: h(0) is 1/2."""
        return self.fc.parameters()


class ASR(ChannelAttention):
    """Attention-alike structural re-parameterization (Huang et al., ECCV 2024, arXiv 2304.06345), with SE's two layers.

    The factors are ``sigmoid(W2 relu(W1 v + b1) + b2)`` of a learned vector v, and do not depend on the input. So a
    trained ASR is one number for each channel, which `ecanet.slim` moves into the layer before it: nothing is left at
    inference. As in the authors' code the layers have biases, and v begins at 0.1.

    >>> sum(p.numel() for p in ASR(64).parameters())
    644

    Raises:
        ConfigError: ``channels`` or ``reduction`` is not positive.
    """

    reads_means = False

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__(channels)
        hidden = max(1, channels // check_positive_int("reduction", reduction))
        self.vector = nn.Parameter(torch.empty(channels))
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the vector to 0.1, as the authors' code does."""
        self.vector.fill_(0.1)

    def gate(self, p: Tensor) -> Tensor:
        """Return the same weights for each image: ``sigmoid(W2 relu(W1 v + b1) + b2)``."""
        hidden = apply_linear(self.fc1, self.vector.to(p.dtype)[None]).relu()
        return apply_linear(self.fc2, hidden).sigmoid().expand_as(p)

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the parameters of the second layer."""
        return self.fc2.parameters()


class StatisticsAttention(GatedAttention):
    """Scale each channel of (N, C, ...) by a gate on statistics of the channel that its mean does not give.

    A subclass defines ``measure(x, mask)``, from the input to the statistics (N, C) or (N, C, k) in float32 or wider,
    and ``gate(statistics)``, from these to weights (N, C). The factor is ``gain * gate(measure(x))``.
    """

    ranks: tuple[int, ...] = (2, 3, 4, 5)
    """Numbers of axes that an input may have."""

    highest: float = 1.0
    """The largest weight that the gate can give at a gain of 1."""

    def measure(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the statistics of each channel."""
        raise NotImplementedError

    def gate(self, statistics: Tensor) -> Tensor:
        """Return channel weights (N, C)."""
        raise NotImplementedError

    def weigh(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the factor of each channel: ``gain * gate(measure(x))``."""
        with ops.reference.disable_autocast(x):
            g = self.gate(self.measure(x, mask))
        return g if self.gain == 1 else self.gain * g

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``x`` times the factor of each channel, in ``x``'s dtype and memory format.

        Raises:
            ConfigError: ``x`` has other channels or axes than this module takes, or ``mask`` does not fit it.
        """
        check_input(self, x, mask, self.ranks)
        return ops.reference.scale(x, self.weigh(x, mask))


def list_spatial_axes(x: Tensor) -> list[int]:
    """Return the axes of ``x`` (N, C, ...) after the channels."""
    return list(range(2, x.dim()))


def count_positions(like: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the number of positions that count in each image of ``x`` (N, C, ...), at least 1, in ``like``'s dtype.

    The result is (N, 1), or without a mask a single number.
    """
    if mask is None:
        return like.new_full((), math.prod(x.shape[2:]))
    return mask.flatten(1).sum(1, keepdim=True).clamp(min=1).to(like.dtype)
