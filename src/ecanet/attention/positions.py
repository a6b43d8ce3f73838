"""Attentions that give each position a weight of its own: SimAM, coordinate attention, ELA and EMA.

The last three average along rows and along columns, so they take (N, C, H, W) only. All take ``mask`` (N, ...), True
where a position counts, so that padding does not influence the result.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecanet import ops
from ecanet.attention.base import Attention, GatedAttention
from ecanet.attention.others import check_input, clear_padding
from ecanet.errors import AttachError, ConfigError, check_positive_int


class SimAM(Attention):
    """SimAM (Yang et al., ICML 2021): each position is weighted by its distance from the channel's mean.

    y = x sigmoid((x - m)^2 / (4 (v + l)) + 1/2)        m, v: mean and variance of the channel; l is ``e_lambda``

    There are no parameters. The variance divides by the number of positions M, as in the paper's Eq. 5; the authors'
    code divides by M - 1. ``e_lambda`` is 1e-4 on CIFAR and 0.1 on ImageNet in the authors' runs.

    Raises:
        ConfigError: ``e_lambda`` is not a positive number.
    """

    fits_any_width = True

    def __init__(self, channels: int, *, e_lambda: float = 1e-4):
        super().__init__()
        self.channels = check_positive_int("channels", channels)
        given: object = e_lambda
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
            raise ConfigError(f"e_lambda must be a positive number, got {given!r}; the paper takes 1e-4 to 0.1")
        self.e_lambda = float(given)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, C, ...) to the same shape.

        Raises:
            ConfigError: ``x`` has other channels, or ``mask`` does not fit it.
        """
        check_input(self, x, mask)
        return weigh_by_distance(x, mask, self.e_lambda)

    def neutralize(self) -> None:
        """Refuse: its weights are at least sigmoid(1/2), and no parameter changes them.

        Raises:
            AttachError: always.
        """
        raise AttachError("SimAM has no parameter to zero, so it cannot be inserted losslessly; pass preserve=False")

    def extra_repr(self) -> str:
        """Return the channel count and lambda."""
        return f"{self.channels}, e_lambda={self.e_lambda:g}"


