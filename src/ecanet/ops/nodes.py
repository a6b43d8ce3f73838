"""The two autograd nodes around the algebra of a residual tail, and the link between them.

`_Moments` computes mean and variance of each plane of z, `_Tail` computes y. In the backward `_Tail` computes t, the
gradient before the activation, and its sums over each plane. Then `_Moments` writes dz in one pass, for which it needs
t and the coefficients a, b and mu.

A `GradientLink` carries them from the one backward to the other. It is a pair of outputs of `_Moments` that are inputs
of `_Tail`. Nobody reads their values. Their "gradients", which `_Tail.backward` returns and autograd hands to
`_Moments.backward`, are t and the coefficients. So autograd itself runs the nodes in the right order and frees t. There
is no state outside the graph that could go wrong in a second backward, another thread or a checkpoint.

Where gradients are themselves differentiated (``create_graph=True``) or come in a batch, such "gradients" would be
wrong. There the link stays empty, and both nodes apply the plain chain rule in differentiable PyTorch operations.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ecanet.ops.passes import Form, Passes
from ecanet.ops.reference import Activation, accumulation_dtype, scale

T = TypeVar("T", bound=Tensor | None)

_warned: set[str] = set()

_NOTHING = nullcontext()


class GradientLink(NamedTuple):
    """Two outputs of `_Moments` whose gradients are t (of z's shape) and the coefficients a, b, mu (3, N, C)."""

    t: Tensor
    coefficients: Tensor


class _Context(Protocol):
    """The attributes that both nodes keep for their backward."""

    passes: Passes
    layout: torch.memory_format
    saved_tensors: tuple[Any, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class _MomentsContext(_Context, Protocol):
    order: int
    recomputed: Activation


class _TailContext(_Context, Protocol):
    activation: Activation
    has_shortcut: bool


def compute_moments(
    z: Tensor, passes: Passes, order: int, recomputed: Activation = None
) -> tuple[Tensor, Tensor, GradientLink]:
    """Return mean and variance of each plane, and the link for `apply_tail`.

    ``recomputed`` is the activation whose sign the backward recomputes from z (tails without a shortcut).
    """
    m, v, *link = _Moments.apply(z, passes, order, recomputed)  # pyright: ignore[reportGeneralTypeIssues]
    return m, v, GradientLink(*link)


def apply_tail(
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
    def forward(ctx: _MomentsContext, z: Tensor, passes: Passes, order: int, recomputed: Activation):
        m, v = passes.moments(z, order)
        ctx.passes, ctx.order, ctx.recomputed, ctx.layout = passes, order, recomputed, find_layout(z)
        ctx.save_for_backward(z, m)
        ctx.set_materialize_grads(False)  # an empty link must arrive as None, not as zeros
        # the link: gradients must have their output's shape, so one number is expanded to it and takes no memory
        link = z.new_empty(()).expand(z.shape), m.new_empty(()).expand(3, *m.shape)
        if torch.compiler.is_compiling():  # where the graph breaks, PyTorch sums gradients to that one number
            link = torch.empty_like(z), m.new_empty(3, *m.shape)
        return m, v, *link

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _MomentsContext, dm: Tensor | None, dv: Tensor | None, t: Tensor | None, coefficients: Tensor | None
    ):
        z, m = ctx.saved_tensors
        z = restore_layout(z, ctx.layout)
        dm, dv = dm if ctx.order > 0 else None, dv if ctx.order > 1 else None
        if t is None or coefficients is None:
            return _apply_chain_rule(z, m, dm, dv), None, None, None
        a, b, mu = coefficients
        mu = mu[0] if len(mu) else None  # (N, C) with equal rows; none for an empty batch
        form = Form(a=a, b=b, mu=mu, activation=ctx.recomputed)
        return ctx.passes.grads(t, z, form, m, dm, dv), None, None, None


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _TailContext, z: Tensor, link_t: Tensor, link_coefficients: Tensor,
        shortcut: Tensor | None, shortcut_link_t: Tensor | None, shortcut_link_coefficients: Tensor | None,
        a: Tensor, b: Tensor | None, mu: Tensor | None, shortcut_a: Tensor | None, shortcut_mu: Tensor | None,
        activation: Activation, passes: Passes, second_output: bool,
    ):  # fmt: skip
        form = Form(a=a, b=b, mu=mu, shortcut_a=shortcut_a, shortcut_mu=shortcut_mu, activation=activation)
        y, kept = passes.apply(z, shortcut, form)
        ctx.passes, ctx.activation, ctx.has_shortcut = passes, activation, shortcut is not None
        ctx.layout = find_layout(z)  # compilers and hooks on saved tensors may return z in another one
        # a shortcut without a norm is not needed again: its gradient is t
        ctx.save_for_backward(z, kept, shortcut if shortcut_a is not None else None, a, b, mu, shortcut_a, shortcut_mu)
        ctx.set_materialize_grads(False)  # an unused output must arrive as None, not as a tensor of zeros to add
        return y, y.view_as(y) if second_output else None

    @staticmethod
    def backward(ctx: _TailContext, dy: Tensor | None, second_dy: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, second_dy = (second_dy, None) if dy is None else (dy, second_dy)
        if dy is None:
            return (None,) * 14
        z, kept, shortcut, a, b, mu, shortcut_a, shortcut_mu = ctx.saved_tensors
        z, kept, shortcut = (restore_layout(x, ctx.layout) for x in (z, kept, shortcut))
        form = Form(a=a, b=b, mu=mu, shortcut_a=shortcut_a, shortcut_mu=shortcut_mu, activation=ctx.activation)
        if torch.is_grad_enabled() or is_batched(dy) or is_batched(second_dy):
            warn_of_slow_gradients()
            return _differentiate(ctx, dy if second_dy is None else dy + second_dy, z, kept, shortcut, form)
        dy, second_dy = restore_layout(dy, ctx.layout), restore_layout(second_dy, ctx.layout)
        da, db, ds, t = ctx.passes.reduce(dy, second_dy, kept, z, shortcut, form)
        coefficients = a.expand(3, *a.shape)  # without a sign to recompute, `_Moments` reads only a
        if kept is None and form.activation is not None and b is not None and mu is not None:
            coefficients = torch.stack((a, b, mu.expand_as(a)))
        # y contains a (z - mu), so dy/dmu = -a; what mu does to m and v is differentiated by autograd
        dmu = None if mu is None else -(a * db).sum(0)
        if shortcut_a is None:
            to_shortcut = (t if ctx.has_shortcut else None, None, None)
            dshortcut_mu = None
        else:
            to_shortcut = (None, t, shortcut_a.expand(3, *a.shape))
            dshortcut_mu = -shortcut_a * db.sum(0)
            ds = None if ds is None else ds.sum(0)
        db = None if b is None else db
        return None, t, coefficients, *to_shortcut, da, db, dmu, ds, dshortcut_mu, None, None, None


def _apply_chain_rule(z: Tensor, m: Tensor, dm: Tensor | None, dv: Tensor | None) -> Tensor | None:
    """Return ``dm / P + 2 (z - m) dv / P`` in differentiable operations."""
    positions = max(1, z[:1, :1].numel())
    shape = (*m.shape, *(1,) * (z.dim() - 2))
    dz = None if dm is None else (dm / positions).reshape(shape).expand_as(z)
    if dv is not None:
        by_variance = (z - m.reshape(shape)) * (dv * (2 / positions)).reshape(shape)
        dz = by_variance if dz is None else dz + by_variance
    return None if dz is None else dz.to(z.dtype)


def _differentiate(
    ctx: _TailContext, dy: Tensor, z: Tensor, kept: Tensor | None, shortcut: Tensor | None, form: Form
) -> tuple[Tensor | None, ...]:
    """Return the true gradients of `_Tail` in differentiable operations, with an empty link."""
    axes = tuple(range(2, z.dim()))
    wide = accumulation_dtype(z.dtype)

    def centre(x: Tensor, mu: Tensor | None) -> Tensor:
        return x.to(wide) if mu is None else x.to(wide) - mu.reshape(-1, *(1,) * len(axes))

    def sum_planes(x: Tensor) -> Tensor:
        return x.sum(axes) if axes else x

    t = dy.to(wide)
    if kept is not None:
        t = t * ctx.passes.find_active(kept, z, form)
    elif form.activation is not None:
        y = scale(centre(z, form.mu), form.a)
        if form.b is not None:
            y = y + form.b.reshape(*form.b.shape, *(1,) * len(axes))
        t = t * (~(y <= 0) if form.activation == "relu" else (y > 0) & (y < 6))
    da, db = sum_planes(t * centre(z, form.mu)), sum_planes(t)
    dmu = None if form.mu is None else -(form.a * db).sum(0)
    dz = scale(t, form.a).to(z.dtype)
    dshortcut = t.to(z.dtype) if ctx.has_shortcut else None
    ds = dshortcut_mu = None
    if shortcut is not None and form.shortcut_a is not None and form.shortcut_mu is not None:
        ds = sum_planes(t * centre(shortcut, form.shortcut_mu)).sum(0)
        dshortcut_mu = -form.shortcut_a * db.sum(0)
        dshortcut = scale(t, form.shortcut_a.expand_as(db)).to(z.dtype)
    db = None if form.b is None else db
    return dz, None, None, dshortcut, None, None, da, db, dmu, ds, dshortcut_mu, None, None, None


def find_layout(z: Tensor) -> torch.memory_format:
    """Return the memory format of ``z``, which is contiguous or channels-last."""
    if z.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if z.dim() == 4 else torch.channels_last_3d


def restore_layout(x: T, layout: torch.memory_format) -> T:
    """Return ``x`` in that memory format. None and bit masks (uint8), which have their own, are returned unchanged."""
    if x is None or x.dtype == torch.uint8:
        return x
    return cast(T, x.contiguous(memory_format=layout))


def enter_device(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the device of ``x`` is the current one, as launches need it."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device_of(x)


def is_batched(gradient: Tensor | None) -> bool:
    """Return whether ``gradient`` is a batch of gradients (``is_grads_batched=True``, `torch.func.vmap`)."""
    if gradient is None or torch.compiler.is_compiling():
        return False
    return _contains_batch(torch._C._dispatch_keys(gradient).raw_repr())  # pyright: ignore[reportPrivateUsage]


@lru_cache(maxsize=1024)
def _contains_batch(keys: int) -> bool:
    return "Batched" in str(torch._C.DispatchKeySet.from_raw_repr(keys))  # pyright: ignore[reportPrivateUsage]


def warn_of_slow_gradients() -> None:
    """Warn once that gradients are computed in plain PyTorch operations."""
    if "slow" not in _warned:
        _warned.add("slow")
        warnings.warn(
            "gradients with create_graph=True or is_grads_batched=True run in plain PyTorch operations, which take "
            "more passes over memory",
            stacklevel=2,
        )
