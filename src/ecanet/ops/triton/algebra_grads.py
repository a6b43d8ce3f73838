"""Triton kernels of the algebra between the passes of a tail: the backward. `algebra` has the equations."""

# ruff: noqa: N803

import triton
import triton.language as tl

from ecanet.ops.triton.algebra import find_lanes


@triton.jit
def _add_up(
    sums_ptr, kind: tl.constexpr, c, own, samples, channels, parts,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the sum of one kind over all parts of all planes of each channel."""
    rows = samples * parts
    first = sums_ptr + rows.to(tl.int64) * channels * kind
    total = tl.zeros([BLOCK_N, WIDTH], WIDE)
    for start in range(0, rows, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        at = i.to(tl.int64)[:, None] * channels + c[None, :]
        total += tl.load(first + at, mask=(i < rows)[:, None] & own[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _store_taps(dtaps_ptr, taps_ptr, dtaps, c, own, TAPS: tl.constexpr, EACH: tl.constexpr, COLUMNS: tl.constexpr):
    """Store the gradients of the taps (WIDTH, COLUMNS), if there are any."""
    column = tl.arange(0, COLUMNS)[None, :]
    if EACH:
        at = c[:, None] * TAPS + column
        tl.store(dtaps_ptr + at, dtaps, mask=own[:, None] & (column < TAPS))
    elif taps_ptr is not None:
        row = tl.program_id(0) * (TAPS + 1) + tl.arange(0, COLUMNS)
        tl.store(dtaps_ptr + row, tl.sum(dtaps, axis=0), mask=tl.arange(0, COLUMNS) <= TAPS)


@triton.jit
def _finish_means(dmean_ptr, dbeta, c, own, a, samples, channels, BLOCK_N: tl.constexpr):
    """Store dm in the place of dp."""
    tl.debug_barrier()  # each program reads what it has written itself
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = n.to(tl.int64)[:, None] * channels + c[None, :]
        here = (n < samples)[:, None] & own[None, :]
        dp = tl.load(dmean_ptr + at, mask=here, other=0.0)
        tl.store(dmean_ptr + at, a[None, :] * (dp - dbeta[None, :] / samples), mask=here)


@triton.jit
def _gate_grads(
    sums_ptr, channel_ptr, plane_ptr, taps_ptr, dmean_ptr, dtaps_ptr, c, valid, own, a, samples, channels, parts,
    KIND: tl.constexpr, BATCH: tl.constexpr, SYNC: tl.constexpr, GAIN: tl.constexpr, TAPS: tl.constexpr,
    EACH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store dm (dp if SYNC) and the gradients of the taps; return da and dbeta."""
    b = tl.load(channel_ptr + 3 * channels + c, mask=valid, other=0.0)
    size = samples.to(tl.int64) * channels
    da_total, db_total = tl.zeros([BLOCK_N, WIDTH], WIDE), tl.zeros([BLOCK_N, WIDTH], WIDE)
    dtaps = tl.zeros([WIDTH, COLUMNS], WIDE)
    column, lane = tl.arange(0, COLUMNS)[None, :], tl.arange(0, WIDTH)
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = n.to(tl.int64)[:, None] * channels + c[None, :]
        inside = (n < samples)[:, None] & valid[None, :]
        da, db = tl.zeros([BLOCK_N, WIDTH], WIDE), tl.zeros([BLOCK_N, WIDTH], WIDE)
        for i in range(parts):
            da += tl.load(sums_ptr + (KIND * parts + i) * size + at, mask=inside, other=0.0)
            db += tl.load(sums_ptr + (parts + i) * size + at, mask=inside, other=0.0)
        s = tl.load(plane_ptr + 2 * size + at, mask=inside, other=0.0)
        d = tl.load(plane_ptr + 3 * size + at, mask=inside, other=0.0)
        dq = tl.where(inside, GAIN * s * (1 - s) * (a[None, :] * da + b[None, :] * db), 0.0)
        here = (n < samples)[:, None] & own[None, :]
        stored = tl.where(here, dq, 0.0)
        p = tl.where(inside, a[None, :] * d + b[None, :], 0.0)
        dp = tl.zeros([BLOCK_N, WIDTH], WIDE)
        for j in tl.static_range(TAPS):
            term = dq
            if EACH:
                term *= tl.load(taps_ptr + c * TAPS + j, mask=valid, other=0.0).to(WIDE)[None, :]
            elif taps_ptr is not None:
                term *= tl.load(taps_ptr + j).to(WIDE)
            near = tl.minimum(tl.maximum(lane + (TAPS // 2 - j), 0), WIDTH - 1)
            dp += tl.gather(term, tl.broadcast_to(near[None, :], [BLOCK_N, WIDTH]), 1)
            near = tl.minimum(tl.maximum(lane + (j - TAPS // 2), 0), WIDTH - 1)
            term = stored * tl.gather(p, tl.broadcast_to(near[None, :], [BLOCK_N, WIDTH]), 1)
            dtaps += tl.where(column == j, tl.sum(term, axis=0)[:, None], 0.0)
        dtaps += tl.where(column == TAPS, tl.sum(stored, axis=0)[:, None], 0.0)
        da_total += GAIN * s * da + dp * d
        db_total += GAIN * s * db + dp
        tl.store(dmean_ptr + at, dp if BATCH else a[None, :] * dp, mask=here)
    da_sum, db_sum = tl.sum(da_total, axis=0), tl.sum(db_total, axis=0)
    if BATCH and not SYNC:
        _finish_means(dmean_ptr, db_sum, c, own, a, samples, channels, BLOCK_N)
    _store_taps(dtaps_ptr, taps_ptr, dtaps, c, own, TAPS, EACH, COLUMNS)
    return da_sum, db_sum


@triton.jit(do_not_specialize=["samples", "parts"])
def _coefficient_grads(
    sums_ptr, channel_ptr, plane_ptr, taps_ptr, dweight_ptr, dbias_ptr, dmean_ptr, dvariance_ptr, dtaps_ptr,
    totals_ptr, dtotals_ptr, samples, channels, parts,
    KIND: tl.constexpr, BATCH: tl.constexpr, GATED: tl.constexpr, GAIN: tl.constexpr, TAPS: tl.constexpr,
    EACH: tl.constexpr, CIRCULAR: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the norm's affine (C), of the planes' means and variances, and of the gate's taps.

    KIND: which of the sums is dA; dB is the second. ``dmean_ptr`` is (N, C) with a gate, else (C,), and
    ``dvariance_ptr`` (C,). ``dtaps_ptr`` is (C, TAPS) if EACH, else (programs, TAPS + 1), the last for the gate's bias,
    to be summed over the programs. COLUMNS is a power of two above TAPS. A synchronised norm has ``totals_ptr`` and
    stores this process's gradients of the two sums, for `_finish`.
    """
    sync: tl.constexpr = totals_ptr is not None
    c, valid, own = find_lanes(channels, TAPS, CIRCULAR, WIDTH)
    r = tl.load(channel_ptr + channels + c, mask=valid, other=0.0)
    a = tl.load(channel_ptr + 2 * channels + c, mask=valid, other=0.0)
    if GATED:
        da_sum, db_sum = _gate_grads(
            sums_ptr, channel_ptr, plane_ptr, taps_ptr, dmean_ptr, dtaps_ptr, c, valid, own, a,
            samples, channels, parts, KIND, BATCH, sync, GAIN, TAPS, EACH, COLUMNS, BLOCK_N, WIDTH, WIDE,
        )  # fmt: skip
    else:
        da_sum = _add_up(sums_ptr, KIND, c, own, samples, channels, parts, BLOCK_N, WIDTH, WIDE)
        db_sum = _add_up(sums_ptr, 1, c, own, samples, channels, parts, BLOCK_N, WIDTH, WIDE)
        if BATCH and not sync:
            tl.store(dmean_ptr + c, -a * db_sum / samples, mask=own)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, r * da_sum, mask=own)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, db_sum, mask=own)
    if sync:
        mu = tl.load(channel_ptr + c, mask=own, other=0.0).to(tl.float64)
        count = tl.load(totals_ptr + 2 * channels)
        dvariance = (-0.5 * r * r * a * da_sum).to(tl.float64)
        dmu = (-a * db_sum).to(tl.float64)
        tl.store(dtotals_ptr + c, (dmu - 2 * mu * dvariance) / count, mask=own)
        tl.store(dtotals_ptr + channels + c, dvariance / count, mask=own)
        tl.store(dtotals_ptr + 2 * channels + 0 * c, 0 * count + 0.0 * dmu, mask=own & (c == 0))
    elif BATCH:
        tl.store(dvariance_ptr + c, -0.5 * r * r * a * da_sum / samples, mask=own)


@triton.jit(do_not_specialize=["samples", "positions"])
def _finish(
    dtotals_ptr, channel_ptr, dmean_ptr, dvariance_ptr, samples, channels, positions,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store dm and dv of a synchronised norm. With a gate, dm stands in the place of dp."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    own = c < channels
    mu = tl.load(channel_ptr + c, mask=own, other=0.0).to(tl.float64)
    a = tl.load(channel_ptr + 2 * channels + c, mask=own, other=0.0)
    dvariance = tl.load(dtotals_ptr + channels + c, mask=own, other=0.0)  # per element, as dmu
    dmu = tl.load(dtotals_ptr + c, mask=own, other=0.0) + 2 * mu * dvariance
    tl.store(dvariance_ptr + c, (dvariance * positions).to(WIDE), mask=own)
    dmu = (dmu * positions).to(WIDE)
    if GATED:
        for start in range(0, samples, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            at = n.to(tl.int64)[:, None] * channels + c[None, :]
            here = (n < samples)[:, None] & own[None, :]
            dp = tl.load(dmean_ptr + at, mask=here, other=0.0)
            tl.store(dmean_ptr + at, a[None, :] * dp + dmu[None, :], mask=here)
    else:
        tl.store(dmean_ptr + c, dmu, mask=own)
