"""Channel gates of later papers: eSE, ASR, and two on other statistics of a channel than its mean (GCT, SRM).

All take ``mask`` (N, ...), True where a position counts, so that padding does not influence the result. Sums run in
float32 or wider.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ecanet import ops
from ecanet.attention.base import GatedAttention, zero
from ecanet.attention.gates import ChannelAttention, apply_linear
from ecanet.attention.others import check_input, clear_padding
from ecanet.errors import ConfigError, check_positive_int


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


class GCT(StatisticsAttention):
    """Gated channel transformation (Yang et al., CVPR 2020, arXiv 1909.11519): channels compete by their l2 norms.

    s_c = alpha_c sqrt(sum_j x_cj^2 + e),  t_c = sqrt(C) s_c / sqrt(sum_c s_c^2 + e),  y = x (1 + tanh(gamma t + beta))

    e is 1e-5. The authors' code divides by sqrt(mean_c s_c^2 + e), which is the same but for the size of e. gamma and
    beta start at 0, as there, so a new GCT is the identity. Its authors propose no weight decay for beta.

    >>> sum(p.numel() for p in GCT(64).parameters())
    192

    Raises:
        ConfigError: ``channels`` is not positive.
    """

    EPSILON = 1e-5
    highest = 2.0

    def __init__(self, channels: int):
        super().__init__(channels)
        self.alpha = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to their first values."""
        self.alpha.fill_(1)
        zero(self.last_parameters())

    def measure(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the l2 norm of each channel (N, C)."""
        return compute_norms(x, mask, self.EPSILON)

    def gate(self, statistics: Tensor) -> Tensor:
        """Return ``1 + tanh(gamma t + beta)``, between 0 and 2."""
        alpha, gamma, beta = (w.to(statistics.dtype) for w in (self.alpha, self.gamma, self.beta))
        s = alpha * statistics
        t = s * (math.sqrt(self.channels) / (s.square().sum(1, keepdim=True) + self.EPSILON).sqrt())
        return 1 + (gamma * t + beta).tanh()

    def last_parameters(self) -> Iterable[Tensor]:
        """Return gamma and beta."""
        return (self.gamma, self.beta)

    def neutralize(self) -> None:
        """Make this module the identity: zero gamma and beta. The gain stays 1, the paper's form."""
        zero(self.last_parameters())
        self.gain = 1.0


class SRM(StatisticsAttention):
    """Style-based recalibration (Lee et al., ICCV 2019, arXiv 1903.10829): a gate on each channel's mean and deviation.

    z_c = w_c1 mean(x_c) + w_c2 std(x_c),  y = x sigmoid(norm(z))        norm is a batch norm

    std divides by the number of positions, as the paper's equation does, so it is 0 on maps of one position. The
    authors' code divides by one position less. There w starts at 0, here uniformly from ±1/sqrt(2): a lossless gate
    has a norm of weight 0, and together with w = 0 it would never learn. Training needs more than one image.

    >>> sum(p.numel() for p in SRM(64).parameters())
    256

    Raises:
        ConfigError: ``channels`` is not positive.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weight = nn.Parameter(torch.empty(channels, 2))
        self.norm = nn.BatchNorm1d(channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights of mean and deviation anew."""
        self.weight.uniform_(-(2**-0.5), 2**-0.5)

    def measure(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return mean and standard deviation of each channel (N, C, 2)."""
        return compute_styles(x, mask)

    def gate(self, statistics: Tensor) -> Tensor:
        """Return ``sigmoid(norm(z))``; the norm runs in the dtype of its own parameters.

        Raises:
            ConfigError: there is one image in training, where the norm would make every z zero.
        """
        if not ops.is_traced(statistics) and self.norm.training and statistics.shape[0] == 1:
            raise ConfigError("SRM trains on batches of two or more images, got 1; enlarge the batch, or call eval()")
        z = (statistics * self.weight.to(statistics.dtype)).sum(-1)
        return self.norm(z.to(self.norm.weight.dtype)).to(z.dtype).sigmoid()

    def last_parameters(self) -> Iterable[Tensor]:
        """Return weight and bias of the norm."""
        return self.norm.parameters()


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


@ops.record_as_one_node
def compute_norms(x: Tensor, mask: Tensor | None, epsilon: float) -> Tensor:
    """Return ``sqrt(sum x^2 + epsilon)`` over the positions that count: (N, C, ...) -> (N, C)."""
    squares = clear_padding(x, mask).to(ops.reference.accumulation_dtype(x.dtype)).square()
    axes = list_spatial_axes(x)
    return ((squares.sum(axes) if axes else squares) + epsilon).sqrt()


@ops.record_as_one_node
def compute_styles(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return mean and standard deviation over the positions that count: (N, C, ...) -> (N, C, 2)."""
    mean = ops.reference.squeeze(x, mask)
    axes = list_spatial_axes(x)
    if not axes:
        return torch.stack([mean, torch.zeros_like(mean)], dim=-1)
    centred = clear_padding(x.to(mean.dtype) - mean.reshape(mean.shape + (1,) * len(axes)), mask)
    variance = centred.square().sum(axes) / count_positions(mean, x, mask)
    # Channels may be constant, after a ReLU for example, and the square root has no derivative at 0: take none there.
    varies = variance > 0
    deviation = torch.where(varies, torch.where(varies, variance, 1).sqrt(), 0)
    return torch.stack([mean, deviation], dim=-1)
