"""A residual tail as one autograd node: the passes over memory and, between them, the algebra in one kernel each way.

`ops.nodes` leaves the algebra to autograd, which takes tens of small operations for each tail. This node computes the
same for batch norms on one process and for gates of the form `channel_gates.ChannelGate`.
"""

from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ecanet.ops import nodes, tail
from ecanet.ops.channel_gates import ChannelGate, compute_weights, describe_gate
from ecanet.ops.reference import Activation, Gate, accumulation_dtype, scale
from ecanet.ops.triton.coefficients import (
    CoefficientGrads,
    Coefficients,
    GateKind,
    Norm,
    NormKind,
    NormLaunches,
    compute_coefficient_grads,
    compute_coefficients,
    describe_norm,
    prepare_norm,
)
from ecanet.ops.triton.tiles import Grid, Launch, find_grid, prepare_apply, prepare_reduce, unpack_bits


class TailKind(NamedTuple):
    """What the launches of a tail depend on, apart from its grid."""

    norm: NormKind
    side: NormKind | None
    """The norm of the shortcut."""
    gate: GateKind | None
    activation: Activation
    has_shortcut: bool


class Plan(NamedTuple):
    """What a tail consists of, apart from the tensors that have gradients."""

    kind: TailKind
    norm: Norm
    side: Norm | None
    second_output: bool


class TailLaunches(NamedTuple):
    """The launches of one kind of tail."""

    grid: Grid
    norm: NormLaunches
    side: NormLaunches | None
    apply: Launch
    reduce: tuple[Launch, Launch]
    """For one gradient of the output, and for two."""
    sums_shape: tuple[int, ...]
    keeps_bits: bool


@lru_cache(maxsize=4096)
def prepare_tail(grid: Grid, kind: TailKind) -> TailLaunches:
    """Return the launches of a tail. To look up one of them for each launch takes longer than the launch."""
    n, c, gated, normed = grid.samples, grid.channels, kind.gate is not None, kind.side is not None
    activation, keeps_bits = kind.activation, kind.has_shortcut and kind.activation is not None
    addend = None if kind.side is None else kind.side.dtypes[1]
    a_at, b_at = (0, n * c) if gated else (2 * c, 3 * c)  # in the planes' coefficients, or in the channels'
    shortcut = 0 if not kind.has_shortcut else 2 if normed else 1
    # without a shortcut the sign is recomputed from z
    again = None if kind.has_shortcut else activation
    return TailLaunches(
        grid=grid,
        norm=prepare_norm(grid, 0, kind.norm, kind.gate, addend, again),
        side=None if kind.side is None else prepare_norm(grid, 2, kind.side, None, None, None),
        apply=prepare_apply(grid, gated, True, True, shortcut, activation, keeps_bits, (a_at, b_at, 2 * c)),
        reduce=(
            prepare_reduce(grid, gated, True, True, normed, activation, False, keeps_bits, (a_at, b_at)),
            prepare_reduce(grid, gated, True, True, normed, activation, True, keeps_bits, (a_at, b_at)),
        ),
        sums_shape=(3 if normed else 2, grid.parts, n, c),
        keeps_bits=keeps_bits,
    )


