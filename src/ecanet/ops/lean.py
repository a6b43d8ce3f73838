"""The passes of a residual tail in plain PyTorch: any device, any float dtype, no compiler.

On a CPU a tensor is processed in groups of samples. A group is small enough for the processor's cache, so that the
operations on it read it from memory only once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ecanet.ops.passes import Form
from ecanet.ops.reference import Activation, Gate, accumulation_dtype, disable_autocast, weigh

GROUP_ELEMENTS = 2**21
"""Elements of a group: 8 MB in float32.

Smaller groups would stay in faster caches, but each operation on a group must start all threads.
"""

LARGE_SAMPLE_ELEMENTS = 2**18
"""Elements of a channels-last sample from which one native reduction for each sample is faster.

Below it, a few elementwise operations on the whole group are.
"""

LARGE_SAMPLE_MOMENTS = 2**16
"""Elements of a channels-last sample from which its variances are native. Contiguous ones are never faster so."""

SMALL = 2**18
"""Elements below which the tail of a `MomentsGate` runs as PyTorch's operations, `compute_gated_tail`, in training too.

Measured on one core, forward and backward, contiguous and channels-last: from 2^19 elements on the four passes take 0.3
to 0.8 of its time, and for fewer than 2^17 up to twice as long.
"""

SMALL_SCALE = 2**18
"""Elements below which a gate alone runs as PyTorch's operations, `reference.squeeze_scale`, in training too.

For ECA and SE the passes were slower for fewer elements, and faster from 2^20 on.
"""

recomputes_sign = False


def moments(z: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each plane."""
    x = view_planes(z)
    m, v = x.new_zeros((2, *x.shape[:2]), dtype=accumulation_dtype(z.dtype)).unbind()
    if order == 0 or x.numel() == 0:
        return m, v
    if order == 1 and x.dtype == m.dtype:
        return x.mean(2).flatten(1), v
    for group in split_into_groups(x):
        part = x[group].to(m.dtype)
        if order == 1:
            m[group] = part.mean(2).flatten(1)
        else:
            m[group], v[group] = compute_moments(part)
    return m, v


def apply(z: Tensor, shortcut: Tensor | None, form: Form) -> tuple[Tensor, Tensor | None]:
    """Return ``y`` of the form. With an activation, ``y`` is also what `reduce` needs, as for PyTorch's ReLU."""
    x, a, b = view_planes(z), form.a, form.b
    # a (x - mu) + b is computed as a x + (b - a mu), one operation on the tensor less
    for slope, mean in ((a, form.mu), (form.shortcut_a, form.shortcut_mu)):
        if slope is not None and mean is not None:
            b = -slope * mean if b is None else torch.addcmul(b, slope, mean, value=-1)
    y = torch.empty_like(z)
    out = view_planes(y)
    s = None if shortcut is None else view_planes(shortcut)
    for group in split_into_groups(x):
        part = apply_affine(x[group], a[group], None if b is None else b[group], out[group])
        if s is not None and form.shortcut_a is not None:
            part.addcmul_(s[group].to(a.dtype), broadcast_to_planes(form.shortcut_a))
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
    """Return the sums over each plane, and ``t``."""
    x, g = view_planes(z), view_planes(dy)
    da, db, ds = x.new_zeros((3, *x.shape[:2]), dtype=accumulation_dtype(z.dtype)).unbind()
    t = dy if kept is None and second_dy is None else torch.empty_like(z)
    out = view_planes(t)
    h = None if second_dy is None else view_planes(second_dy)
    y = None if kept is None else view_planes(kept)
    s = None if shortcut is None or form.shortcut_a is None else view_planes(shortcut)
    for group in split_into_groups(x):
        part = g[group] if h is None else torch.add(g[group], h[group], out=out[group])
        if y is not None and form.activation == "relu":
            torch.ops.aten.threshold_backward(part, y[group], 0, grad_input=out[group])
        elif y is not None:
            torch.ops.aten.hardtanh_backward(part, y[group], 0.0, 6.0, grad_input=out[group])
        da[group], db[group] = sum_products(out[group], x[group], form.mu)
        if s is not None:
            ds[group], _ = sum_products(out[group], s[group], form.shortcut_mu)
    return da, db, None if s is None else ds, t


