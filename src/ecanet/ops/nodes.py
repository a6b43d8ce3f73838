"""The two autograd nodes around the algebra of a residual tail.

`_Moments` gives the mean and variance of each plane of z; `_Tail` gives y. Backward, `_Tail` sums over each plane and
`_Moments` writes dz. What `_Moments` needs from `_Tail` travels along a private autograd edge, a `GradientLink`: two
outputs of `_Moments` whose values are never read and whose "gradients" are t, the gradient before the activation, and
(a, b, mu). When gradients are themselves to be differentiated (``create_graph=True``), the link stays empty and both
nodes give the plain chain rule in differentiable PyTorch operations.
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecanet.ops.passes import Form, Passes
from ecanet.ops.reference import Activation, accumulation_dtype, scale

_announced: set[str] = set()


class GradientLink(NamedTuple):
    """Carries t (of z's shape) and a, b, mu (3, N, C) from `_Tail` back to `_Moments`."""

    t: Tensor
    form: Tensor


def moments(
    z: Tensor, passes: Passes, order: int, recomputed: Activation = None
) -> tuple[Tensor, Tensor, GradientLink]:
    """``m`` and ``v`` of each plane, and the link for `tail`.

    ``recomputed`` is the activation whose sign the backward computes again from z (no shortcut).
    """
    m, v, *link = _Moments.apply(z, passes, order, recomputed)  # pyright: ignore[reportGeneralTypeIssues]
    return m, v, GradientLink(*link)


def tail(
    z: Tensor,
    link: GradientLink,
    shortcut: Tensor | None,
    shortcut_link: GradientLink | None,
    form: Form,
    passes: Passes,
    second_output: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``y`` of the form twice; ``shortcut_link`` is the link of a shortcut that has a norm of its own.

    With ``second_output`` and a shortcut, the two are outputs of one autograd node, which adds their gradients in its
    first pass over memory. Autograd needs three passes to add the gradients of one output.
    """
    y, second = _Tail.apply(  # pyright: ignore[reportGeneralTypeIssues]
        z, *link, shortcut, *(shortcut_link or (None, None)), form.a, form.b, form.mu,
        form.shortcut_a, form.shortcut_mu, form.activation, passes, second_output and shortcut is not None,
    )  # fmt: skip
    return y, y if second is None else second


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, passes: Passes, order: int, recomputed: Activation):
        m, v = passes.moments(z, order)
        ctx.passes, ctx.order, ctx.recomputed, ctx.layout = passes, order, recomputed, layout(z)
        ctx.save_for_backward(z, m)
        ctx.set_materialize_grads(False)
        return m, v, z.new_empty(()).expand(z.shape), m.new_empty(()).expand(3, *m.shape)

    @staticmethod
    def backward(ctx: Any, dm: Tensor | None, dv: Tensor | None, t: Tensor | None, form: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        z, m = ctx.saved_tensors
        z = restore_format(z, ctx.layout)
        dm, dv = dm if ctx.order > 0 else None, dv if ctx.order > 1 else None
        if t is None or form is None:
            return _chain_rule(z, m, dm, dv), None, None, None
        a, b, mu = form
        mu = mu[0] if len(mu) else None
        return ctx.passes.grads(t, z, Form(a=a, b=b, mu=mu, activation=ctx.recomputed), m, dm, dv), None, None, None


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, link_t: Tensor, link_form: Tensor,
        shortcut: Tensor | None, shortcut_link_t: Tensor | None, shortcut_link_form: Tensor | None,
        a: Tensor, b: Tensor | None, mu: Tensor | None, shortcut_a: Tensor | None, shortcut_mu: Tensor | None,
        activation: Activation, passes: Passes, second_output: bool,
    ):  # fmt: skip
        form = Form(a=a, b=b, mu=mu, shortcut_a=shortcut_a, shortcut_mu=shortcut_mu, activation=activation)
        y, kept = passes.apply(z, shortcut, form)
        ctx.passes, ctx.activation, ctx.has_shortcut = passes, activation, shortcut is not None
        ctx.layout = layout(z)  # neither a compiler nor a hook on saved tensors keeps it for the backward
        # a plain shortcut is not needed again: its gradient is t
        ctx.save_for_backward(z, kept, shortcut if shortcut_a is not None else None, a, b, mu, shortcut_a, shortcut_mu)
        ctx.set_materialize_grads(False)
        return y, y.view_as(y) if second_output else None

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, second_dy: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, second_dy = (second_dy, None) if dy is None else (dy, second_dy)
        if dy is None:
            return (None,) * 14
        z, kept, shortcut, a, b, mu, shortcut_a, shortcut_mu = ctx.saved_tensors
        z, kept, shortcut = (restore_format(x, ctx.layout) for x in (z, kept, shortcut))
        form = Form(a=a, b=b, mu=mu, shortcut_a=shortcut_a, shortcut_mu=shortcut_mu, activation=ctx.activation)
        if torch.is_grad_enabled() or is_batched(dy) or is_batched(second_dy):
            _announce()
            return _differentiable(ctx, dy if second_dy is None else dy + second_dy, z, kept, shortcut, form)
        dy, second_dy = restore_format(dy, ctx.layout), restore_format(second_dy, ctx.layout)
        da, db, ds, t = ctx.passes.reduce(dy, second_dy, kept, z, shortcut, form)
        link = a.expand(3, *a.shape)
        if kept is None and form.activation is not None and b is not None and mu is not None:
            link = torch.stack((a, b, mu.expand_as(a)))
        dmu = None if mu is None else -(a * db).sum(0)
        if shortcut_a is None:
            side = (t if ctx.has_shortcut else None, None, None)
            side_dmu = None
        else:
            side = (None, t, shortcut_a.expand(3, *a.shape))
            side_dmu = -(shortcut_a * db).sum(0)
        return None, t, link, *side, da, None if b is None else db, dmu, ds, side_dmu, None, None, None


def _chain_rule(z: Tensor, m: Tensor, dm: Tensor | None, dv: Tensor | None) -> Tensor | None:
    """``dm / P + 2 (z - m) dv / P``, differentiable."""
    positions = max(1, z[:1, :1].numel())
    shape = (*m.shape, *(1,) * (z.dim() - 2))
    dz = None if dm is None else (dm / positions).reshape(shape).expand_as(z)
    if dv is not None:
        part = (z - m.reshape(shape)) * (dv * (2 / positions)).reshape(shape)
        dz = part if dz is None else dz + part
    return None if dz is None else dz.to(z.dtype)


def _differentiable(ctx: Any, dy: Tensor, z: Tensor, kept: Tensor | None, shortcut: Tensor | None, form: Form):
    """The true gradients of `_Tail`, in differentiable operations."""
    axes = tuple(range(2, z.dim()))
    wide = accumulation_dtype(z.dtype)

    def centred(x: Tensor, mu: Tensor | None) -> Tensor:
        return x.to(wide) if mu is None else x.to(wide) - mu.reshape(-1, *(1,) * len(axes))

    def total(x: Tensor) -> Tensor:
        return x.sum(axes) if axes else x

    t = dy.to(wide)
    if kept is not None:
        t = t * ctx.passes.active(kept, z, form)
    elif form.activation is not None:
        y = scale(centred(z, form.mu), form.a) + (
            0 if form.b is None else form.b.reshape(*form.b.shape, *(1,) * len(axes))
        )
        t = t * (~(y <= 0) if form.activation == "relu" else (y > 0) & (y < 6))
    da, db = total(t * centred(z, form.mu)), total(t)
    dmu = None if form.mu is None else -(form.a * db).sum(0)
    dz = scale(t, form.a).to(z.dtype)
    dshortcut = t.to(z.dtype) if ctx.has_shortcut else None
    ds = side_dmu = None
    if shortcut is not None and form.shortcut_a is not None and form.shortcut_mu is not None:
        ds = total(t * centred(shortcut, form.shortcut_mu))
        side_dmu = -(form.shortcut_a * db).sum(0)
        dshortcut = scale(t, form.shortcut_a).to(z.dtype)
    db = None if form.b is None else db
    return dz, None, None, dshortcut, None, None, da, db, dmu, ds, side_dmu, None, None, None


def layout(z: Tensor) -> torch.memory_format:
    """How ``z`` lies in memory: contiguous, or channels-last."""
    if z.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if z.dim() == 4 else torch.channels_last_3d


def is_batched(gradient: Tensor | None) -> bool:
    """Whether ``gradient`` is many at once (``is_grads_batched=True``, `torch.func.vmap`)."""
    if gradient is None or torch.compiler.is_compiling():
        return False
    return "Batched" in str(torch._C._dispatch_keys(gradient))


def restore_format(x: Any, memory_format: torch.memory_format) -> Any:
    """``x`` in that layout; None, and bits, whose layout is their own, as they are."""
    return x if x is None or x.dtype == torch.uint8 else x.contiguous(memory_format=memory_format)


def _announce() -> None:
    if "create_graph" not in _announced:
        _announced.add("create_graph")
        warnings.warn(
            "gradients with create_graph=True, or many at once, run in plain PyTorch operations, in more passes",
            stacklevel=2,
        )
