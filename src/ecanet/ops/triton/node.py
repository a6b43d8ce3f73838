"""A residual tail as one autograd node: the passes over memory and, between them, the algebra in one kernel each way.

`ops.nodes` leaves the algebra to autograd, which takes tens of small operations for each tail. This node computes the
same for batch norms on one process and for gates of the form `channel_gates.ChannelGate`.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ecanet.ops import nodes
from ecanet.ops.channel_gates import ChannelGate, compute_weights, describe_gate
from ecanet.ops.reference import Activation, Gate, accumulation_dtype, scale
from ecanet.ops.triton.coefficients import (
    CoefficientGrads,
    GateKind,
    Norm,
    compute_coefficient_grads,
    compute_coefficients,
    describe_norm,
)
from ecanet.ops.triton.tiles import Grid, find_grid, prepare_apply, prepare_grads, prepare_reduce, unpack_bits


class Plan(NamedTuple):
    """What a tail consists of, apart from its tensors."""

    norm: Norm
    side: Norm | None
    """The norm of the shortcut."""
    gate: GateKind | None
    activation: Activation
    second_output: bool


class _Context(Protocol):
    plan: Plan
    layout: torch.memory_format
    has_shortcut: bool
    grid: Grid
    channels: Tensor
    planes: Tensor | None
    side_channels: Tensor | None
    coefficients: tuple[Tensor, Tensor, Tensor]
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

    It does not under `torch.compile`, which leaves only operators whole, for synchronised norms, other gates and empty
    tensors, and where sizes do not fit, which PyTorch's own operations report.
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
    plan = Plan(main, side, kind, activation, second_output and shortcut is not None)
    affine = main.weight, main.bias, None if side is None else side.weight, None if side is None else side.bias
    with torch.cuda.device_of(z):
        y, second = _Tail.apply(z, shortcut, *affine, weight, bias, plan)  # pyright: ignore[reportGeneralTypeIssues]
    return y, y if second is None else second


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, z: Tensor, shortcut: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        side_weight: Tensor | None, side_bias: Tensor | None, taps: Tensor | None, gate_bias: Tensor | None, plan: Plan,
    ):  # fmt: skip
        grid = find_grid(z)
        side_channels, side_a, side_mu = None, None, None
        if plan.side is not None and shortcut is not None:
            side_channels, _ = compute_coefficients(shortcut, grid, plan.side, None, None, None, None)
            side_mu, _, side_a, _ = side_channels.unbind()
        channels, planes = compute_coefficients(z, grid, plan.norm, plan.gate, side_bias, taps, gate_bias)
        mu, _, a, b = channels.unbind()
        if planes is not None:
            a, b, _, _ = planes.unbind()
        y = torch.empty_like(z)
        keep = shortcut is not None and plan.activation is not None
        bits = z.new_empty(grid.bits, dtype=torch.uint8) if keep else None
        kind = 0 if shortcut is None else 1 if side_a is None else 2
        apply = prepare_apply(grid, planes is not None, True, True, kind, plan.activation, keep)
        apply(z, shortcut, y, bits, a, b, mu, side_a, side_mu)
        ctx.plan, ctx.layout, ctx.has_shortcut = plan, nodes.find_layout(z), shortcut is not None
        ctx.grid, ctx.channels, ctx.planes, ctx.side_channels = grid, channels, planes, side_channels
        ctx.coefficients = a, b, mu
        # a shortcut without a norm is not needed again: its gradient is t
        kept = shortcut if side_a is not None else None
        ctx.save_for_backward(z, kept, weight, bias, side_weight, side_bias, taps, gate_bias, bits)
        ctx.set_materialize_grads(False)  # an unused output must arrive as None, not as a tensor of zeros to add
        return y, y.view_as(y) if plan.second_output else None

    @staticmethod
    def backward(ctx: _Context, dy: Tensor | None, second_dy: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, second_dy = (second_dy, None) if dy is None else (dy, second_dy)
        if dy is None:
            return (None,) * 9
        z, shortcut, *parameters, bits = ctx.saved_tensors
        z, shortcut = nodes.restore_layout(z, ctx.layout), nodes.restore_layout(shortcut, ctx.layout)
        if torch.is_grad_enabled() or nodes.is_batched(dy) or nodes.is_batched(second_dy):
            nodes.warn_of_slow_gradients()
            return _differentiate(ctx, dy if second_dy is None else dy + second_dy, z, shortcut, parameters, bits)
        dy, second_dy = nodes.restore_layout(dy, ctx.layout), nodes.restore_layout(second_dy, ctx.layout)
        with torch.cuda.device_of(z):
            return _run_backward(ctx, dy, second_dy, z, shortcut, parameters, bits)


def _run_backward(
    ctx: _Context, dy: Tensor, second_dy: Tensor | None, z: Tensor, shortcut: Tensor | None,
    parameters: list[Tensor | None], bits: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of all inputs of `_Tail`."""
    plan, grid, channels, planes, side_channels = ctx.plan, ctx.grid, ctx.channels, ctx.planes, ctx.side_channels
    a, b, mu = ctx.coefficients
    gated, two = planes is not None, second_dy is not None
    side_mu, side_a = (None, None) if side_channels is None else (side_channels[0], side_channels[2])
    sums = z.new_empty((2 if side_mu is None else 3, grid.parts, grid.samples, grid.channels), dtype=grid.wide)
    writes = bits is not None or two
    t = torch.empty_like(z) if writes else dy
    reduce = prepare_reduce(grid, gated, True, True, side_mu is not None, plan.activation, two, bits is not None)
    reduce(dy, second_dy, bits, z, shortcut, t if writes else None, a, b, mu, side_mu, sums)
    own = compute_coefficient_grads(grid, sums, 0, channels, planes, plan.norm, plan.gate, parameters[4], parameters[5])
    dz, dshortcut, side_affine = None, t if ctx.has_shortcut else None, (None, None)
    if ctx.needs_input_grad[0]:
        again = None if ctx.has_shortcut else plan.activation  # without a shortcut the sign is recomputed from z
        dz = _write_gradient(grid, t, z, a, b, mu, own, again)
    if side_channels is not None and side_a is not None and side_mu is not None and plan.side is not None:
        side = compute_coefficient_grads(grid, sums, 2, side_channels, None, plan.side, None, None, None)
        side_affine = side.daffine.unbind()
        if ctx.needs_input_grad[1] and shortcut is not None:
            dshortcut = _write_gradient(grid, t, shortcut, side_a, None, side_mu, side, None)
    affine = (*own.daffine.unbind(), *side_affine)
    affine = [d if x is not None else None for d, x in zip(affine, parameters[:4], strict=True)]
    return dz, dshortcut, *affine, own.dtaps, own.dgate_bias, None