class _Context(Protocol):
    plan: Plan
    run: TailLaunches
    coefficients: Coefficients
    side: Coefficients | None
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def run_tail(
    z: Tensor,
    norm: nn.Module,
    gate: Gate | None,
    shortcut: Tensor | None,
    shortcut_norm: nn.Module | None,
    activation: Activation,
    second_output: bool,
) -> tuple[Tensor, Tensor] | None:
    """Return `ops.tail.residual_tail`; None where this node does not apply.

    It does not under `torch.compile`, which leaves only operators whole, for other gates and empty tensors, and where
    sizes do not fit, which PyTorch's own operations report.
    """
    if torch.compiler.is_compiling() or not z.numel():
        return None
    main, side, weight, bias, kind = describe_norm(norm, z), None, None, None, None
    if gate is not None:
        form = describe_gate(gate, z.shape[1])
        if form is None:
            return None
        weight, bias = form.weight, form.bias
        dtypes = None if weight is None else weight.dtype, None if bias is None else bias.dtype
        kind = GateKind(form.gain, form.taps, form.own_taps, form.circular, dtypes)
    if shortcut is not None and shortcut_norm is not None:
        side = describe_norm(shortcut_norm, z)
        if side is None:
            return None
    if main is None:
        return None
    has_shortcut = shortcut is not None
    kinds = TailKind(main.kind, None if side is None else side.kind, kind, activation, has_shortcut)
    plan = Plan(kinds, main, side, second_output and has_shortcut)
    affine = main.weight, main.bias, None if side is None else side.weight, None if side is None else side.bias
    with nodes.enter_device(z):
        y, second = _Tail.apply(z, shortcut, *affine, weight, bias, plan)  # pyright: ignore[reportGeneralTypeIssues]
    return y, y if second is None else second


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, z: Tensor, shortcut: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        side_weight: Tensor | None, side_bias: Tensor | None, taps: Tensor | None, gate_bias: Tensor | None, plan: Plan,
    ):  # fmt: skip
        grid = find_grid(z)
        run = prepare_tail(grid, plan.kind)
        side, side_channels, kept = None, None, None
        # synchronised norms sum in the order of `ops.tail`, which runs in a process whose batch is empty
        own = compute_coefficients(z, grid, run.norm, plan.norm, side_bias, taps, gate_bias)
        if run.side is not None and plan.side is not None and shortcut is not None:
            side = compute_coefficients(shortcut, grid, run.side, plan.side, None, None, None)
            side_channels, kept = side.channels, shortcut  # without a norm it is not needed again: its gradient is t
        y = torch.empty_like(z)
        bits = z.new_empty(grid.bits, dtype=torch.uint8) if run.keeps_bits else None
        source = own.channels if own.planes is None else own.planes
        run.apply(z, shortcut, y, bits, source, source, own.channels, side_channels, side_channels)
        ctx.plan, ctx.run, ctx.coefficients, ctx.side = plan, run, own, side
        ctx.save_for_backward(z, kept, weight, bias, side_weight, side_bias, taps, gate_bias, bits)
        ctx.set_materialize_grads(False)  # an unused output must arrive as None, not as a tensor of zeros to add
        return y, y.view_as(y) if plan.second_output else None

    @staticmethod
    def backward(ctx: _Context, dy: Tensor | None, second_dy: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, second_dy = (second_dy, None) if dy is None else (dy, second_dy)
        if dy is None:
            return (None,) * 9
        z, shortcut, *parameters, bits = ctx.saved_tensors
        layout = ctx.run.grid.layout  # hooks on saved tensors may return z in another one
        z, shortcut = nodes.restore_layout(z, layout), nodes.restore_layout(shortcut, layout)
        if torch.is_grad_enabled() or nodes.is_batched(dy) or nodes.is_batched(second_dy):
            nodes.warn_of_slow_gradients()
            return _differentiate(ctx, dy if second_dy is None else dy + second_dy, z, shortcut, parameters, bits)
        dy, second_dy = nodes.restore_layout(dy, layout), nodes.restore_layout(second_dy, layout)
        with nodes.enter_device(z):
            return _run_backward(ctx, dy, second_dy, z, shortcut, parameters, bits)


def _run_backward(
    ctx: _Context, dy: Tensor, second_dy: Tensor | None, z: Tensor, shortcut: Tensor | None,
    parameters: list[Tensor | None], bits: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of all inputs of `_Tail`."""
    plan, run, known, side_known = ctx.plan, ctx.run, ctx.coefficients, ctx.side
    two = second_dy is not None
    sums = z.new_empty(run.sums_shape, dtype=run.grid.wide)
    t = torch.empty_like(z) if two or bits is not None else dy
    source = known.channels if known.planes is None else known.planes
    written, side_channels = None if t is dy else t, None if side_known is None else side_known.channels
    run.reduce[two](dy, second_dy, bits, z, shortcut, written, source, source, known.channels, side_channels, sums)
    dz, dshortcut, dside_weight, dside_bias = None, t if plan.kind.has_shortcut else None, None, None
    # synchronised norms sum in the order in which autograd runs `ops.tail`: the last norm first
    if side_known is not None and plan.side is not None and run.side is not None and shortcut is not None:
        side = compute_coefficient_grads(sums, run.side, plan.side, side_known, None, None)
        dside_weight, dside_bias = side.dweight, side.dbias
        if ctx.needs_input_grad[1]:
            dshortcut = _write_gradient(t, shortcut, run.side, side_known.channels, side_known.channels, side)
    own = compute_coefficient_grads(sums, run.norm, plan.norm, known, parameters[4], parameters[5])
    if ctx.needs_input_grad[0]:
        dz = _write_gradient(t, z, run.norm, source, known.channels, own)
    return dz, dshortcut, own.dweight, own.dbias, dside_weight, dside_bias, own.dtaps, own.dgate_bias, None


def _write_gradient(
    t: Tensor, z: Tensor, run: NormLaunches, source: Tensor, channels: Tensor, found: CoefficientGrads
) -> Tensor:
    """Return the gradient of one input of the tail. ``source`` contains its coefficients a and b."""
    dz = torch.empty_like(z)
    run.grads(t, z if run.reads_input else None, dz, source, source, channels, None, found.dmean, found.dvariance)
    return dz


# gradients that are differentiated themselves, or come in a batch


def _differentiate(
    ctx: _Context, dy: Tensor, z: Tensor, shortcut: Tensor | None, parameters: list[Tensor | None], bits: Tensor | None
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients in differentiable operations: those of the tail computed again from its inputs."""
    plan, create_graph = ctx.plan, torch.is_grad_enabled()
    with torch.enable_grad():
        # views, because one tensor may be several of the inputs
        inputs = [None if x is None else x.view_as(x) for x in (z, shortcut, *parameters)]
        y = compute_branch(inputs, plan, ctx.coefficients.channels, None if ctx.side is None else ctx.side.channels)
        t = dy.to(y.dtype)
        if bits is not None:
            t = t * unpack_bits(bits, z)
        elif plan.kind.activation is not None:
            t = t * (~(y <= 0) if plan.kind.activation == "relu" else (y > 0) & (y < 6))
        needed = [x is not None and need for x, need in zip(inputs, ctx.needs_input_grad, strict=False)]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, t, create_graph=create_graph) if wanted else ())
    gradients = [next(found) if need else None for need in needed]
    if plan.kind.has_shortcut and shortcut is None:
        gradients[1] = t.to(z.dtype)
    return *gradients, None


