"""Triton kernels of the algebra between the passes of a tail: one forward, one backward.

They compute on (N, C) and (C,) numbers what `ops.tail` describes: batch statistics, running statistics, the norm's
affine, the gate and the coefficients of ``y = act(A (z - mu) + B + shortcut)``. With ``d = m - mu``:

    mu  = mean_n m                      r = 1 / sqrt(mean_n (v + d^2) + eps)        a = gamma r
    p   = a d + beta                    q[c] = sum_j w[j] p[c + j - K // 2] + bias  s = sigmoid(q)
    A   = gain s a                      B = gain s beta + addend

and backward, from dA and dB (sums over each plane):

    dq  = gain s (1 - s) (a dA + beta dB)               dp[c] = sum_j w[j] dq[c - j + K // 2]
    da  = sum_n (gain s dA + dp d)                      dbeta = sum_n (gain s dB + dp)
    dgamma = r da                       dv = -r^2 a da / (2 N)                      dm = a (dp - dbeta / N)

``dz = A t + dm / P + 2 (z - mu) dv / P`` is then the whole gradient, because the parts of dm and of ``2 (z - m) dv``
that belong to the variance add up to ``2 (z - mu) dv``. Frozen statistics have no dv, and ``dm = a dp``.

A program computes all samples of WIDTH channels. A gate with K taps needs K // 2 more channels on each side: they are
the first and the last lanes of the program, which computes their statistics too and stores only those of its `own`.

Tensors are packed: ``channel_ptr`` is (4, C) with the rows mu, r, a and beta (without a gate: beta + addend), and
``plane_ptr`` (4, N, C) with A, B, s and d. A plane may be split into parts (see `launch`): then ``moments_ptr`` is
(2, parts, N, C) with means and variances, and ``sums_ptr`` (kinds, parts, N, C) with dA, dB and those of the shortcut.
"""

# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def _find_lanes(channels, TAPS: tl.constexpr, CIRCULAR: tl.constexpr, WIDTH: tl.constexpr):
    """Return the channel of each lane, which channels exist, and which of them this program stores."""
    lane = tl.arange(0, WIDTH)
    c = tl.program_id(0) * (WIDTH - TAPS + 1) + lane - TAPS // 2
    own = (lane >= TAPS // 2) & (lane < WIDTH - TAPS // 2) & (c < channels)
    if CIRCULAR:
        c = (c + channels) % channels
    return c, (c >= 0) & (c < channels), own


@triton.jit
def _average(
    moments_ptr, c, valid, samples, channels, positions, parts, part,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return mean and biased variance of each channel, by the law of total variance over all parts of all planes."""
    whole = tl.zeros([BLOCK_N], WIDE) + positions
    usual = part / whole
    last = 1 - (parts - 1) * usual
    rows = samples * parts
    total = tl.zeros([BLOCK_N, WIDTH], WIDE)
    for start in range(0, rows, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        share = tl.where(i >= rows - samples, last, usual)
        at = i.to(tl.int64)[:, None] * channels + c[None, :]
        m = tl.load(moments_ptr + at, mask=(i < rows)[:, None] & valid[None, :], other=0.0)
        total += m * share[:, None]
    mu = tl.sum(total, axis=0) / samples
    total = tl.zeros([BLOCK_N, WIDTH], WIDE)
    variance_ptr = moments_ptr + rows.to(tl.int64) * channels
    for start in range(0, rows, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        share = tl.where(i >= rows - samples, last, usual)
        at = i.to(tl.int64)[:, None] * channels + c[None, :]
        inside = (i < rows)[:, None] & valid[None, :]
        d = tl.load(moments_ptr + at, mask=inside, other=0.0) - mu[None, :]
        v = tl.load(variance_ptr + at, mask=inside, other=0.0)
        total += tl.where(inside, v + d * d, 0.0) * share[:, None]
    return mu, tl.sum(total, axis=0) / samples


@triton.jit
def _update(
    mean_ptr, variance_ptr, tracked_ptr, c, own, mu, variance, samples, positions,
    MOMENTUM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Move the running statistics by MOMENTUM or, if that is None, to the average of the ``tracked_ptr`` batches."""
    count = tl.zeros([WIDTH], WIDE) + positions
    count = count * samples
    if MOMENTUM is None:
        factor = tl.zeros([WIDTH], WIDE) + 1 / tl.load(tracked_ptr).to(WIDE)
    else:
        factor = tl.full([WIDTH], MOMENTUM, WIDE)
    old = tl.load(mean_ptr + c, mask=own, other=0.0).to(WIDE)
    tl.store(mean_ptr + c, (old + factor * (mu - old)).to(mean_ptr.dtype.element_ty), mask=own)
    old = tl.load(variance_ptr + c, mask=own, other=0.0).to(WIDE)
    unbiased = variance * (count / tl.maximum(count - 1, 1))
    tl.store(variance_ptr + c, (old + factor * (unbiased - old)).to(variance_ptr.dtype.element_ty), mask=own)


@triton.jit
def _weigh(
    moments_ptr, taps_ptr, gate_bias_ptr, plane_ptr, c, valid, own, mu, a, b, addend,
    samples, channels, positions, parts, part, GAIN: tl.constexpr, TAPS: tl.constexpr, EACH: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store A, B, s and d of each plane."""
    lane = tl.arange(0, WIDTH)
    size = samples.to(tl.int64) * channels
    usual = part / (tl.zeros([BLOCK_N], WIDE) + positions)
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = n.to(tl.int64)[:, None] * channels + c[None, :]
        inside = (n < samples)[:, None] & valid[None, :]
        m = tl.zeros([BLOCK_N, WIDTH], WIDE)
        for i in range(parts):
            share = tl.where(i < parts - 1, usual, 1 - (parts - 1) * usual)
            m += tl.load(moments_ptr + i * size + at, mask=inside, other=0.0) * share[:, None]
        d = m - mu[None, :]
        p = tl.where(inside, a[None, :] * d + b[None, :], 0.0)
        q = tl.zeros([BLOCK_N, WIDTH], WIDE)
        for j in tl.static_range(TAPS):
            near = tl.minimum(tl.maximum(lane + (j - TAPS // 2), 0), WIDTH - 1)
            term = tl.gather(p, tl.broadcast_to(near[None, :], [BLOCK_N, WIDTH]), 1)
            if EACH:
                term *= tl.load(taps_ptr + c * TAPS + j, mask=valid, other=0.0).to(WIDE)[None, :]
            elif taps_ptr is not None:
                term *= tl.load(taps_ptr + j).to(WIDE)
            q += term
        if gate_bias_ptr is not None:
            q += tl.load(gate_bias_ptr).to(WIDE)
        s = 1 / (1 + tl.exp(-q))
        here = (n < samples)[:, None] & own[None, :]
        tl.store(plane_ptr + at, GAIN * s * a[None, :], mask=here)
        tl.store(plane_ptr + size + at, GAIN * s * b[None, :] + addend[None, :], mask=here)
        tl.store(plane_ptr + 2 * size + at, s, mask=here)
        tl.store(plane_ptr + 3 * size + at, d, mask=here)


@triton.jit(do_not_specialize=["samples", "positions", "parts", "part"])
def _coefficients(
    moments_ptr, weight_ptr, bias_ptr, mean_ptr, variance_ptr, tracked_ptr, addend_ptr, taps_ptr, gate_bias_ptr,
    channel_ptr, plane_ptr, samples, channels, positions, parts, part,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr, BATCH: tl.constexpr, UPDATE: tl.constexpr,
    GATED: tl.constexpr, GAIN: tl.constexpr, TAPS: tl.constexpr, EACH: tl.constexpr, CIRCULAR: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the coefficients of ``y``, and update the running statistics.

    BATCH: the norm uses the statistics of the batch. UPDATE: they move its running statistics. EACH: each channel has
    taps of its own.
    """
    c, valid, own = _find_lanes(channels, TAPS, CIRCULAR, WIDTH)
    if BATCH:
        mu, variance = _average(
            moments_ptr, c, valid, samples, channels, positions, parts, part, BLOCK_N, WIDTH, WIDE
        )  # fmt: skip
    else:
        mu = tl.load(mean_ptr + c, mask=valid, other=0.0).to(WIDE)
        variance = tl.load(variance_ptr + c, mask=valid, other=0.0).to(WIDE)
    r = tl.rsqrt(variance + EPS)
    a = r
    if weight_ptr is not None:
        a *= tl.load(weight_ptr + c, mask=valid, other=0.0).to(WIDE)
    b = tl.zeros([WIDTH], WIDE)
    if bias_ptr is not None:
        b += tl.load(bias_ptr + c, mask=valid, other=0.0).to(WIDE)
    addend = tl.zeros([WIDTH], WIDE)
    if addend_ptr is not None:
        addend += tl.load(addend_ptr + c, mask=valid, other=0.0).to(WIDE)
    tl.store(channel_ptr + c, mu, mask=own)
    tl.store(channel_ptr + channels + c, r, mask=own)
    tl.store(channel_ptr + 2 * channels + c, a, mask=own)
    tl.store(channel_ptr + 3 * channels + c, b if GATED else b + addend, mask=own)
    if UPDATE:
        _update(mean_ptr, variance_ptr, tracked_ptr, c, own, mu, variance, samples, positions, MOMENTUM, WIDTH, WIDE)
    if tracked_ptr is not None and MOMENTUM is not None:
        first = tl.program_id(0) == 0
        tl.store(tracked_ptr, tl.load(tracked_ptr, mask=first, other=0) + 1, mask=first)
    if GATED:
        _weigh(
            moments_ptr, taps_ptr, gate_bias_ptr, plane_ptr, c, valid, own, mu, a, b, addend,
            samples, channels, positions, parts, part, GAIN, TAPS, EACH, BLOCK_N, WIDTH, WIDE,
        )  # fmt: skip


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
    KIND: tl.constexpr, BATCH: tl.constexpr, GAIN: tl.constexpr, TAPS: tl.constexpr, EACH: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store dm and the gradients of the taps; return da and dbeta."""
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
    if BATCH:
        _finish_means(dmean_ptr, db_sum, c, own, a, samples, channels, BLOCK_N)
    _store_taps(dtaps_ptr, taps_ptr, dtaps, c, own, TAPS, EACH, COLUMNS)
    return da_sum, db_sum


@triton.jit(do_not_specialize=["samples", "parts"])
def _coefficient_grads(
    sums_ptr, channel_ptr, plane_ptr, taps_ptr, dweight_ptr, dbias_ptr, dmean_ptr, dvariance_ptr, dtaps_ptr,
    samples, channels, parts,
    KIND: tl.constexpr, BATCH: tl.constexpr, GATED: tl.constexpr, GAIN: tl.constexpr, TAPS: tl.constexpr,
    EACH: tl.constexpr, CIRCULAR: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the norm's affine (C), of the planes' means and variances, and of the gate's taps.

    KIND: which of the sums is dA; dB is the second. ``dmean_ptr`` is (N, C) with a gate, else (C,), and
    ``dvariance_ptr`` (C,). ``dtaps_ptr`` is (C, TAPS) if EACH, else (programs, TAPS + 1), the last for the gate's bias,
    to be summed over the programs. COLUMNS is a power of two above TAPS.
    """
    c, valid, own = _find_lanes(channels, TAPS, CIRCULAR, WIDTH)
    r = tl.load(channel_ptr + channels + c, mask=valid, other=0.0)
    a = tl.load(channel_ptr + 2 * channels + c, mask=valid, other=0.0)
    if GATED:
        da_sum, db_sum = _gate_grads(
            sums_ptr, channel_ptr, plane_ptr, taps_ptr, dmean_ptr, dtaps_ptr, c, valid, own, a,
            samples, channels, parts, KIND, BATCH, GAIN, TAPS, EACH, COLUMNS, BLOCK_N, WIDTH, WIDE,
        )  # fmt: skip
    else:
        da_sum = _add_up(sums_ptr, KIND, c, own, samples, channels, parts, BLOCK_N, WIDTH, WIDE)
        db_sum = _add_up(sums_ptr, 1, c, own, samples, channels, parts, BLOCK_N, WIDTH, WIDE)
        if BATCH:
            tl.store(dmean_ptr + c, -a * db_sum / samples, mask=own)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, r * da_sum, mask=own)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, db_sum, mask=own)
    if BATCH:
        tl.store(dvariance_ptr + c, -0.5 * r * r * a * da_sum / samples, mask=own)
