"""Attention between positions: the non-local block, double attention (A2), attention-augmented convolution.

These do not belong at the end of a branch; `ecanet.models.placement` has their places. A non-local block compares all
pairs of the L positions, so it needs small feature maps.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecanet import ops
from ecanet.attention.base import Attention, zero
from ecanet.attention.others import check_input, flatten_positions, mask_logits
from ecanet.errors import AttachError, ConfigError, check_positive_int


class NonLocal(Attention):
    """Non-local block, embedded Gaussian (Wang et al. 2018): every position attends to every other.

    y_i = x_i + Wz sum_j softmax_j(theta(x_i) . phi(x_j)) g(x_j)            theta, phi, g are C // 2 wide

    Wz starts at zero, so a new block is the identity, as its paper proposes.

    >>> sum(p.numel() for p in NonLocal(64).parameters())
    8192

    Raises:
        ConfigError: ``channels`` is not positive.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = check_positive_int("channels", channels)
        hidden = max(1, channels // 2)
        self.theta = nn.Conv1d(channels, hidden, 1, bias=False)
        self.phi = nn.Conv1d(channels, hidden, 1, bias=False)
        self.g = nn.Conv1d(channels, hidden, 1, bias=False)
        self.out = nn.Conv1d(hidden, channels, 1, bias=False)
        self.neutralize()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, C, ...) to the same shape; no position attends to padding, where ``mask`` is False.

        Raises:
            ConfigError: ``x`` has other channels, or ``mask`` does not fit it.
        """
        check_input(self, x, mask)
        points = flatten_positions(x, mask)  # N C L
        query, key, value = (layer(points).transpose(-2, -1) for layer in (self.theta, self.phi, self.g))  # N L C/2
        keep = make_key_mask(points, mask)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=keep, scale=1.0)
        return x + self.out(seen.transpose(-2, -1)).reshape(x.shape).to(x.dtype)

    def neutralize(self) -> None:
        """Make this module the identity: zero the last layer, so that nothing is added."""
        zero(self.out.parameters())


@ops.record_as_one_node
def make_key_mask(points: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the mask (N, 1, L) to add to the logits of the keys in ``points`` (N, C, L)."""
    return None if mask is None else mask_logits(points.new_zeros(points.shape[0], 1, points.shape[2]), mask)


class DoubleAttention(Attention):
    """Double attention block, A2 (Chen et al. 2018): gather features into descriptors, then distribute them.

    G = A softmax_j(B)^T (gather),  z_i = G softmax_n(V_i) (distribute),  y = x + Wz z      A, B, V: C // 2 channels

    A = Wa x, B = Wb x, V = Wv x. With C // 2 channels, the 5 blocks of its ResNet-50 have the 7.3M parameters that its
    paper lists.
    Wz starts at zero, so a new block is the identity.

    Raises:
        ConfigError: ``channels`` is not positive.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = check_positive_int("channels", channels)
        hidden = max(1, channels // 2)
        self.features = nn.Conv1d(channels, hidden, 1, bias=False)
        self.gather = nn.Conv1d(channels, hidden, 1, bias=False)
        self.distribute = nn.Conv1d(channels, hidden, 1, bias=False)
        self.out = nn.Conv1d(hidden, channels, 1, bias=False)
        self.neutralize()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, C, ...) to the same shape; nothing is gathered from padding, where ``mask`` is False.

        Raises:
            ConfigError: ``x`` has other channels, or ``mask`` does not fit it.
        """
        check_input(self, x, mask)
        points = flatten_positions(x, mask)  # N C L
        where = mask_logits(self.gather(points), mask).softmax(-1)  # N n L: one map over positions for each descriptor
        descriptors = self.features(points) @ where.transpose(-2, -1)  # N m n
        z = descriptors @ self.distribute(points).softmax(1)  # N m L: each position mixes the descriptors
        return x + self.out(z).reshape(x.shape).to(x.dtype)

    def neutralize(self) -> None:
        """Make this module the identity: zero the last layer, so that nothing is added."""
        zero(self.out.parameters())