def compute_branch(inputs: list[Tensor | None], plan: Plan, channels: Tensor, side_channels: Tensor | None) -> Tensor:
    """Return the tail before its activation, without a shortcut that has no norm, in PyTorch's operations."""
    z, shortcut, weight, bias, side_weight, side_bias, taps, gate_bias = inputs
    assert z is not None
    y = _normalize(z, plan.norm, weight, bias, channels)
    if plan.kind.gate is not None:
        p = y.flatten(2).mean(2) if y.dim() > 2 else y
        gain, k, own_taps, circular, _ = plan.kind.gate
        y = scale(y, compute_weights(p, ChannelGate(taps, gate_bias, k, own_taps, circular, gain)))
    if plan.side is not None and shortcut is not None and side_channels is not None:
        y = y + _normalize(shortcut, plan.side, side_weight, side_bias, side_channels)
    return y


def _normalize(z: Tensor, norm: Norm, weight: Tensor | None, bias: Tensor | None, channels: Tensor) -> Tensor:
    x = z.to(accumulation_dtype(z.dtype))
    shape, axes = (-1, *(1,) * (z.dim() - 2)), (0, *range(2, z.dim()))
    if norm.group is not None:
        wide = x.double()
        mean, variance, _ = tail.average_over_processes(
            wide.sum(axes), wide.square().sum(axes), x[:, 0].numel(), norm.group
        )
        y = (x - mean.to(x.dtype).view(shape)) * torch.rsqrt(variance.to(x.dtype).view(shape) + norm.kind.eps)
    elif norm.kind.by_batch:
        d = x - x.mean(axes, keepdim=True)
        y = d * torch.rsqrt(d.square().mean(axes, keepdim=True) + norm.kind.eps)
    else:
        y = (x - channels[0].view(shape)) * channels[1].view(shape)
    y = y if weight is None else y * weight.to(x.dtype).view(shape)
    return y if bias is None else y + bias.to(x.dtype).view(shape)
