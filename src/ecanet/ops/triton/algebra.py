"""Triton kernels of the algebra between the passes of a tail: the forward. `algebra_grads` contains the backward.

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

A synchronised norm sums over processes, in one all-reduce each way. Forward, `_totals` stores sum z, sum z^2 and the
number of elements, in float64, where ``mean z^2 - mu^2`` keeps all digits that float32 has. Backward, the gradients of
the two sums are summed.

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
def find_lanes(channels, TAPS: tl.constexpr, CIRCULAR: tl.constexpr, WIDTH: tl.constexpr):
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
    mean_ptr, variance_ptr, tracked_ptr, c, own, mu, variance, count,
    MOMENTUM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Move the running statistics by MOMENTUM or, if that is None, to the average of the ``tracked_ptr`` batches."""
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
    totals_ptr, channel_ptr, plane_ptr, samples, channels, positions, parts, part,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr, BATCH: tl.constexpr, UPDATE: tl.constexpr,
    GATED: tl.constexpr, GAIN: tl.constexpr, TAPS: tl.constexpr, EACH: tl.constexpr, CIRCULAR: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the coefficients of ``y``, and update the running statistics.

    BATCH: the norm uses the statistics of the batch, those of all processes if there is a ``totals_ptr``. UPDATE: they
    move its running statistics. EACH: each channel has taps of its own.
    """
    c, valid, own = find_lanes(channels, TAPS, CIRCULAR, WIDTH)
    count = tl.zeros([WIDTH], WIDE) + positions
    count = count * samples
    if totals_ptr is not None:
        everywhere = tl.load(totals_ptr + 2 * channels)
        mean = tl.load(totals_ptr + c, mask=valid, other=0.0) / everywhere
        square = tl.load(totals_ptr + channels + c, mask=valid, other=0.0) / everywhere
        mu, variance = mean.to(WIDE), (square - mean * mean).to(WIDE)
        count = tl.zeros([WIDTH], WIDE) + everywhere.to(WIDE)
    elif BATCH:
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
        _update(mean_ptr, variance_ptr, tracked_ptr, c, own, mu, variance, count, MOMENTUM, WIDTH, WIDE)
    if tracked_ptr is not None and MOMENTUM is not None:
        first = tl.program_id(0) == 0
        tl.store(tracked_ptr, tl.load(tracked_ptr, mask=first, other=0) + 1, mask=first)
    if GATED:
        _weigh(
            moments_ptr, taps_ptr, gate_bias_ptr, plane_ptr, c, valid, own, mu, a, b, addend,
            samples, channels, positions, parts, part, GAIN, TAPS, EACH, BLOCK_N, WIDTH, WIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "positions", "parts", "part"])
def _totals(
    moments_ptr, totals_ptr, samples, channels, positions, parts, part,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store this process's sums of z and z^2 over each channel, and the number of elements: 2 C + 1 in float64."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    own = c < channels
    mu, variance = _average(moments_ptr, c, own, samples, channels, positions, parts, part, BLOCK_N, WIDTH, WIDE)
    mu = mu.to(tl.float64)
    count = tl.zeros([WIDTH], tl.float64) + positions
    count = count * samples
    tl.store(totals_ptr + c, count * mu, mask=own)
    tl.store(totals_ptr + channels + c, count * (variance.to(tl.float64) + mu * mu), mask=own)
    tl.store(totals_ptr + 2 * channels + 0 * c, count, mask=c == 0)
