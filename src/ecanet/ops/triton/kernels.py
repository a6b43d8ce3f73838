"""Triton kernels of a residual tail: two forward, two backward, for both memory layouts and all float dtypes.

A program computes a tile of BLOCK_P positions by BLOCK_C channels of one sample. `_moments` and `_reduce` loop over the
tiles of a plane, or of one of the parts into which a plane is split if there are few planes. Sums run in WIDE (float64
for float64, else float32) and in a fixed order, without atomics, so that a result is the same every time. Saved tensors
are never written.

LAST means channels-last: the channels of a position are neighbours in memory. Otherwise the positions of a channel are.

The activation's sign bits (1 where it passes the gradient on) are packed: one byte holds eight neighbouring channels of
a position. The bytes have shape (N, P, C / 8) if LAST, else (N, C / 8, P), so that a tile reads them in memory order.

Arguments ending in ``_ptr`` are tensors. ``a`` and ``b`` are (N, C) where ``row`` is C, and (C,) where it is 0, so that
all samples share them, and begin at ``a_at`` and ``b_at`` of their tensors. ``mu``, ``sa`` and ``smu`` (the shortcut's
a and mu) are (C,), as in `passes.Form`; ``sa`` begins at ``sa_at``.
"""

# ruff: noqa: N803
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

NONE, RELU, RELU6 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # ACTIVATION
PLAIN, NORMED = tl.constexpr(1), tl.constexpr(2)  # SHORTCUT; NONE without one


@triton.jit
def _offsets(n, p, c, channels, positions, LAST: tl.constexpr):
    """Return the offsets of the elements (n, p, c) of a tensor: (BLOCK_P, BLOCK_C)."""
    base = n.to(tl.int64) * channels * positions
    if LAST:
        return base + p[:, None] * channels + c[None, :]
    return base + c[None, :] * positions + p[:, None]


@triton.jit
def _byte_offsets(n, p, byte, channels, positions, LAST: tl.constexpr):
    """Return the offsets of the bytes for (n, p) and the channels 8 byte to 8 byte + 7: (BLOCK_P, BLOCK_C / 8)."""
    width = (channels + 7) // 8
    base = n.to(tl.int64) * width * positions
    if LAST:
        return base + p[:, None] * width + byte[None, :]
    return base + byte[None, :] * positions + p[:, None]