def grads(t: Tensor, z: Tensor, form: Form, m: Tensor, dm: Tensor | None, dv: Tensor | None) -> Tensor:
    """Return ``dz = a t + dm / P + 2 (z - m) dv / P``."""
    x, g, a = view_planes(z), view_planes(t), form.a
    positions = max(1, x.shape[2])
    constant = None if dm is None else dm / positions
    slope = None if dv is None else dv * (2 / positions)
    if slope is not None:
        constant = -slope * m if constant is None else torch.addcmul(constant, slope, m, value=-1)
    dz = torch.empty_like(z)
    out = view_planes(dz)
    for group in split_into_groups(x):
        part = apply_affine(g[group], a[group], None if constant is None else constant[group], out[group])
        if slope is not None:
            part.addcmul_(x[group].to(a.dtype), broadcast_to_planes(slope[group]))
        if part.dtype != out.dtype:
            out[group] = part
    return dz


def find_active(kept: Tensor, z: Tensor, form: Form) -> Tensor:
    """Return where the activation passed the gradient on: where the output ``kept`` was not clipped."""
    return ~(kept <= 0) if form.activation == "relu" else (kept > 0) & (kept < 6)


def run_tail(*_: object) -> None:
    """Return None: the algebra between the passes is left to autograd, which costs little beside them on a CPU."""
    return


def compute_plain_tail(
    z: Tensor, norm: nn.Module, shortcut: Tensor | None, shortcut_norm: nn.Module | None, activation: Activation
) -> Tensor:
    """Return the tail without a gate. The addition works in the norm's output.

    A new tensor for the sum would be memory that no cache holds, which takes more time than the addition.
    """
    y = norm(z)
    if shortcut is not None:
        y.add_(shortcut if shortcut_norm is None else shortcut_norm(shortcut))
    return activate(y, activation)


def compute_gated_tail(
    z: Tensor,
    norm: nn.Module,
    gate: Gate,
    shortcut: Tensor | None,
    shortcut_norm: nn.Module | None,
    activation: Activation,
) -> Tensor:
    """Return the tail as PyTorch's operations, with gate and addition in one pass.

    Where the gate is 1 the result equals that of the block without a gate bit for bit.
    """
    b = norm(z)
    with disable_autocast(b):
        g = weigh(b, gate).expand(b.shape[:2]).reshape(*b.shape[:2], *(1,) * (b.dim() - 2)).to(b.dtype)
    out = None if torch.is_grad_enabled() else b  # the gradient of g needs b
    if shortcut is None:
        y = torch.mul(b, g, out=out)
    else:
        y = torch.addcmul(shortcut if shortcut_norm is None else shortcut_norm(shortcut), b, g, out=out)
    return activate(y, activation)


def activate(y: Tensor, activation: Activation) -> Tensor:
    """Apply the activation in ``y``'s memory."""
    if activation is None:
        return y
    return y.relu_() if activation == "relu" else y.clamp_(0, 6)


def apply_affine(x: Tensor, a: Tensor, b: Tensor | None, out: Tensor) -> Tensor:
    """Return ``a x + b`` in ``a``'s dtype, in ``out``'s memory if that is ``out``'s dtype.

    ``x`` and ``out`` are (N, C, P, 1), ``a`` and ``b`` (N, C). The faster operations depend on ``x``'s layout.
    """
    target = out if out.dtype == a.dtype else None
    if b is None:
        return torch.mul(x, broadcast_to_planes(a), out=target)
    if is_channels_last(x):
        return torch.addcmul(broadcast_to_planes(b), x.to(a.dtype), broadcast_to_planes(a), out=target)
    return torch.mul(x, broadcast_to_planes(a), out=target).add_(broadcast_to_planes(b))