class CoordinateAttention(GatedAttention):
    """Coordinate attention (Hou et al., CVPR 2021, arXiv 2103.02907): a gate for each row and one for each column.

    f = hardswish(norm(W1 [mean_w x; mean_h x])),  y_chw = x_chw sigmoid(W_h f_h)_c sigmoid(W_w f_w)_c

    f has max(8, C // reduction) channels, as in the authors' code, at H + W places: first the rows, then the columns.
    The paper leaves the norm out of its equation; the code has a batch norm, and biases in all three layers.

    >>> sum(p.numel() for p in CoordinateAttention(64).parameters())
    1688

    Raises:
        ConfigError: ``channels`` or ``reduction`` is not positive.
    """

    def __init__(self, channels: int, reduction: int = 32):
        super().__init__(channels)
        hidden = max(8, channels // check_positive_int("reduction", reduction))
        self.reduce = nn.Conv1d(channels, hidden, 1)
        self.norm = nn.BatchNorm1d(hidden)
        self.rows = nn.Conv1d(hidden, channels, 1)
        self.columns = nn.Conv1d(hidden, channels, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to the same shape. In training, lines of padding enter the norm's statistics as zeros.

        Raises:
            ConfigError: ``x`` is not (N, C, H, W) with this module's channels, or ``mask`` does not fit it.
        """
        check_input(self, x, mask, ranks=(4,))
        lines = torch.cat([average_lines(x, mask, 3), average_lines(x, mask, 2)], dim=2)  # N C H+W
        f = F.hardswish(self.norm(self.reduce(lines)))
        rows = self.gain * self.rows(take_rows(f, x)).sigmoid()
        columns = self.gain * self.columns(take_columns(f, x)).sigmoid()
        return scale_lines(x, rows, columns)

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the parameters of the two layers before the sigmoids."""
        return (*self.rows.parameters(), *self.columns.parameters())


class ELA(GatedAttention):
    """Efficient local attention (Xu and Wan 2024, arXiv 2403.01123): as coordinate attention, without narrow layers.

    y_chw = x_chw sigmoid(norm(F mean_w x))_ch sigmoid(norm(F mean_h x))_cw

    F is a 1-D convolution of 7 places in each channel by itself, norm a group norm of 16 groups: the paper's ELA-B. The
    paper writes F_h and F_w; rows and columns share the weights here, as in the code that is known as ELA. Channel
    counts that 16 does not divide have as many groups as their greatest common divisor with 16.

    >>> sum(p.numel() for p in ELA(64).parameters())
    576

    Raises:
        ConfigError: ``channels`` is not positive.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.conv = nn.Conv1d(channels, channels, 7, padding=3, groups=channels, bias=False)
        self.norm = nn.GroupNorm(math.gcd(16, channels), channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to the same shape.

        Raises:
            ConfigError: ``x`` is not (N, C, H, W) with this module's channels, or ``mask`` does not fit it.
        """
        check_input(self, x, mask, ranks=(4,))
        rows, columns = (self._weigh_lines(x, mask, axis) for axis in (3, 2))
        return scale_lines(x, self.gain * rows, self.gain * columns)

    def _weigh_lines(self, x: Tensor, mask: Tensor | None, axis: int) -> Tensor:
        z, norm = self.conv(average_lines(x, mask, axis)), self.norm
        return normalize(z, norm.weight, norm.bias, norm.num_groups, norm.eps, find_lines(mask, axis - 1)).sigmoid()

    def last_parameters(self) -> Iterable[Tensor]:
        """Return weight and bias of the norm."""
        return self.norm.parameters()


class EMA(GatedAttention):
    """Efficient multi-scale attention (Ouyang et al., ICASSP 2023, arXiv 2305.13563): a gate for each position.

    The channels are G groups of d, which pass through the same layers. In each group, with its channels x (d, H, W):

    a = norm(x sigmoid(W1 mean_w x) sigmoid(W1 mean_h x)),  b = conv3x3(x)
    y = x sigmoid(sum_i softmax(mean_hw a)_i b_i + sum_i softmax(mean_hw b)_i a_i)

    norm takes each channel of each image by itself. G is 32, as in the authors' code, or the greatest common divisor of
    32 and the channels.

    >>> sum(p.numel() for p in EMA(64).parameters())
    48

    Raises:
        ConfigError: ``channels`` is not positive.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.groups = math.gcd(32, channels)
        d = channels // self.groups
        self.conv1x1 = nn.Conv1d(d, d, 1)
        self.norm = nn.GroupNorm(d, d)
        self.conv3x3 = nn.Conv2d(d, d, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to the same shape.

        Raises:
            ConfigError: ``x`` is not (N, C, H, W) with this module's channels, or ``mask`` does not fit it.
        """
        check_input(self, x, mask, ranks=(4,))
        groups = split_groups(clear_padding(x, mask), self.groups)  # N G, d, H, W
        inside = repeat_mask(mask, self.groups)
        rows, columns = (self.conv1x1(average_lines(groups, inside, axis)).sigmoid() for axis in (3, 2))
        a, norm = scale_lines(groups, rows, columns), self.norm
        a = normalize(a, norm.weight, norm.bias, norm.num_groups, norm.eps, inside)
        b = self.conv3x3(groups)
        logits = mix_channels(a, b, inside) + mix_channels(b, a, inside)  # N G, H, W
        return scale_groups(x, self.gain * logits.sigmoid(), self.groups)

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the parameters of the norm and of the 3x3 convolution: a and b are then 0, and so are the logits."""
        return (*self.norm.parameters(), *self.conv3x3.parameters())


@ops.record_as_one_node
def weigh_by_distance(x: Tensor, mask: Tensor | None, e_lambda: float) -> Tensor:
    """Return ``x`` with each position weighted as `SimAM` says, in ``x``'s dtype."""
    mean = ops.reference.squeeze(x, mask)
    shape = mean.shape + (1,) * (x.dim() - 2)
    wide = x.to(mean.dtype)
    squares = (wide - mean.reshape(shape)).square()
    variance = ops.reference.squeeze(squares, mask).reshape(shape)
    return (wide * (squares / (4 * (variance + e_lambda)) + 0.5).sigmoid()).to(x.dtype)


@ops.record_as_one_node
def average_lines(x: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    """Return the means of ``x`` (N, C, H, W) along ``axis``, 2 or 3, in ``x``'s dtype; 0 where no position counts."""
    wide = ops.reference.accumulation_dtype(x.dtype)
    if mask is None:
        return x.mean(axis, dtype=wide).to(x.dtype)
    count = mask[:, None].sum(axis).clamp(min=1)
    return (clear_padding(x, mask).sum(axis, dtype=wide) / count).to(x.dtype)


@ops.record_as_one_node
def find_lines(mask: Tensor | None, axis: int) -> Tensor | None:
    """Return which lines have a position that counts: ``mask`` (N, H, W) without its ``axis``, 1 or 2."""
    return None if mask is None else mask.any(axis)


@ops.record_as_one_node
def take_rows(f: Tensor, x: Tensor) -> Tensor:
    """Return the first H places of ``f`` (N, any, H + W), for ``x`` (N, C, H, W)."""
    return f[..., : x.shape[2]]


@ops.record_as_one_node
def take_columns(f: Tensor, x: Tensor) -> Tensor:
    """Return the last W places of ``f`` (N, any, H + W), for ``x`` (N, C, H, W)."""
    return f[..., x.shape[2] :]


@ops.record_as_one_node
def scale_lines(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return ``x`` (N, C, H, W) times ``rows`` (N, C, H) and ``columns`` (N, C, W), in ``x``'s dtype."""
    return (x * rows[..., None] * columns[:, :, None]).to(x.dtype)


@ops.record_as_one_node
def normalize(z: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, inside: Tensor | None) -> Tensor:
    """Return the group norm of ``z`` (N, C, ...), with mean and variance over the positions ``inside`` (N, ...)."""
    if inside is None:
        return F.group_norm(z, groups, weight, bias, eps)
    counts = inside[:, None, None].to(z.dtype)  # N 1 1 ...
    grouped = z.reshape(z.shape[0], groups, z.shape[1] // groups, *z.shape[2:])
    axes = list(range(2, grouped.dim()))
    total = (counts.sum(axes, keepdim=True) * grouped.shape[2]).clamp(min=1)
    centred = grouped - (grouped * counts).sum(axes, keepdim=True) / total
    variance = (centred.square() * counts).sum(axes, keepdim=True) / total
    shape = (-1, *(1,) * (z.dim() - 2))
    return (centred / (variance + eps).sqrt()).reshape(z.shape) * weight.reshape(shape) + bias.reshape(shape)


@ops.record_as_one_node
def split_groups(x: Tensor, groups: int) -> Tensor:
    """Return ``x`` (N, C, H, W) with each group of channels as an image of its own: (N G, C / G, H, W)."""
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])


@ops.record_as_one_node
def repeat_mask(mask: Tensor | None, groups: int) -> Tensor | None:
    """Return ``mask`` (N, H, W) for the images of `split_groups`: (N G, H, W)."""
    return None if mask is None else mask.repeat_interleave(groups, 0)


@ops.record_as_one_node
def mix_channels(shares: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of the channels of ``values`` (N, d, H, W), weighted by the softmax of the means of ``shares``.

    The result is (N, H, W).
    """
    weights = ops.reference.squeeze(shares, mask).to(values.dtype).softmax(1)  # N d
    return (weights[:, None] @ values.flatten(2)).reshape(values.shape[0], *values.shape[2:])


@ops.record_as_one_node
def scale_groups(x: Tensor, weights: Tensor, groups: int) -> Tensor:
    """Return ``x`` (N, C, H, W) times ``weights`` (N G, H, W), one for each position and group, in ``x``'s dtype."""
    each = weights.reshape(x.shape[0], groups, *weights.shape[1:]).repeat_interleave(x.shape[1] // groups, 1)
    return (x * each).to(x.dtype)
