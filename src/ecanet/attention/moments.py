"""Channel gates on the mean and the variance of each channel: GCT and SRM.

In a residual tail the passes over memory that a norm needs anyway compute these moments, so the gates add no pass.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ecanet import ops
from ecanet.attention.base import zero
from ecanet.attention.others import check_input, clear_padding
from ecanet.attention.statistics import StatisticsAttention, count_positions, list_spatial_axes
from ecanet.errors import ConfigError


class MomentsAttention(StatisticsAttention):
    """A gate on statistics that follow from mean and variance of each channel.

    A subclass also defines ``derive(mean, variance, positions)``, which returns what ``measure`` returns. So the
    passes over memory that compute these moments for a norm serve the gate too, and it adds none.
    """

    def derive(self, mean: Tensor, variance: Tensor, positions: int) -> Tensor:
        """Return the statistics of each channel from its moments (N, C), both float32 or wider."""
        raise NotImplementedError

    def weigh_moments(self, mean: Tensor, variance: Tensor, positions: int) -> Tensor:
        """Return the factor of each channel, as `weigh`, from its mean and biased variance over all positions."""
        g = self.gate(self.derive(mean, variance, positions))
        return g if self.gain == 1 else self.gain * g

    def describe_gate(self) -> ops.MomentsGate | None:
        """Return this gate as `ops` takes it; None if a subclass or somebody else has changed what it measures."""
        own, kind = vars(self), type(self)
        if kind.weigh is not StatisticsAttention.weigh or "weigh" in own or "measure" in own:
            return None
        owner = next(vars(one) for one in kind.__mro__ if "measure" in vars(one) or "derive" in vars(one))
        return ops.MomentsGate(self.weigh, self.weigh_moments) if "measure" in owner and "derive" in owner else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``x`` times the factor of each channel, in ``x``'s dtype and memory format.

        Raises:
            ConfigError: ``x`` has other channels or axes than this module takes, or ``mask`` does not fit it.
        """
        gate = self.describe_gate()
        # On a CPU the passes of `ops` gain on large maps only, by measurement, and lose up to half on small ones.
        if gate is None or not ops.uses_kernels(x, gated=True):
            return super().forward(x, mask)
        check_input(self, x, mask, self.ranks)
        return ops.squeeze_scale(x, gate, mask=mask)


class GCT(MomentsAttention):
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

    def derive(self, mean: Tensor, variance: Tensor, positions: int) -> Tensor:
        """Return the l2 norm: ``mean x^2 = variance + mean^2``, two positive terms."""
        return (positions * (variance + mean.square()) + self.EPSILON).sqrt()

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


class SRM(MomentsAttention):
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

    def derive(self, mean: Tensor, variance: Tensor, positions: int) -> Tensor:
        """Return mean and standard deviation of each channel (N, C, 2)."""
        return torch.stack([mean, compute_deviation(mean, variance)], dim=-1)

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
    return torch.stack([mean, compute_deviation(mean, variance)], dim=-1)


def compute_deviation(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the standard deviation of each channel (N, C), 0 where it is constant.

    Channels may be constant, after a ReLU for example. The square root has no derivative at 0, so none is taken there.
    """
    constant = ops.reference.find_constant_planes(mean, variance)
    return torch.where(constant, 0, torch.where(constant, 1, variance).sqrt())
