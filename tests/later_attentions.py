"""The attentions of later papers, how to make them for a test, and their equations as loops over single numbers."""

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from drawn_modules import draw
from ecanet.attention import ASR, ATTENTIONS, ELA, EMA, ESE, GCT, SRM, CoordinateAttention, Fca, SimAM

BUILD = {
    "asr": lambda: ASR(5, reduction=1),
    "ese": lambda: ESE(5),
    "gct": lambda: GCT(5),
    "srm": lambda: SRM(5),
    "fca": lambda: Fca(20, reduction=5),
    "simam": lambda: SimAM(5, e_lambda=0.1),
    "coord": lambda: CoordinateAttention(5),
    "ela": lambda: ELA(8),
    "ema": lambda: EMA(64),
}


def mark_slow(names: Iterable[str]) -> list[object]:
    """Return ``names`` as parameters of a test, those of later attentions but GCT and SRM with the slow mark."""
    quick = {"gct", "srm"} | set(ATTENTIONS) - set(BUILD)
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


PLANES = ("fca", "coord", "ela", "ema")
"""Attentions on (N, C, H, W) only."""
PAIRS = [(0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0), (5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3)]
PAIRS += [(3, 5), (2, 2)]
"""FcaNet's frequencies in height and in width, best first."""


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return draw(BUILD[name](), dtype)


def sigmoid(t: Tensor) -> Tensor:
    return 1 / (1 + (-t).exp())


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)


def normed(values: list[Tensor], weight: Tensor, bias: Tensor, eps: float, moments=None) -> list[Tensor]:
    """Return ``values`` less their mean and over their deviation, or those in ``moments``, scaled and shifted."""
    m, v = moments or (mean(values), mean([(x - mean(values)) ** 2 for x in values]))
    return [(x - m) / (v + eps) ** 0.5 * weight + bias for x in values]


def batch_normed(values: list[Tensor], norm: nn.BatchNorm1d, c: int) -> list[Tensor]:
    moments = None if norm.training else (norm.running_mean[c], norm.running_var[c])
    return normed(values, norm.weight[c], norm.bias[c], norm.eps, moments)


def places(x: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]


def scaled(x: Tensor, weight) -> Tensor:
    """Return ``x`` times ``weight(n, c, i, j)``, position by position."""
    n, c, h, w = x.shape
    each = [x[a, b, i, j] * weight(a, b, i, j) for a in range(n) for b in range(c) for i in range(h) for j in range(w)]
    return torch.stack(each).reshape(x.shape)


def asr_of(m: ASR, x: Tensor) -> Tensor:
    hidden = [sum(m.fc1.weight[h, k] * m.vector[k] for k in range(5)) + m.fc1.bias[h] for h in range(5)]
    hidden = [h if h > 0 else 0 * h for h in hidden]
    g = [sigmoid(sum(m.fc2.weight[c, h] * hidden[h] for h in range(5)) + m.fc2.bias[c]) for c in range(5)]
    return scaled(x, lambda n, c, i, j: g[c])


def ese_of(m: ESE, x: Tensor) -> Tensor:
    p = [[mean([x[n, c, i, j] for i, j in places(x)]) for c in range(5)] for n in range(len(x))]

    z = [[sum(m.fc.weight[c, k] * one[k] for k in range(5)) + m.fc.bias[c] for c in range(5)] for one in p]
    g = [[(v + 3) / 6 if -3 < v < 3 else float(v > 0) for v in one] for one in z]
    return scaled(x, lambda n, c, i, j: g[n][c])


def gct_of(m: GCT, x: Tensor) -> Tensor:
    g = []
    for n in range(len(x)):
        s = [m.alpha[c] * (sum(x[n, c, i, j] ** 2 for i, j in places(x)) + 1e-5) ** 0.5 for c in range(5)]
        length = (sum(one**2 for one in s) + 1e-5) ** 0.5
        z = [m.gamma[c] * 5**0.5 * s[c] / length + m.beta[c] for c in range(5)]
        g.append([1 + (v.exp() - (-v).exp()) / (v.exp() + (-v).exp()) for v in z])
    return scaled(x, lambda n, c, i, j: g[n][c])


def srm_of(m: SRM, x: Tensor) -> Tensor:
    g = []
    for c in range(5):
        z = []
        for n in range(len(x)):
            values = [x[n, c, i, j] for i, j in places(x)]
            deviation = mean([(v - mean(values)) ** 2 for v in values]) ** 0.5
            z.append(m.weight[c, 0] * mean(values) + m.weight[c, 1] * deviation)
        g.append([sigmoid(one) for one in batch_normed(z, m.norm, c)])
    return scaled(x, lambda n, c, i, j: g[c][n])


