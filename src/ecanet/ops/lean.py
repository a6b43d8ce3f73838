"""The passes of a residual tail in plain PyTorch: any device, any float dtype, no compiler.

A tensor is walked in groups of samples small enough for the processor's cache, so that the several operations on a
group read memory once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ecanet.ops.passes import Form
from ecanet.ops.reference import Activation, Gate, accumulation_dtype, disable_autocast, squeeze

CACHED = 2**21
"""Elements of a group: 8 MB in float32. Smaller groups stay in nearer caches, but each operation wakes all threads."""

WHOLE = 2**18
"""Elements of a sample from which one native operation for each sample is better than a few for a group of them."""

recomputes_sign = False


def moments(z: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Mean of each plane, and variances that are right on average over the samples."""
    x = planes(z)
    m, v = x.new_zeros((2, *x.shape[:2]), dtype=accumulation_dtype(z.dtype)).unbind()
    if order == 0 or x.numel() == 0:
        return m, v
    if order == 1 and x.dtype == m.dtype:
        return x.mean(2).flatten(1), v
    for group in groups(x):
        part = x[group]
        if order == 2 and x.dtype == m.dtype:
            m[group], v[group] = native_moments(part)
            continue
        part = part.to(m.dtype)
        mean = part.mean(2, keepdim=True)
        m[group] = mean.flatten(1)
        if order == 2:
            centred = part - mean
            v[group] = centred.mul_(centred).mean(2).flatten(1)
    return m, v


def apply(z: Tensor, shortcut: Tensor | None, form: Form) -> tuple[Tensor, Tensor | None]:
    """``y`` of the form; with an activation ``y`` itself is what is kept, as plain ReLU keeps it."""
    x, a, b = planes(z), form.a, form.b
    for slope, mean in ((a, form.mu), (form.shortcut_a, form.shortcut_mu)):
        if slope is not None and mean is not None:
            b = -slope * mean if b is None else torch.addcmul(b, slope, mean, value=-1)
    y = torch.empty_like(z)
    out = planes(y)
    s = None if shortcut is None else planes(shortcut)
    for group in groups(x):
        part = affine(x[group], a[group], None if b is None else b[group], out[group])
        if s is not None and form.shortcut_a is not None:
            part.addcmul_(s[group].to(a.dtype), spread(form.shortcut_a[group]))
        elif s is not None:
            part.add_(s[group])
        if form.activation == "relu":
            part.relu_()
        elif form.activation == "relu6":
            part.clamp_(0, 6)
        if part.dtype != out.dtype:
            out[group] = part
    return y, None if form.activation is None else y


