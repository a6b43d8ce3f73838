"""Triton kernels of a residual tail: two forward, two backward, for both memory layouts and all float dtypes.

This file has the elementwise passes, `reductions` the others.

`_moments` and `_reduce` compute tiles of BLOCK_P positions by BLOCK_C channels of one sample. They loop over all tiles
of their planes, or of one of the parts into which planes are split if there are few. Sums run in WIDE (float64 for
float64, else float32) and in a fixed order, without atomics, so that a result is the same every time. `_apply` and
`_grads` walk through memory backward: what the pass before read last is still in the cache. Saved tensors are never
written.

LAST means channels-last: the channels of a position are neighbours in memory. `_apply` and `_grads` loop over STEPS
tiles, so that coefficients are loaded once for several.

Otherwise the positions of a channel are neighbours, and PLANES says how planes lie: ALIGNED planes have a multiple of
eight elements. Others would be read one by one. In `_moments` and `_reduce` the tile of a plane begins at the last
multiple of eight elements before it, so that it is read in wide loads, with up to seven elements of the planes before
and after, which are dropped. Such planes are never split. `_apply` and `_grads` take a sample as one row and compute
groups of eight, which belong to at most two channels, except in SMALL planes.

The activation's sign bits (1 where it passes the gradient on) are packed: one byte holds eight neighbours in memory, so
that one thread packs it. The bytes have shape (N, P, C / 8) if LAST, else (N, C P / 8).

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
ALIGNED, SHIFTED, SMALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # PLANES
PLAIN, NORMED = tl.constexpr(1), tl.constexpr(2)  # SHORTCUT; NONE without one


@triton.jit
def _pack_bits(passes, GROUPS: tl.constexpr):
    """Return the bytes of truth values, whose last axis has neighbours in memory."""
    eight = tl.reshape(passes, [GROUPS, 8])
    return tl.sum(tl.where(eight, (1 << tl.arange(0, 8))[None, :], 0), axis=1).to(tl.uint8)


@triton.jit
def _locate_tiles(channels, positions, STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return sample, first position and first channel of this program. Successive programs go backward in memory."""
    across, along = tl.cdiv(channels, BLOCK_C), tl.cdiv(positions, STEPS * BLOCK_P)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    rest = program % (across * along)
    return program // (across * along), rest // across * (STEPS * BLOCK_P), rest % across * BLOCK_C


@triton.jit
def _locate_groups(channels, positions, GROUPS: tl.constexpr):
    """Return sample of this program, its elements in the sample (GROUPS, 8), and the channel of each group's first."""
    along = tl.cdiv(channels * positions, 8 * GROUPS)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first = program % along * (8 * GROUPS) + tl.arange(0, GROUPS) * 8
    return program // along, first[:, None] + tl.arange(0, 8)[None, :], first // positions


@triton.jit
def load_channels(ptr, at, c, channels, HAS: tl.constexpr, WIDE: tl.constexpr):
    """Return the coefficients of channels as a row, 0 if there are none."""
    x = tl.zeros([1, 1], WIDE)
    if HAS:
        x = tl.load(ptr + at + c, mask=c < channels, other=0.0).to(WIDE)[None, :]
    return x