@triton.jit
def _locate_tile(channels, positions, LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return sample, tile of positions and tile of channels of this program.

    Successive programs get tiles that are neighbours in memory.
    """
    across, along = tl.cdiv(channels, BLOCK_C), tl.cdiv(positions, BLOCK_P)
    program = tl.program_id(0)
    n = program // (across * along)
    rest = program % (across * along)
    if LAST:
        return n, rest // across, rest % across
    return n, rest % along, rest // along


@triton.jit
def _moments(
    z_ptr, out_ptr, channels, positions, part,
    ORDER: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the mean and, if ORDER is 2, the biased variance of each part of a plane: (2, parts, N, C)."""
    n, split = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = split * part
    end = tl.minimum(begin + part, positions)
    # The variance is mean (x - K)^2 - (mean - K)^2 with K the mean of the first tile. (K - mean)^2 is at most
    # (positions / BLOCK_P) variances, so the difference loses no more than that factor of precision for any data.
    p = begin + tl.arange(0, BLOCK_P)
    inside = (p < end)[:, None] & (c < channels)[None, :]
    x = tl.load(z_ptr + _offsets(n, p, c, channels, positions, LAST), mask=inside, other=0.0).to(WIDE)
    first = tl.sum(x, axis=0) / tl.minimum(BLOCK_P, end - begin)
    distance = tl.where(inside, x - first[None, :], 0.0)
    total = distance
    square = distance * distance
    for start in range(begin + BLOCK_P, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < end)[:, None] & (c < channels)[None, :]
        x = tl.load(z_ptr + _offsets(n, p, c, channels, positions, LAST), mask=inside, other=0.0).to(WIDE)
        distance = tl.where(inside, x - first[None, :], 0.0)
        total += distance
        if ORDER == 2:
            square += distance * distance
    count = end - begin
    shift = tl.sum(total, axis=0) / count
    at = (split.to(tl.int64) * tl.num_programs(0) + n) * channels + c
    tl.store(out_ptr + at, first + shift, mask=c < channels)
    if ORDER == 2:
        variance = tl.sum(square, axis=0) / count - shift * shift
        at += (tl.num_programs(0) * tl.num_programs(2)).to(tl.int64) * channels
        tl.store(out_ptr + at, tl.where(variance < 0, 0.0, variance), mask=c < channels)


@triton.jit
def _affine(
    x, a_ptr, b_ptr, mu_ptr, a, b, c, known, HAS_B: tl.constexpr, HAS_MU: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Return ``a (x - mu) + b`` with the coefficients at the offsets ``a``, ``b`` and ``c``."""
    if HAS_MU:
        x = x - tl.load(mu_ptr + c, mask=known, other=0.0).to(WIDE)[None, :]
    x = x * tl.load(a_ptr + a, mask=known, other=0.0).to(WIDE)[None, :]
    if HAS_B:
        x = x + tl.load(b_ptr + b, mask=known, other=0.0).to(WIDE)[None, :]
    return x


@triton.jit
def _passes_gradient(y, ACTIVATION: tl.constexpr):
    """Return where the activation passes the gradient on. ReLU passes it at NaN too, so that a NaN is not hidden."""
    if ACTIVATION == RELU6:
        return (y > 0) & (y < 6)
    return (y <= 0) == 0


@triton.jit
def _apply(
    z_ptr, s_ptr, y_ptr, bits_ptr, a_ptr, b_ptr, mu_ptr, sa_ptr, smu_ptr, a_at, b_at, sa_at, channels, positions, row,
    HAS_B: tl.constexpr, HAS_MU: tl.constexpr, SHORTCUT: tl.constexpr, ACTIVATION: tl.constexpr, BITS: tl.constexpr,
    LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store ``y = act(a (z - mu) + b + shortcut)`` and, with BITS, the activation's sign bits."""
    n, tile_p, tile_c = _locate_tile(channels, positions, LAST, BLOCK_P, BLOCK_C)
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < channels
    inside = (p < positions)[:, None] & known[None, :]
    at = n.to(tl.int64) * row + c
    here = _offsets(n, p, c, channels, positions, LAST)
    x = tl.load(z_ptr + here, mask=inside, other=0.0).to(WIDE)
    y = _affine(x, a_ptr, b_ptr, mu_ptr, at + a_at, at + b_at, c, known, HAS_B, HAS_MU, WIDE)
    if SHORTCUT != NONE:
        s = tl.load(s_ptr + here, mask=inside, other=0.0).to(WIDE)
        if SHORTCUT == NORMED:
            s = _affine(s, sa_ptr, sa_ptr, smu_ptr, c + sa_at, c, c, known, False, True, WIDE)
        y += s
    if ACTIVATION != NONE:
        y = tl.where(y <= 0, 0.0, y)
        if ACTIVATION == RELU6:
            y = tl.where(y >= 6, 6.0, y)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + here, y, mask=inside)
    if BITS:
        # The sign is that of the rounded output, as in PyTorch's ReLU, so that both pass the same gradients on.
        passes = (_passes_gradient(y.to(WIDE), ACTIVATION) & inside).to(tl.int32)
        eight = tl.reshape(passes, [BLOCK_P, BLOCK_C // 8, 8]) << tl.arange(0, 8)[None, None, :]
        byte = tile_c * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        where = (p < positions)[:, None] & (byte * 8 < channels)[None, :]
        at = _byte_offsets(n, p, byte, channels, positions, LAST)
        tl.store(bits_ptr + at, tl.sum(eight, axis=2).to(tl.uint8), mask=where)


@triton.jit
def _reduce(
    dy_ptr, second_dy_ptr, bits_ptr, z_ptr, s_ptr, t_ptr, a_ptr, b_ptr, mu_ptr, smu_ptr, sums_ptr,
    a_at, b_at, channels, positions, part, row,
    HAS_B: tl.constexpr, HAS_MU: tl.constexpr, NORMED_SHORTCUT: tl.constexpr, ACTIVATION: tl.constexpr,
    SECOND_DY: tl.constexpr, BITS: tl.constexpr, WRITE: tl.constexpr,
    LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the sums of ``t (z - mu)``, ``t`` and ``t (s - smu)`` over each part of a plane, and ``t`` if WRITE.

    The sums are (2 or 3, parts, N, C).

    ``t`` is the gradient before the activation. The gradient after it is dy, or dy + second_dy if SECOND_DY. Without
    BITS the activation's sign is recomputed from z, as in `_apply`.
    """
    n, split = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    known = c < channels
    at = n.to(tl.int64) * row + c
    begin = split * part
    end = tl.minimum(begin + part, positions)
    da, db = tl.zeros([BLOCK_P, BLOCK_C], WIDE), tl.zeros([BLOCK_P, BLOCK_C], WIDE)
    ds = tl.zeros([BLOCK_P, BLOCK_C], WIDE)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < end)[:, None] & known[None, :]
        here = _offsets(n, p, c, channels, positions, LAST)
        t = tl.load(dy_ptr + here, mask=inside, other=0.0).to(WIDE)
        if SECOND_DY:
            t += tl.load(second_dy_ptr + here, mask=inside, other=0.0).to(WIDE)
        x = tl.load(z_ptr + here, mask=inside, other=0.0).to(WIDE)
        if BITS:
            where = (p < end)[:, None] & (byte * 8 < channels)[None, :]
            eight = tl.load(bits_ptr + _byte_offsets(n, p, byte, channels, positions, LAST), mask=where, other=0)
            passes = (eight.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
            t = tl.where(tl.reshape(passes, [BLOCK_P, BLOCK_C]) == 1, t, 0.0)
        elif ACTIVATION != NONE:
            y = _affine(x, a_ptr, b_ptr, mu_ptr, at + a_at, at + b_at, c, known, HAS_B, HAS_MU, WIDE)
            t = tl.where(_passes_gradient(y, ACTIVATION), t, 0.0)
        if WRITE:
            tl.store(t_ptr + here, t.to(t_ptr.dtype.element_ty), mask=inside)
        if HAS_MU:
            x = tl.where(inside, x - tl.load(mu_ptr + c, mask=known, other=0.0).to(WIDE)[None, :], 0.0)
        da += t * x
        db += t
        if NORMED_SHORTCUT:
            s = tl.load(s_ptr + here, mask=inside, other=0.0).to(WIDE)
            ds += t * (s - tl.load(smu_ptr + c, mask=known, other=0.0).to(WIDE)[None, :])
    at = (split.to(tl.int64) * tl.num_programs(0) + n) * channels + c
    kind = (tl.num_programs(0) * tl.num_programs(2)).to(tl.int64) * channels
    tl.store(sums_ptr + at, tl.sum(da, axis=0), mask=known)
    tl.store(sums_ptr + kind + at, tl.sum(db, axis=0), mask=known)
    if NORMED_SHORTCUT:
        tl.store(sums_ptr + 2 * kind + at, tl.sum(ds, axis=0), mask=known)


@triton.jit
def _grads(
    t_ptr, z_ptr, dz_ptr, a_ptr, b_ptr, mu_ptr, m_ptr, dm_ptr, dv_ptr, a_at, b_at, channels, positions, row, norm_row,
    HAS_B: tl.constexpr, HAS_MU: tl.constexpr, HAS_DM: tl.constexpr, HAS_DV: tl.constexpr, ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store ``dz = a t + dm / P + 2 (z - m) dv / P``. With an ACTIVATION ``t`` is dy and the sign is recomputed.

    ``dm`` has ``row`` as ``a`` has; ``m`` and ``dv`` have ``norm_row``. ``m_ptr`` is None where m is mu.
    """
    n, tile_p, tile_c = _locate_tile(channels, positions, LAST, BLOCK_P, BLOCK_C)
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < channels
    inside = (p < positions)[:, None] & known[None, :]
    at, at_norm = n.to(tl.int64) * row + c, n.to(tl.int64) * norm_row + c
    here = _offsets(n, p, c, channels, positions, LAST)
    t = tl.load(t_ptr + here, mask=inside, other=0.0).to(WIDE)
    if HAS_DV or ACTIVATION != NONE:
        x = tl.load(z_ptr + here, mask=inside, other=0.0).to(WIDE)
    if ACTIVATION != NONE:
        y = _affine(x, a_ptr, b_ptr, mu_ptr, at + a_at, at + b_at, c, known, HAS_B, HAS_MU, WIDE)  # pyright: ignore[reportPossiblyUnboundVariable]
        t = tl.where(_passes_gradient(y, ACTIVATION), t, 0.0)
    dz = t * tl.load(a_ptr + at + a_at, mask=known, other=0.0).to(WIDE)[None, :]
    if HAS_DM:
        dz += (tl.load(dm_ptr + at, mask=known, other=0.0).to(WIDE) / positions)[None, :]
    if HAS_DV:
        slope = tl.load(dv_ptr + at_norm, mask=known, other=0.0).to(WIDE) * 2 / positions
        if m_ptr is None:
            m = tl.load(mu_ptr + c, mask=known, other=0.0).to(WIDE)
        else:
            m = tl.load(m_ptr + at_norm, mask=known, other=0.0).to(WIDE)
        dz += (x - m[None, :]) * slope[None, :]  # pyright: ignore[reportPossiblyUnboundVariable]
    tl.store(dz_ptr + here, dz.to(dz_ptr.dtype.element_ty), mask=inside)