def cosine(k: int, at: int, side: int) -> float:
    k = min(k * max(1, side // 7), side - 1)
    return math.cos(math.pi * k * (at + 0.5) / side) * (math.sqrt(2) if k else 1)


def fca_of(m: Fca, x: Tensor) -> Tensor:
    (count, channels, height, width), g = x.shape, []
    for n in range(count):
        f = []
        for c in range(channels):
            u, v = PAIRS[c * 16 // channels]
            f.append(mean([x[n, c, i, j] * cosine(u, i, height) * cosine(v, j, width) for i, j in places(x)]))
        hidden = [sum(w * v for w, v in zip(row, f, strict=True)).clamp(min=0) for row in m.fc1.weight]
        g.append([sigmoid(sum(w * v for w, v in zip(row, hidden, strict=True))) for row in m.fc2.weight])
    return scaled(x, lambda n, c, i, j: g[n][c])


def simam_of(m: SimAM, x: Tensor) -> Tensor:
    def weight(n, c, i, j):
        values = [x[n, c, a, b] for a, b in places(x)]
        middle = mean(values)
        variance = mean([(v - middle) ** 2 for v in values])
        return sigmoid((x[n, c, i, j] - middle) ** 2 / (4 * (variance + m.e_lambda)) + 0.5)

    return scaled(x, weight)


def lines_of(x: Tensor) -> list[list[list[Tensor]]]:
    """Return the means of the rows and then of the columns, for each image and channel."""
    rows = [[[mean(list(row)) for row in plane] for plane in one] for one in x]
    columns = [[[mean(list(column)) for column in plane.T] for plane in one] for one in x]
    return [[r + c for r, c in zip(rs, cs, strict=True)] for rs, cs in zip(rows, columns, strict=True)]


def coord_of(m: CoordinateAttention, x: Tensor) -> Tensor:
    (count, channels, height, _), lines, f = x.shape, lines_of(x), []
    for k in range(8):
        w, b = m.reduce.weight[k, :, 0], m.reduce.bias[k]
        z = [sum(w[c] * one[c][at] for c in range(channels)) + b for one in lines for at in range(len(lines[0][0]))]
        f.append([v * (v + 3).clamp(0, 6) / 6 for v in batch_normed(z, m.norm, k)])
    per_image = len(f[0]) // count

    def weight(n, c, i, j):
        row = sum(m.rows.weight[c, k, 0] * f[k][n * per_image + i] for k in range(8)) + m.rows.bias[c]
        column = sum(m.columns.weight[c, k, 0] * f[k][n * per_image + height + j] for k in range(8))
        return sigmoid(row) * sigmoid(column + m.columns.bias[c])

    return scaled(x, weight)


def ela_of(m: ELA, x: Tensor) -> Tensor:
    (count, channels, height, _), lines = x.shape, lines_of(x)

    def weigh(values: list[list[Tensor]]) -> list[list[Tensor]]:
        """One image's lines (C, L): a convolution in each channel, a norm over each of the 8 groups, a sigmoid."""
        found = []
        for c, line in enumerate(values):
            taps, z = m.conv.weight[c, 0], []
            for at in range(len(line)):
                near = [(t, at + t - 3) for t in range(7) if 0 <= at + t - 3 < len(line)]
                z.append(sum(taps[t] * line[where] for t, where in near))
            found.append([sigmoid(v) for v in normed(z, m.norm.weight[c], m.norm.bias[c], m.norm.eps)])
        return found

    rows = [weigh([lines[n][c][:height] for c in range(channels)]) for n in range(count)]
    columns = [weigh([lines[n][c][height:] for c in range(channels)]) for n in range(count)]
    return scaled(x, lambda n, c, i, j: rows[n][c][i] * columns[n][c][j])


def ema_of(m: EMA, x: Tensor) -> Tensor:
    """32 groups of 2 channels."""
    (count, _, height, width), lines, gates = x.shape, lines_of(x), {}
    w, b = m.conv1x1.weight[..., 0], m.conv1x1.bias
    for n, group in ((n, group) for n in range(count) for group in range(32)):
        one, line = x[n, 2 * group :][:2], lines[n][2 * group :][:2]
        g = [[sigmoid(sum(w[o, k] * line[k][at] for k in range(2)) + b[o]) for at in range(height + width)]
             for o in range(2)]  # fmt: skip
        a, c = [], []
        for o in range(2):
            plane = [one[o, i, j] * g[o][i] * g[o][height + j] for i, j in places(x)]
            a.append(normed(plane, m.norm.weight[o], m.norm.bias[o], m.norm.eps))
            c.append([window_sum(m.conv3x3.weight[o], one, i, j) + m.conv3x3.bias[o] for i, j in places(x)])
        shares = [[mean(plane).exp() for plane in planes] for planes in (a, c)]
        for number, at in enumerate(places(x)):
            mixed = [sum(s * plane[number] for s, plane in zip(part, planes, strict=True)) / sum(part)
                     for part, planes in zip(shares, (c, a), strict=True)]  # fmt: skip
            gates[n, group, at] = sigmoid(sum(mixed))
    return scaled(x, lambda n, c, i, j: gates[n, c // 2, (i, j)])


def window_sum(kernel: Tensor, x: Tensor, i: int, j: int) -> Tensor:
    """Return one output of a 3x3 convolution of ``x`` (C, H, W) with ``kernel`` (C, 3, 3)."""
    inside = [(a, b) for a in range(3) for b in range(3)
              if 0 <= i + a - 1 < x.shape[1] and 0 <= j + b - 1 < x.shape[2]]  # fmt: skip
    return sum((kernel[:, a, b] * x[:, i + a - 1, j + b - 1]).sum() for a, b in inside)


LOOPS = {
    "asr": asr_of,
    "ese": ese_of,
    "gct": gct_of,
    "srm": srm_of,
    "fca": fca_of,
    "simam": simam_of,
    "coord": coord_of,
    "ela": ela_of,
    "ema": ema_of,
}
