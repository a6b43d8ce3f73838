"""Triton kernels of a residual tail that sum over planes. `kernels` says how tensors are read."""

# ruff: noqa: N803
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from ecanet.ops.triton.kernels import ALIGNED, NONE, affine, load_channels, passes_gradient

STAGES = tl.constexpr(3)
"""Tiles of `_moments` that are on their way from memory at the same time."""


@triton.jit
def _find_positions(start, first, positions, PLANES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the position in its plane of the elements of a tile, negative before it: (BLOCK_P, BLOCK_C or 1)."""
    p = (start + tl.arange(0, BLOCK_P))[:, None]
    if PLANES != ALIGNED:
        p -= ((first + tl.arange(0, BLOCK_C)) * positions % 8)[None, :]
    return p


@triton.jit
def _find_inside(p, first, end, channels, BLOCK_C: tl.constexpr):
    """Return which elements of a tile exist and belong to this program: (BLOCK_P, BLOCK_C)."""
    return (p >= 0) & (p < end) & (first + tl.arange(0, BLOCK_C) < channels)[None, :]


@triton.jit
def _load(
    ptr, n, start, end, first, channels, positions,
    LAST: tl.constexpr, PLANES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the elements of sample n from position ``start`` and channel ``first`` on, 0 where there are none."""
    ptr += n.to(tl.int64) * channels * positions
    c = first + tl.arange(0, BLOCK_C)
    inside = _find_inside(
        _find_positions(start, first, positions, PLANES, BLOCK_P, BLOCK_C), first, end, channels, BLOCK_C
    )
    p = (start + tl.arange(0, BLOCK_P))[:, None]
    if LAST:
        x = tl.load(ptr + (p * channels + c[None, :]), mask=inside, other=0.0)
    elif PLANES == ALIGNED:
        x = tl.load(ptr + (c[None, :] * positions + p), mask=inside, other=0.0)
    else:
        at = (c * positions // 8 * 8)[None, :] + p
        x = tl.load(ptr + at, mask=(at < channels * positions) & (c < channels)[None, :], other=0.0)
        x = tl.where(inside, x, 0.0)
    return x.to(WIDE)


@triton.jit
def _store(
    ptr, x, n, start, end, first, channels, positions,
    LAST: tl.constexpr, PLANES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the elements that `_load` returns."""
    ptr += n.to(tl.int64) * channels * positions
    c = (first + tl.arange(0, BLOCK_C))[None, :]
    p = _find_positions(start, first, positions, PLANES, BLOCK_P, BLOCK_C)
    inside = _find_inside(p, first, end, channels, BLOCK_C)
    at = p * channels + c if LAST else c * positions + p
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_bits(
    bits_ptr, n, start, end, first, channels, positions,
    LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return the sign bits of a tile as truth values (BLOCK_P, BLOCK_C)."""
    bit = 1 << tl.arange(0, 8)
    if LAST:
        width = (channels + 7) // 8
        p = (start + tl.arange(0, BLOCK_P))[:, None]
        byte = (first // 8 + tl.arange(0, BLOCK_C // 8))[None, :]
        bits_ptr += n.to(tl.int64) * width * positions
        eight = tl.load(bits_ptr + (p * width + byte), mask=(p < end) & (byte < width), other=0).to(tl.int32)
        passes = eight[:, :, None] & bit[None, None, :]
    else:
        width = (channels * positions + 7) // 8
        c = (first + tl.arange(0, BLOCK_C))[None, :]
        byte = c * positions // 8 + (start // 8 + tl.arange(0, BLOCK_P // 8))[:, None]
        bits_ptr += n.to(tl.int64) * width
        eight = tl.load(bits_ptr + byte, mask=(byte < width) & (c < channels), other=0).to(tl.int32)
        passes = eight[:, None, :] & bit[None, :, None]
    return tl.reshape(passes, [BLOCK_P, BLOCK_C]) != 0


@triton.jit
def _locate_column(channels, BLOCK_C: tl.constexpr):
    """Return sample and first channel of this program, and the number of samples; the second axis is that of parts.

    Successive programs read neighbours in memory.
    """
    across = tl.cdiv(channels, BLOCK_C)
    return tl.program_id(0) // across, tl.program_id(0) % across * BLOCK_C, tl.num_programs(0) // across


@triton.jit
def _moments(
    z_ptr, out_ptr, channels, positions, part, ORDER: tl.constexpr,
    LAST: tl.constexpr, PLANES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the mean and, if ORDER is 2, the biased variance of each part of a plane: (2, parts, N, C)."""
    n, top, samples = _locate_column(channels, BLOCK_C)
    split = tl.program_id(1)
    c = top + tl.arange(0, BLOCK_C)
    begin = split * part
    end = tl.minimum(begin + part, positions)
    # The variance is mean (x - K)^2 - (mean - K)^2 with K the mean of the first tile. (K - mean)^2 is at most
    # (positions / BLOCK_P) variances, so the difference loses no more than that factor of precision for any data.
    x = _load(z_ptr, n, begin, end, top, channels, positions, LAST, PLANES, BLOCK_P, BLOCK_C, WIDE)
    before = c * positions % 8 * (PLANES != ALIGNED)
    first = tl.sum(x, axis=0) / tl.minimum(BLOCK_P - before, end - begin)
    p = _find_positions(begin, top, positions, PLANES, BLOCK_P, BLOCK_C)
    distance = tl.where(_find_inside(p, top, end, channels, BLOCK_C), x - first[None, :], 0.0)
    total = distance
    square = distance * distance
    for start in tl.range(begin + BLOCK_P, end + 7 * PLANES, BLOCK_P, num_stages=STAGES):
        p = _find_positions(start, top, positions, PLANES, BLOCK_P, BLOCK_C)
        x = _load(z_ptr, n, start, end, top, channels, positions, LAST, PLANES, BLOCK_P, BLOCK_C, WIDE)
        distance = tl.where(_find_inside(p, top, end, channels, BLOCK_C), x - first[None, :], 0.0)
        total += distance
        if ORDER == 2:
            square += distance * distance
    count = end - begin
    shift = tl.sum(total, axis=0) / count
    at = (split.to(tl.int64) * samples + n) * channels + c
    tl.store(out_ptr + at, first + shift, mask=c < channels)
    if ORDER == 2:
        variance = tl.sum(square, axis=0) / count - shift * shift
        at += (samples * tl.num_programs(1)).to(tl.int64) * channels
        tl.store(out_ptr + at, tl.where(variance < 0, 0.0, variance), mask=c < channels)


@triton.jit
def _reduce(
    dy_ptr, second_dy_ptr, bits_ptr, z_ptr, s_ptr, t_ptr, a_ptr, b_ptr, mu_ptr, smu_ptr, sums_ptr,
    a_at, b_at, channels, positions, part, row,
    HAS_B: tl.constexpr, HAS_MU: tl.constexpr, NORMED_SHORTCUT: tl.constexpr, ACTIVATION: tl.constexpr,
    SECOND_DY: tl.constexpr, BITS: tl.constexpr, WRITE: tl.constexpr,
    LAST: tl.constexpr, PLANES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the sums of ``t (z - mu)``, ``t`` and ``t (s - smu)`` over each part of a plane, and ``t`` if WRITE.

    The sums are (2 or 3, parts, N, C).

    ``t`` is the gradient before the activation. The gradient after it is dy, or dy + second_dy if SECOND_DY. Without
    BITS the activation's sign is recomputed from z, as in `_apply`.
    """
    n, top, samples = _locate_column(channels, BLOCK_C)
    split = tl.program_id(1)
    c = top + tl.arange(0, BLOCK_C)
    at = n.to(tl.int64) * row
    recomputes: tl.constexpr = ACTIVATION != NONE and not BITS
    a = load_channels(a_ptr, at + a_at, c, channels, recomputes, WIDE)
    b = load_channels(b_ptr, at + b_at, c, channels, recomputes and HAS_B, WIDE)
    mu = load_channels(mu_ptr, 0, c, channels, HAS_MU, WIDE)
    smu = load_channels(smu_ptr, 0, c, channels, NORMED_SHORTCUT, WIDE)
    begin = split * part
    end = tl.minimum(begin + part, positions)
    da, db = tl.zeros([BLOCK_P, BLOCK_C], WIDE), tl.zeros([BLOCK_P, BLOCK_C], WIDE)
    ds = tl.zeros([BLOCK_P, BLOCK_C], WIDE)
    for start in range(begin, end + 7 * PLANES, BLOCK_P):
        t = _load(dy_ptr, n, start, end, top, channels, positions, LAST, PLANES, BLOCK_P, BLOCK_C, WIDE)
        if SECOND_DY:
            t += _load(second_dy_ptr, n, start, end, top, channels, positions, LAST, PLANES, BLOCK_P, BLOCK_C, WIDE)
        x = _load(z_ptr, n, start, end, top, channels, positions, LAST, PLANES, BLOCK_P, BLOCK_C, WIDE)
        if BITS:
            passes = _load_bits(bits_ptr, n, start, end, top, channels, positions, LAST, BLOCK_P, BLOCK_C)
            t = tl.where(passes, t, 0.0)
        elif ACTIVATION != NONE:
            t = tl.where(passes_gradient(affine(x, a, b, mu, HAS_B, HAS_MU), ACTIVATION), t, 0.0)
        if WRITE:
            _store(t_ptr, t, n, start, end, top, channels, positions, LAST, PLANES, BLOCK_P, BLOCK_C)
        if HAS_MU:
            x = x - mu  # where there is no element, t is 0
        da += t * x
        db += t
        if NORMED_SHORTCUT:
            s = _load(s_ptr, n, start, end, top, channels, positions, LAST, PLANES, BLOCK_P, BLOCK_C, WIDE)
            ds += t * (s - smu)
    out = (split.to(tl.int64) * samples + n) * channels + c
    kind = (samples * tl.num_programs(1)).to(tl.int64) * channels
    tl.store(sums_ptr + out, tl.sum(da, axis=0), mask=c < channels)
    tl.store(sums_ptr + kind + out, tl.sum(db, axis=0), mask=c < channels)
    if NORMED_SHORTCUT:
        tl.store(sums_ptr + 2 * kind + out, tl.sum(ds, axis=0), mask=c < channels)