def sum_products(t: Tensor, x: Tensor, mu: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``sum t (x - mu)`` and ``sum t`` over each plane, both (N, C).

    The backward of PyTorch's batch norm computes these two sums for each channel in one pass. A contiguous (N, C, P, 1)
    is also a (1, N C, P, 1), whose channels are the planes. A channels-last tensor is not, so there the samples are
    reduced one after the other if they are large, and otherwise together by elementwise operations.
    """
    n, c, p, _ = x.shape
    wide = accumulation_dtype(x.dtype)
    one = x.new_ones(c, dtype=wide)
    mean = torch.zeros_like(one) if mu is None else mu
    if not is_channels_last(x):
        sums = reduce_by_batch_norm(t.view(1, n * c, p, 1), x.view(1, n * c, p, 1), mean.repeat(n), one.repeat(n))
        return sums[0].view(n, c), sums[1].view(n, c)
    if c * p < LARGE_SAMPLE_ELEMENTS:
        centred = x.to(wide) - mean[:, None, None]
        return centred.mul_(t).sum((2, 3)), t.sum((2, 3), dtype=wide)
    sums = [reduce_by_batch_norm(t[i : i + 1], x[i : i + 1], mean, one) for i in range(n)]
    return torch.stack([s[0] for s in sums]), torch.stack([s[1] for s in sums])


def reduce_by_batch_norm(dy: Tensor, z: Tensor, mean: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum dy (z - mean)`` and ``sum dy`` of each channel.

    They are the gradients of a batch norm's weight and bias if its reciprocal standard deviation is ``one``.
    """
    _, product, total = torch.ops.aten.native_batch_norm_backward(
        dy, z, one, None, None, mean, one, True, 0.0, [False, True, True]
    )
    return product, total


def compute_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each plane of ``x`` (N, C, P, 1), in float32 or wider."""
    if x.device.type != "cpu":
        v, m = torch.var_mean(x, 2, correction=0)  # one launch; on a CPU it takes several times as long as the others
        return m.flatten(1), v.flatten(1)
    m = x.mean(2, keepdim=True)
    if is_channels_last(x) and x[0].numel() >= LARGE_SAMPLE_MOMENTS:
        return m.flatten(1), compute_native_variances(x, m.flatten(1))
    centred = x - m
    return m.flatten(1), centred.mul_(centred).mean(2).flatten(1)


def compute_native_variances(x: Tensor, m: Tensor) -> Tensor:
    """Return the variances of the planes of ``x``, whose means are ``m``, by PyTorch's own batch norm statistics.

    Those of one sample are the statistics of its planes. In channels-last PyTorch adds the numbers of a channel one
    after the other, so that its mean K may be off by many roundings. But for any K,
    ``mean (x - K)^2 = variance + (K - m)^2``.
    """
    samples = [torch.batch_norm_update_stats(x[i : i + 1], None, None, 0.0) for i in range(len(x))]
    k, v = (torch.cat(numbers).view_as(m) for numbers in zip(*samples, strict=True))
    return (v - (k - m).square()).clamp_(min=0)


def view_planes(x: Tensor) -> Tensor:
    """Return a view of a contiguous or channels-last ``x`` (N, C, ...) as (N, C, P, 1)."""
    return x.view(*x.shape[:2], x[:1, :1].numel() if x.numel() else 1, 1)


def broadcast_to_planes(a: Tensor) -> Tensor:
    """Return ``a`` (N, C) or (C,) as (N, C, 1, 1) or (C, 1, 1)."""
    return a[..., None, None]


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of one position of ``x`` (N, C, P, 1) are neighbours in memory."""
    return x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2] > 1


def split_into_groups(x: Tensor) -> Iterator[slice]:
    """Yield ranges of samples that together cover ``x``.

    On a CPU a group has about `GROUP_ELEMENTS` elements and at least one sample. On other devices one group holds all
    samples, because there each operation is a launch.
    """
    n = x.shape[0]
    step = max(1, GROUP_ELEMENTS // max(1, x[:1].numel())) if x.device.type == "cpu" else max(1, n)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
