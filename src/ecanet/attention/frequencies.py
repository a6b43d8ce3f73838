"""The channel gate of FcaNet, which reads frequencies of a map where squeeze-and-excitation reads its mean."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ecanet import ops
from ecanet.attention.gates import apply_linear
from ecanet.attention.others import clear_padding, find_hidden_width
from ecanet.attention.statistics import StatisticsAttention, count_positions


class Fca(StatisticsAttention):
    """Multi-spectral channel attention of FcaNet (Qin et al., ICCV 2021, arXiv 2012.11879), on (N, C, H, W).

    f_c = mean_hw x_chw B_u(h) B_v(w),  y = x sigmoid(W2 relu(W1 f))        W1 is C // reduction wide

    B_k(h) = cos(pi k (h + 1/2) / H), times sqrt(2) if k > 0: components of the discrete cosine transform. The channels
    are 16 equal parts, and each part has one of the paper's 16 best pairs (u, v), which are frequencies of a 7 x 7 map.
    A map of side H has ``u * (H // 7)`` in their place, as in the authors' code, but at most its highest, H - 1. So
    maps of every size are taken; on a map of one position this is SE.

    The authors' code averages other sizes to a fixed one of 56, 28, 14 or 7, and sums where a mean stands here, divided
    by the square root of the number of positions: a constant factor, which the paper leaves out, and W1 absorbs.

    Raises:
        ConfigError: ``channels`` or ``reduction`` is not positive.
    """

    ROWS = (0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2)
    COLUMNS = (0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2)
    """The frequencies of each part of the channels, along the height and along the width."""

    ranks = (4,)

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__(channels)
        hidden = find_hidden_width(channels, reduction, least=1)
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, channels, bias=False)

    def measure(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return one frequency component of each channel (N, C); positions that do not count are zeros."""
        return compute_components(x, mask, self.ROWS, self.COLUMNS)

    def gate(self, statistics: Tensor) -> Tensor:
        """Return ``sigmoid(W2 relu(W1 f))``."""
        return apply_linear(self.fc2, apply_linear(self.fc1, statistics).relu()).sigmoid()

    def last_parameters(self) -> Iterable[Tensor]:
        """Return the parameters of the second layer."""
        return self.fc2.parameters()


@ops.record_as_one_node
def compute_components(x: Tensor, mask: Tensor | None, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """Return the component of `Fca` of each channel: (N, C, H, W) -> (N, C).

    With a mask, height and width are the numbers of rows and columns in which a position counts.
    """
    channels, height, width = x.shape[1:]
    part = torch.arange(channels, device=x.device) * len(rows) // channels
    wide = ops.reference.accumulation_dtype(x.dtype)
    if mask is None:
        inside = [torch.ones(1, side, dtype=torch.bool, device=x.device) for side in (height, width)]
    else:
        inside = [mask.any(2), mask.any(1)]
    every = torch.arange(7, device=x.device)
    along_height, along_width = (
        make_cosines(every, where, wide)[:, list(k)][:, part]  # 1 or N, C, H or W
        for k, where in zip((rows, columns), inside, strict=True)
    )
    by_row = clear_padding(x, mask).to(wide) @ along_width[..., None]  # N C H 1
    return (along_height[:, :, None] @ by_row)[..., 0, 0] / count_positions(by_row, x, mask)


def make_cosines(frequencies: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``B_k(h)`` of `Fca` (N, K, L) for K frequencies of 7 positions and the L positions of N maps.

    ``inside`` (N, L) is True at the positions that a map has.
    """
    length = inside.sum(1)[:, None]
    k = torch.minimum(frequencies * (length // 7).clamp(min=1), (length - 1).clamp(min=0))[..., None]  # N K 1
    steps = (2 * inside.cumsum(1) - 1)[:, None]  # N 1 L: 2 h + 1
    period = 4 * length.clamp(min=1)[..., None]
    # The product is reduced to one period in integers, because the cosine of a large float is not exact.
    cosines = (((k * steps) % period).to(dtype) * (2 * math.pi) / period).cos()
    return (1 + (math.sqrt(2) - 1) * (k > 0).to(dtype)) * cosines
