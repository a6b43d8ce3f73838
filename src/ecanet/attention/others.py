"""The attentions of the paper's tables that need more than channel means: CBAM, the global context block, GSoP.

Each belongs at the end of a residual branch, as in its own paper. All take ``mask`` (N, ...), True where a position
counts, so that padding does not influence the result.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecanet import ops
from ecanet.attention.base import Attention, GatedAttention, zero
from ecanet.errors import ConfigError, check_positive_int


class CBAM(GatedAttention):
    """Convolutional block attention module (Woo et al. 2018), on (N, C, H, W): a channel gate, then a spatial one.

    u = x * sigmoid(mlp(mean_hw x) + mlp(max_hw x))             mlp(p) = W2 relu(W1 p), C // reduction wide
    y = u * sigmoid(conv7x7([mean_c u; max_c u]))

    There are no biases and no norm in the spatial gate, as in the printed equations.

    >>> sum(p.numel() for p in CBAM(64).parameters())
    610

    Raises:
        ConfigError: ``channels`` or ``reduction`` is not positive.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__(channels)
        hidden = find_hidden_width(channels, reduction, least=1)
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, channels, bias=False)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to the same shape.

        Raises:
            ConfigError: ``x`` is not (N, C, H, W) with this module's channels, or ``mask`` does not fit it.
        """
        check_input(self, x, mask, ranks=(4,))
        means = ops.reference.squeeze(x, mask).to(x.dtype)
        channel = self.channel_gate(means, compute_maxima(x, mask))[..., None, None]  # N C 1 1
        u = clear_padding(x, mask) * channel
        spatial = self.spatial_gate(torch.stack([u.mean(1), u.amax(1)], dim=1))  # N 1 H W
        return (x * (self.gain * channel) * (self.gain * spatial)).to(x.dtype)

    def channel_gate(self, means: Tensor, maxima: Tensor) -> Tensor:
        """Return channel weights (N, C) for means and maxima (N, C)."""
        return (self.fc2(self.fc1(means).relu()) + self.fc2(self.fc1(maxima).relu())).sigmoid()

    def spatial_gate(self, maps: Tensor) -> Tensor:
        """Return position weights (N, 1, H, W) for the mean and the maximum over channels (N, 2, H, W)."""
        return self.spatial(maps).sigmoid()

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the second layer of the MLP, and the 7x7 kernel."""
        return (self.fc2.weight, self.spatial.weight)


class GlobalContext(Attention):
    """Global context block (Cao et al. 2019): one attention-pooled vector per image, added to every position.

    y = x + W2 relu(norm(W1 sum_j a_j x_j)),  a = softmax_j(w . x_j)        W1 is C // reduction wide

    W2 starts at zero, so a new block is the identity, as in the authors' code. w has no bias: softmax cancels it.

    Raises:
        ConfigError: ``reduction`` leaves a single channel, whose layer norm would be constant.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.channels = check_positive_int("channels", channels)
        hidden = find_hidden_width(channels, reduction, least=2)
        self.key = nn.Conv1d(channels, 1, 1, bias=False)
        self.fc1 = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.neutralize()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, C, ...) to the same shape.

        Raises:
            ConfigError: ``x`` has other channels, or ``mask`` does not fit it.
        """
        check_input(self, x, mask)
        points = flatten_positions(x, mask)  # N C L
        weights = mask_logits(self.key(points), mask).softmax(-1)  # N 1 L
        context = (points @ weights.transpose(-2, -1))[..., 0]  # N C
        update = self.fc2(self.norm(self.fc1(context)).relu())
        return add_everywhere(x, update)

    def neutralize(self) -> None:
        """Make this module the identity: zero the last layer, so that nothing is added."""
        zero(self.fc2.parameters())