def _write_gradient(
    grid: Grid, t: Tensor, z: Tensor, a: Tensor, b: Tensor | None, mu: Tensor, found: CoefficientGrads,
    activation: Activation,
) -> Tensor:  # fmt: skip
    """Return the gradient of one input of the tail."""
    dz = torch.empty_like(z)
    by_batch = found.dvariance is not None
    if activation is None:
        b = None
    run = prepare_grads(
        grid, a.dim() == 2, False, b is not None, b is not None, found.dmean is not None, by_batch, activation
    )
    read = z if by_batch or activation is not None else None
    run(t, read, dz, a, b, mu, mu, found.dmean, found.dvariance)
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
        y = compute_branch(inputs, plan, ctx.channels, ctx.side_channels)
        t = dy.to(y.dtype)
        if bits is not None:
            t = t * unpack_bits(bits, z)
        elif plan.activation is not None:
            t = t * (~(y <= 0) if plan.activation == "relu" else (y > 0) & (y < 6))
        needed = [x is not None and need for x, need in zip(inputs, ctx.needs_input_grad, strict=False)]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, t, create_graph=create_graph) if wanted else ())
    gradients = [next(found) if need else None for need in needed]
    if ctx.has_shortcut and shortcut is None:
        gradients[1] = t.to(z.dtype)
    return *gradients, None


def compute_branch(inputs: list[Tensor | None], plan: Plan, channels: Tensor, side_channels: Tensor | None) -> Tensor:
    """Return the tail before its activation, without a shortcut that has no norm, in PyTorch's operations."""
    z, shortcut, weight, bias, side_weight, side_bias, taps, gate_bias = inputs
    assert z is not None
    y = _normalize(z, plan.norm, weight, bias, channels)
    if plan.gate is not None:
        p = y.flatten(2).mean(2) if y.dim() > 2 else y
        gain, k, own_taps, circular, _ = plan.gate
        y = scale(y, compute_weights(p, ChannelGate(taps, gate_bias, k, own_taps, circular, gain)))
    if plan.side is not None and shortcut is not None and side_channels is not None:
        y = y + _normalize(shortcut, plan.side, side_weight, side_bias, side_channels)
    return y


def _normalize(z: Tensor, norm: Norm, weight: Tensor | None, bias: Tensor | None, channels: Tensor) -> Tensor:
    x = z.to(accumulation_dtype(z.dtype))
    shape, axes = (-1, *(1,) * (z.dim() - 2)), (0, *range(2, z.dim()))
    if norm.kind.by_batch:
        d = x - x.mean(axes, keepdim=True)
        y = d * torch.rsqrt(d.square().mean(axes, keepdim=True) + norm.kind.eps)
    else:
        y = (x - channels[0].view(shape)) * channels[1].view(shape)
    y = y if weight is None else y * weight.to(x.dtype).view(shape)
    return y if bias is None else y + bias.to(x.dtype).view(shape)