class AugmentedConv2d(Attention):
    """Attention-augmented 3x3 convolution (Bello et al. 2019): part of the channels come from self-attention.

    y = [conv3x3(x); Wo [O_1; ... O_heads]],  O_h = softmax((q k^T + S_height + S_width) / sqrt(d)) v

    with S_height[i, j] = q_i . r(row of j - row of i), S_width likewise over columns; r is learned, shared by heads.
    The sizes are those of its paper's ResNets: keys of 0.2 C channels, but at least 20 per head, values of 0.1 C, and 8
    heads. Attention runs on average-pooled maps of at most 14 x 14, which are then enlarged bilinearly.

    Raises:
        ConfigError: there are not more ``out_channels`` than ``heads``.
    """

    LARGEST = 14

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, heads: int = 8):
        super().__init__()
        self.in_channels = check_positive_int("in_channels", in_channels)
        self.channels = check_positive_int("out_channels", out_channels)
        self.stride, self.heads = stride, heads
        if check_positive_int("heads", heads) >= out_channels:
            raise ConfigError(f"heads must be fewer than the {out_channels} channels, got {heads}")
        depth = max(20, round(0.2 * out_channels / heads))  # of a key of one head
        values = heads * max(1, round(0.1 * out_channels / heads))
        self.conv = nn.Conv2d(in_channels, out_channels - values, 3, stride, padding=1, bias=False)
        self.qkv = nn.Conv2d(in_channels, 2 * heads * depth + values, 1, bias=False)
        self.out = nn.Conv2d(values, values, 1, bias=False)
        self.rows = nn.Parameter(torch.empty(2 * self.LARGEST - 1, depth))
        self.columns = nn.Parameter(torch.empty(2 * self.LARGEST - 1, depth))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the vectors of the relative positions anew; the convolutions are initialised by their own methods."""
        for vectors in (self.rows, self.columns):
            vectors.normal_().mul_(vectors.shape[1] ** -0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride).

        Raises:
            ConfigError: ``x`` is not (N, in_channels, H, W), or there is a ``mask``: a convolution has none.
        """
        if ops.is_traced(x):  # its rank and shape are not known, and a mask is None when the graph runs
            return self._augment(x)
        if mask is not None:
            raise ConfigError("an attention-augmented convolution takes no mask")
        self.check_float(x)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ConfigError(f"AugmentedConv2d takes (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        return self._augment(x)

    def _augment(self, x: Tensor) -> Tensor:
        local = self.conv(x)
        attended = self.out(attend(self.qkv(shrink(x, self.stride, self.LARGEST)), self.rows, self.columns, self.heads))
        return torch.cat([local, resize_like(attended, local)], dim=1)

    def neutralize(self) -> None:
        """Refuse: this module replaces a convolution.

        Raises:
            AttachError: always.
        """
        raise AttachError(
            "attention 'aa' replaces 3x3 convolutions, so it cannot be inserted losslessly; "
            "build the network with create_model(..., attention='aa')"
        )


@ops.record_as_one_node
def shrink(x: Tensor, stride: int, largest: int) -> Tensor:
    """Average ``x`` (N, C, H, W) by ``stride``, then halve it until neither side is longer than ``largest``."""
    if stride > 1:
        x = F.avg_pool2d(x, 3, stride, padding=1)
    while max(x.shape[2:]) > largest:
        x = F.avg_pool2d(x, 3, 2, padding=1)
    return x


@ops.record_as_one_node
def attend(qkv: Tensor, rows: Tensor, columns: Tensor, heads: int) -> Tensor:
    """Compute multi-head self-attention with relative positions: (N, 2 heads d + values, H, W) -> (N, values, H, W).

    ``qkv`` holds queries and keys of d channels a head, then the values. ``rows`` and ``columns`` (2 largest - 1, d)
    are the learned vectors for each distance in rows and in columns.
    """
    height, width = qkv.shape[2:]
    depth = rows.shape[1]
    sizes = [heads * depth, heads * depth, qkv.shape[1] - 2 * heads * depth]
    parts = cast(Sequence[Tensor], qkv.split(sizes, dim=1))  # pyright: ignore[reportUnknownMemberType]
    query, key, value = (split_heads(part, heads) for part in parts)  # N h L d
    grid = cast(Tensor, query.unflatten(2, (height, width)))  # N h H W d
    by_row = torch.einsum("nhyxd,yjd->nhyxj", grid, look_up_offsets(rows, height))
    by_column = torch.einsum("nhyxd,xjd->nhyxj", grid, look_up_offsets(columns, width))
    position = (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)  # N h L L
    if not ops.is_jit_tracing() and query.shape[0] == 0:
        # PyTorch's fused attention gives the mask no gradient then, and DDP would wait for it.
        weights = (query @ key.transpose(-2, -1) + position).softmax(-1)
        attended = weights @ value
    else:
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=position * depth**-0.5)
    return cast(Tensor, attended.transpose(-2, -1).flatten(1, 2).unflatten(2, (height, width)))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return ``x`` (N, heads d, H, W) as one sequence of L = H W vectors for each head: (N, heads, L, d)."""
    return cast(Tensor, x.flatten(2).unflatten(1, (heads, -1))).transpose(-2, -1)


@ops.record_as_one_node
def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` resized bilinearly to the height and width of ``like``, channels-last where ``like`` is.

    `torch.cat` of a contiguous and a channels-last tensor would be contiguous.
    """
    if x.shape[2:] != like.shape[2:]:
        x = F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
    if ops.find_mode_obstacle() is not None:  # torch.func cannot ask for the layout
        return x
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last) if last else x


def look_up_offsets(table: Tensor, size: int) -> Tensor:
    """Return ``table[j - i]`` for every i and j below ``size``: (2 * LARGEST - 1, d) -> (size, size, d)."""
    at = torch.arange(size, device=table.device)
    return table[at[None, :] - at[:, None] + table.shape[0] // 2]