@triton.jit
def _load_groups(
    ptr, at, e, c, channels, positions, HAS: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Return the coefficients of the elements ``e`` (GROUPS, 8) whose first ones belong to the channels ``c``."""
    if not HAS:
        x = tl.zeros([1, 1], WIDE)
    elif PLANES == SMALL:
        x = tl.load(ptr + at + e // positions, mask=e < channels * positions, other=0.0).to(WIDE)
    else:
        x = tl.load(ptr + at + c, mask=c < channels, other=0.0).to(WIDE)[:, None]
    if HAS and PLANES == SHIFTED:
        after = tl.load(ptr + at + c + 1, mask=c + 1 < channels, other=0.0).to(WIDE)[:, None]
        x = tl.where(e < ((c + 1) * positions)[:, None], x, after)
    return x


@triton.jit
def affine(x, a, b, mu, HAS_B: tl.constexpr, HAS_MU: tl.constexpr):
    """Return ``a (x - mu) + b``."""
    if HAS_MU:
        x = x - mu
    x = x * a
    return x + b if HAS_B else x


@triton.jit
def passes_gradient(y, ACTIVATION: tl.constexpr):
    """Return where the activation passes the gradient on. ReLU passes it at NaN too, so that a NaN is not hidden."""
    if ACTIVATION == RELU6:
        return (y > 0) & (y < 6)
    return (y <= 0) == 0


@triton.jit
def _finish(y, s, sa, smu, SHORTCUT: tl.constexpr, ACTIVATION: tl.constexpr):
    """Return ``act(y + shortcut)``."""
    if SHORTCUT == NORMED:
        s = (s - smu) * sa
    if SHORTCUT != NONE:
        y += s
    if ACTIVATION != NONE:
        y = tl.where(y <= 0, 0.0, y)
        if ACTIVATION == RELU6:
            y = tl.where(y >= 6, 6.0, y)
    return y


@triton.jit
def _apply(
    z_ptr, s_ptr, y_ptr, bits_ptr, a_ptr, b_ptr, mu_ptr, sa_ptr, smu_ptr, a_at, b_at, sa_at, channels, positions, row,
    HAS_B: tl.constexpr, HAS_MU: tl.constexpr, SHORTCUT: tl.constexpr, ACTIVATION: tl.constexpr, BITS: tl.constexpr,
    STEPS: tl.constexpr, LAST: tl.constexpr, PLANES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Store ``y = act(a (z - mu) + b + shortcut)`` and, with BITS, the activation's sign bits.

    The sign is that of the rounded output, as in PyTorch's ReLU, so that both pass the same gradients on.
    """
    normed: tl.constexpr = SHORTCUT == NORMED
    groups: tl.constexpr = BLOCK_P * BLOCK_C // 8
    if LAST:
        n, begin, top = _locate_tiles(channels, positions, STEPS, BLOCK_P, BLOCK_C)
        base = n.to(tl.int64) * channels * positions
        at, c = n.to(tl.int64) * row, top + tl.arange(0, BLOCK_C)
        a = load_channels(a_ptr, at + a_at, c, channels, True, WIDE)
        b = load_channels(b_ptr, at + b_at, c, channels, HAS_B, WIDE)
        mu = load_channels(mu_ptr, 0, c, channels, HAS_MU, WIDE)
        sa = load_channels(sa_ptr, sa_at, c, channels, normed, WIDE)
        smu = load_channels(smu_ptr, 0, c, channels, normed, WIDE)
        for start in range(begin, tl.minimum(begin + STEPS * BLOCK_P, positions), BLOCK_P):
            p = (start + tl.arange(0, BLOCK_P))[:, None]
            here, inside = base + (p * channels + c[None, :]), (p < positions) & (c < channels)[None, :]
            y = affine(tl.load(z_ptr + here, mask=inside, other=0.0).to(WIDE), a, b, mu, HAS_B, HAS_MU)
            s = tl.load(s_ptr + here, mask=inside, other=0.0).to(WIDE) if SHORTCUT != NONE else y
            y = _finish(y, s, sa, smu, SHORTCUT, ACTIVATION).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + here, y, mask=inside)
            if BITS:
                width, byte = (channels + 7) // 8, (top // 8 + tl.arange(0, BLOCK_C // 8))[None, :]
                bits = tl.reshape(_pack_bits(passes_gradient(y.to(WIDE), ACTIVATION), groups), [BLOCK_P, BLOCK_C // 8])
                where = n.to(tl.int64) * width * positions + (p * width + byte)
                tl.store(bits_ptr + where, bits, mask=(p < positions) & (byte < width))
    else:
        n, e, c = _locate_groups(channels, positions, groups)
        at, size = n.to(tl.int64) * row, channels * positions
        a = _load_groups(a_ptr, at + a_at, e, c, channels, positions, True, PLANES, WIDE)
        b = _load_groups(b_ptr, at + b_at, e, c, channels, positions, HAS_B, PLANES, WIDE)
        mu = _load_groups(mu_ptr, 0, e, c, channels, positions, HAS_MU, PLANES, WIDE)
        sa = _load_groups(sa_ptr, sa_at, e, c, channels, positions, normed, PLANES, WIDE)
        smu = _load_groups(smu_ptr, 0, e, c, channels, positions, normed, PLANES, WIDE)
        here, inside, width = n.to(tl.int64) * size + e, e < size, (size + 7) // 8
        y = affine(tl.load(z_ptr + here, mask=inside, other=0.0).to(WIDE), a, b, mu, HAS_B, HAS_MU)
        s = tl.load(s_ptr + here, mask=inside, other=0.0).to(WIDE) if SHORTCUT != NONE else y
        y = _finish(y, s, sa, smu, SHORTCUT, ACTIVATION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + here, y, mask=inside)
        if BITS:
            byte = tl.min(e, axis=1) // 8
            bits = _pack_bits(passes_gradient(y.to(WIDE), ACTIVATION), groups)
            tl.store(bits_ptr + n.to(tl.int64) * width + byte, bits, mask=byte < width)


@triton.jit
def _compute_gradient(
    t, x, a, b, mu, m, offset, slope,
    HAS_B: tl.constexpr, HAS_MU: tl.constexpr, HAS_DM: tl.constexpr, HAS_DV: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Return ``a t + offset + (x - m) slope``."""
    if ACTIVATION != NONE:
        t = tl.where(passes_gradient(affine(x, a, b, mu, HAS_B, HAS_MU), ACTIVATION), t, 0.0)
    dz = t * a
    if HAS_DM:
        dz += offset
    return dz + (x - m) * slope if HAS_DV else dz


@triton.jit
def _grads(
    t_ptr, z_ptr, dz_ptr, a_ptr, b_ptr, mu_ptr, m_ptr, dm_ptr, dv_ptr, a_at, b_at, channels, positions, row, norm_row,
    HAS_B: tl.constexpr, HAS_MU: tl.constexpr, HAS_DM: tl.constexpr, HAS_DV: tl.constexpr, ACTIVATION: tl.constexpr,
    STEPS: tl.constexpr, LAST: tl.constexpr, PLANES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Store ``dz = a t + dm / P + 2 (z - m) dv / P``. With an ACTIVATION ``t`` is dy and the sign is recomputed.

    ``dm`` has ``row`` as ``a`` has; ``m`` and ``dv`` have ``norm_row``. ``m_ptr`` is None where m is mu.
    """
    recomputes: tl.constexpr = ACTIVATION != NONE
    reads: tl.constexpr = HAS_DV or recomputes
    common: tl.constexpr = m_ptr is None
    needs_mu: tl.constexpr = (recomputes and HAS_MU) or (HAS_DV and common)
    if LAST:
        n, begin, top = _locate_tiles(channels, positions, STEPS, BLOCK_P, BLOCK_C)
        base = n.to(tl.int64) * channels * positions
        at, at_norm, c = n.to(tl.int64) * row, n.to(tl.int64) * norm_row, top + tl.arange(0, BLOCK_C)
        a = load_channels(a_ptr, at + a_at, c, channels, True, WIDE)
        b = load_channels(b_ptr, at + b_at, c, channels, recomputes and HAS_B, WIDE)
        mu = load_channels(mu_ptr, 0, c, channels, needs_mu, WIDE)
        m = mu if common else load_channels(m_ptr, at_norm, c, channels, HAS_DV, WIDE)
        offset = load_channels(dm_ptr, at, c, channels, HAS_DM, WIDE) / positions
        slope = load_channels(dv_ptr, at_norm, c, channels, HAS_DV, WIDE) * 2 / positions
        for start in range(begin, tl.minimum(begin + STEPS * BLOCK_P, positions), BLOCK_P):
            p = (start + tl.arange(0, BLOCK_P))[:, None]
            here, inside = base + (p * channels + c[None, :]), (p < positions) & (c < channels)[None, :]
            t = tl.load(t_ptr + here, mask=inside, other=0.0).to(WIDE)
            x = tl.load(z_ptr + here, mask=inside, other=0.0).to(WIDE) if reads else t
            dz = _compute_gradient(t, x, a, b, mu, m, offset, slope, HAS_B, HAS_MU, HAS_DM, HAS_DV, ACTIVATION)
            tl.store(dz_ptr + here, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    else:
        n, e, c = _locate_groups(channels, positions, BLOCK_P * BLOCK_C // 8)
        at, at_norm, size = n.to(tl.int64) * row, n.to(tl.int64) * norm_row, channels * positions
        a = _load_groups(a_ptr, at + a_at, e, c, channels, positions, True, PLANES, WIDE)
        b = _load_groups(b_ptr, at + b_at, e, c, channels, positions, recomputes and HAS_B, PLANES, WIDE)
        mu = _load_groups(mu_ptr, 0, e, c, channels, positions, needs_mu, PLANES, WIDE)
        m = mu if common else _load_groups(m_ptr, at_norm, e, c, channels, positions, HAS_DV, PLANES, WIDE)
        offset = _load_groups(dm_ptr, at, e, c, channels, positions, HAS_DM, PLANES, WIDE) / positions
        slope = _load_groups(dv_ptr, at_norm, e, c, channels, positions, HAS_DV, PLANES, WIDE) * 2 / positions
        here, inside = n.to(tl.int64) * size + e, e < size
        t = tl.load(t_ptr + here, mask=inside, other=0.0).to(WIDE)
        x = tl.load(z_ptr + here, mask=inside, other=0.0).to(WIDE) if reads else t
        dz = _compute_gradient(t, x, a, b, mu, m, offset, slope, HAS_B, HAS_MU, HAS_DM, HAS_DV, ACTIVATION)
        tl.store(dz_ptr + here, dz.to(dz_ptr.dtype.element_ty), mask=inside)