def reduce(
    dy: Tensor, second_dy: Tensor | None, kept: Tensor | None, z: Tensor, shortcut: Tensor | None, form: Form
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The sums over each plane, and t."""
    x, g = planes(z), planes(dy)
    da, db, ds = x.new_zeros((3, *x.shape[:2]), dtype=accumulation_dtype(z.dtype)).unbind()
    t = dy if kept is None and second_dy is None else torch.empty_like(z)
    out = planes(t)
    h = None if second_dy is None else planes(second_dy)
    y = None if kept is None else planes(kept)
    s = None if shortcut is None or form.shortcut_a is None else planes(shortcut)
    for group in groups(x):
        part = g[group] if h is None else torch.add(g[group], h[group], out=out[group])
        if y is not None and form.activation == "relu":
            torch.ops.aten.threshold_backward(part, y[group], 0, grad_input=out[group])
        elif y is not None:
            torch.ops.aten.hardtanh_backward(part, y[group], 0.0, 6.0, grad_input=out[group])
        da[group], db[group] = products(out[group], x[group], form.mu)
        if s is not None:
            ds[group], _ = products(out[group], s[group], form.shortcut_mu)
    return da, db, None if s is None else ds, t


def grads(t: Tensor, z: Tensor, form: Form, m: Tensor, dm: Tensor | None, dv: Tensor | None) -> Tensor:
    """``dz = a t + dm / P + 2 (z - m) dv / P``."""
    x, g, a = planes(z), planes(t), form.a
    positions = max(1, x.shape[2])
    constant = None if dm is None else dm / positions
    slope = None if dv is None else dv * (2 / positions)
    if slope is not None:
        constant = -slope * m if constant is None else torch.addcmul(constant, slope, m, value=-1)
    dz = torch.empty_like(z)
    out = planes(dz)
    for group in groups(x):
        part = affine(g[group], a[group], None if constant is None else constant[group], out[group])
        if slope is not None:
            part.addcmul_(x[group].to(a.dtype), spread(slope[group]))
        if part.dtype != out.dtype:
            out[group] = part
    return dz


def active(kept: Tensor, z: Tensor, form: Form) -> Tensor:
    """Where the gradient passed: the kept output was not clipped."""
    return ~(kept <= 0) if form.activation == "relu" else (kept > 0) & (kept < 6)


def evaluated_tail(
    z: Tensor,
    norm: nn.Module,
    gate: Gate,
    shortcut: Tensor | None,
    shortcut_norm: nn.Module | None,
    activation: Activation,
) -> Tensor:
    """A tail whose norm stands still: gate and addition in one pass, bit for bit the plain block at gate 1."""
    b = norm(z)
    with disable_autocast(b):
        g = gate(squeeze(b)).expand(b.shape[:2]).reshape(*b.shape[:2], *(1,) * (b.dim() - 2)).to(b.dtype)
    if shortcut is None:
        y = b * g
    else:
        y = torch.addcmul(shortcut if shortcut_norm is None else shortcut_norm(shortcut), b, g)
    if activation is None:
        return y
    return y.relu_() if activation == "relu" else y.clamp_(0, 6)


def affine(x: Tensor, a: Tensor, b: Tensor | None, out: Tensor) -> Tensor:
    """``a x + b`` in ``a``'s dtype, into ``out`` if that is its dtype, by what suits ``x``'s layout."""
    target = out if out.dtype == a.dtype else None
    if b is None:
        return torch.mul(x, spread(a), out=target)
    if channels_last(x):
        return torch.addcmul(spread(b), x.to(a.dtype), spread(a), out=target)
    return torch.mul(x, spread(a), out=target).add_(spread(b))


def products(t: Tensor, x: Tensor, mu: Tensor | None) -> tuple[Tensor, Tensor]:
    """``sum t (x - mu)`` and ``sum t`` over each plane, where large by a batch norm's own reduction."""
    n, c, p, _ = x.shape
    wide = accumulation_dtype(x.dtype)
    one = x.new_ones(c, dtype=wide)
    mean = torch.zeros_like(one) if mu is None else mu
    if not channels_last(x):
        sums = norm_reduction(t.view(1, n * c, p, 1), x.view(1, n * c, p, 1), mean.repeat(n), one.repeat(n))
        return sums[0].view(n, c), sums[1].view(n, c)
    if c * p < WHOLE:
        centred = x.to(wide) - mean[:, None, None]
        return centred.mul_(t).sum((2, 3)), t.sum((2, 3), dtype=wide)
    sums = [norm_reduction(t[i : i + 1], x[i : i + 1], mean, one) for i in range(n)]
    return torch.stack([s[0] for s in sums]), torch.stack([s[1] for s in sums])


def norm_reduction(dy: Tensor, z: Tensor, mean: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
    """``sum dy (z - mean)`` and ``sum dy`` of each channel."""
    _, product, total = torch.ops.aten.native_batch_norm_backward(
        dy, z, one, None, None, mean, one, True, 0.0, [False, True, True]
    )
    return product, total


def native_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each plane of ``x`` (N, C, P, 1), and the variance that a batch norm's own statistics leave for it."""
    n, c, p, _ = x.shape
    if not channels_last(x):
        m, v = torch.batch_norm_update_stats(x.view(1, n * c, p, 1), None, None, 0.0)
        return m.view(n, c), v.view(n, c)
    m = x.mean(2).flatten(1)
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    return m, variance - (m - mean).square()


def planes(x: Tensor) -> Tensor:
    """``x`` (N, C, ...) seen as (N, C, P, 1) without a copy, if it is contiguous or channels-last."""
    return x.view(*x.shape[:2], x[:1, :1].numel() if x.numel() else 1, 1)


def spread(a: Tensor) -> Tensor:
    """(N, C) -> (N, C, 1, 1)."""
    return a[..., None, None]


def channels_last(x: Tensor) -> bool:
    """Whether neighbouring channels are neighbours in memory in ``x`` (N, C, P, 1)."""
    return x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2] > 1


def groups(x: Tensor) -> Iterator[slice]:
    """Ranges of samples whose part of ``x`` fits the cache; one range for all on other devices."""
    n = x.shape[0]
    step = max(1, CACHED // max(1, x[:1].numel())) if x.device.type == "cpu" else max(1, n)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