class GSoP(GatedAttention):
    """Global second-order pooling block (Gao et al. 2019): a channel gate from the covariance of channels.

    z = relu(norm(W1 x)),  S = cov(z) over positions (d, d),  y = x * sigmoid(W2 leaky(rows(norm(S))))

    ``rows`` is a grouped convolution that computes 4 numbers for each row of S, with separate weights for each row.
    ``width`` is d; the default is 128, as in its paper, but at most half of ``channels``.

    Raises:
        ConfigError: ``channels`` or ``width`` is not positive.
    """

    def __init__(self, channels: int, width: int | None = None):
        super().__init__(channels)
        d = max(1, min(128, channels // 2)) if width is None else check_positive_int("width", width)
        self.reduce = nn.Conv1d(channels, d, 1, bias=False)
        self.norm = nn.BatchNorm1d(d)
        self.row_norm = nn.BatchNorm1d(d)
        self.rows = nn.Conv1d(d, 4 * d, d, groups=d)
        self.fc = nn.Linear(4 * d, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, C, ...) to the same shape. In training, padding enters the norm's statistics as zeros.

        Raises:
            ConfigError: ``x`` has other channels, or ``mask`` does not fit it.
        """
        check_input(self, x, mask)
        z = self.norm(self.reduce(flatten_positions(x, mask))).relu()  # N d L
        rows = self.rows(self.row_norm(compute_covariance(z, mask)))[..., 0]  # N 4d
        g = self.gain * self.fc(F.leaky_relu(rows, 0.1)).sigmoid()
        return ops.reference.scale(x, g)

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the parameters of the layer before the sigmoid."""
        return self.fc.parameters()


@ops.record_as_one_node
def add_everywhere(x: Tensor, update: Tensor) -> Tensor:
    """Return ``x`` (N, C, ...) plus ``update`` (N, C) at every position, in ``x``'s dtype."""
    return x + update.reshape(update.shape + (1,) * (x.dim() - 2)).to(x.dtype)


@ops.record_as_one_node
def compute_covariance(z: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the covariance (N, d, d) of the rows of ``z`` (N, d, L) over the positions that count.

    It is divided by the number of these positions.
    """
    inside = z.new_ones(z.shape[0], 1, z.shape[2]) if mask is None else mask.flatten(1)[:, None].to(z.dtype)
    count = inside.sum(-1, keepdim=True).clamp(min=1)
    centred = (z - (z * inside).sum(-1, keepdim=True) / count) * inside
    return centred @ centred.transpose(-2, -1) / count


@ops.record_as_one_node
def clear_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` with zeros where ``mask`` is False, even over NaN."""
    return x if mask is None else torch.where(mask[:, None], x, 0)


@ops.record_as_one_node
def flatten_positions(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``clear_padding(x, mask)`` with one axis for all positions: (N, C, ...) -> (N, C, L)."""
    x = clear_padding(x, mask)
    return x.flatten(2) if x.dim() > 2 else x[..., None]


@ops.record_as_one_node
def mask_logits(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``logits`` (N, any, L) with the lowest finite value where ``mask`` (N, ...) is False."""
    if mask is None:
        return logits
    return logits.masked_fill(~mask.flatten(1)[:, None], torch.finfo(logits.dtype).min)


@ops.record_as_one_node
def compute_maxima(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the maximum over the spatial axes: (N, C, ...) -> (N, C); 0 where no position counts."""
    axes = [axis for axis in range(2, x.dim())]  # noqa: C416 - TorchScript has no list(range(...))
    if mask is None:
        return x.amax(axes)
    inside = mask[:, None]
    return torch.where(inside.flatten(2).any(-1), torch.where(inside, x, -torch.inf).amax(axes), 0)


def check_input(module: Attention, x: Tensor, mask: Tensor | None, ranks: tuple[int, ...] = (2, 3, 4, 5)) -> None:
    """Check that ``x`` has ``module``'s channels and one of ``ranks``, and that ``mask`` fits it.

    Raises:
        ConfigError: it does not.
    """
    if ops.is_traced(x):  # its rank and shape are not known
        return
    module.check_channels(x)
    ops.check_input(x, mask)
    if x.dim() not in ranks:
        raise ConfigError(f"{type(module).__name__} takes (N, C, H, W), got shape {tuple(x.shape)}")


def find_hidden_width(channels: int, reduction: int, *, least: int) -> int:
    """Return ``channels // reduction``, at least 1.

    Raises:
        ConfigError: the result is less than ``least``.
    """
    hidden = max(1, channels // check_positive_int("reduction", reduction))
    if hidden < least:
        raise ConfigError(
            f"reduction {reduction} leaves {hidden} of {channels} channels, but {least} are needed; "
            f"try reduction={max(1, channels // least)} or less"
        )
    return hidden
