"""A residual tail as one autograd node: the passes over memory and, between them, the algebra in one kernel each way.

`ops.nodes` leaves the algebra to autograd, which takes tens of small operations for each tail. This node computes the
same for batch norms on one process and for gates of the form `channel_gates.ChannelGate`.
"""

# pyright: reportArgumentType=false

from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import torch
import triton
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from ecanet.ops import nodes, tail
from ecanet.ops.channel_gates import ChannelGate, compute_weights, describe_gate
from ecanet.ops.passes import Form
from ecanet.ops.reference import Activation, Gate, accumulation_dtype, scale
from ecanet.ops.triton import algebra, tiles

WARPS = 8


class Norm(NamedTuple):
    """What a tail needs of a batch norm."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    """The running mean; None if it is neither read nor updated."""
    variance: Tensor | None
    tracked: Tensor | None
    """The number of batches, if this one counts."""
    eps: float
    momentum: float | None
    by_batch: bool
    updates: bool


class Plan(NamedTuple):
    """What a tail consists of, apart from its tensors."""

    norm: Norm
    side: Norm | None
    """The norm of the shortcut."""
    gate: ChannelGate | None
    activation: Activation
    second_output: bool


class _Context(Protocol):
    plan: Plan
    layout: torch.memory_format
    has_shortcut: bool
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
    form = describe_gate(gate, z.shape[1])
    if gate is not None and form is None:
        return None
    main = describe_norm(norm, z)
    side = None if shortcut is None or shortcut_norm is None else describe_norm(shortcut_norm, z)
    if main is None or (side is None and shortcut is not None and shortcut_norm is not None):
        return None
    second_output = second_output and shortcut is not None
    tensors = [main.weight, main.bias, *((None, None) if side is None else side[:2])]
    tensors += [None, None] if form is None else form[:2]
    plan = Plan(main, side, form, activation, second_output)
    y, second = _Tail.apply(z, shortcut, *tensors, plan)  # pyright: ignore[reportGeneralTypeIssues]
    return y, y if second is None else second


def describe_norm(norm: nn.Module, z: Tensor) -> Norm | None:
    """Return what a tail of ``z`` needs of ``norm``, None if this node does not apply to it."""
    known = cast(_BatchNorm, norm)  # or a frozen norm, which has the same attributes
    mean, variance = known.running_mean, known.running_var
    by_batch = tail.uses_batch_statistics(norm)
    weight, bias, tracked, momentum = cast("Tensor | None", known.weight), known.bias, None, None
    updates = False
    if by_batch and norm.training:
        if z.numel() == z.shape[1] or tail.find_sync_group(norm) is not None:
            return None
        if known.track_running_stats:
            tracked, momentum = known.num_batches_tracked, known.momentum
            updates = mean is not None and variance is not None
            if momentum is None and tracked is None:
                momentum = 0.0
    given = [x for x in (weight, bias, mean, variance) if x is not None]
    if any(x.dim() != 1 or len(x) != z.shape[1] or not x.is_contiguous() for x in given):
        return None
    return Norm(weight, bias, mean, variance, tracked, known.eps, momentum, by_batch, updates)


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, z: Tensor, shortcut: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        side_weight: Tensor | None, side_bias: Tensor | None, taps: Tensor | None, gate_bias: Tensor | None, plan: Plan,
    ):  # fmt: skip
        side_channels, side_a, side_mu = None, None, None
        if plan.side is not None and shortcut is not None:
            side_channels, _ = compute_coefficients(shortcut, plan.side, None, None)
            side_mu, _, side_a, _ = side_channels.unbind()
        channels, planes = compute_coefficients(z, plan.norm, plan.gate, side_bias)
        mu, _, a, b = channels.unbind()
        if planes is not None:
            a, b, _, _ = planes.unbind()
        form = Form(a=a, b=b, mu=mu, shortcut_a=side_a, shortcut_mu=side_mu, activation=plan.activation)
        y, bits = tiles.apply(z, shortcut, form)
        ctx.plan, ctx.layout, ctx.has_shortcut = plan, nodes.find_layout(z), shortcut is not None
        # a shortcut without a norm is not needed again: its gradient is t
        kept = shortcut if plan.side is not None else None
        parameters = weight, bias, side_weight, side_bias, taps, gate_bias
        ctx.save_for_backward(z, kept, *parameters, bits, channels, planes, side_channels)
        ctx.set_materialize_grads(False)  # an unused output must arrive as None, not as a tensor of zeros to add
        return y, y.view_as(y) if plan.second_output else None

    @staticmethod
    def backward(ctx: _Context, dy: Tensor | None, second_dy: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, second_dy = (second_dy, None) if dy is None else (dy, second_dy)
        if dy is None:
            return (None,) * 9
        z, shortcut, *parameters, bits, channels, planes, side_channels = ctx.saved_tensors
        z, shortcut = nodes.restore_layout(z, ctx.layout), nodes.restore_layout(shortcut, ctx.layout)
        if torch.is_grad_enabled() or nodes.is_batched(dy) or nodes.is_batched(second_dy):
            nodes.warn_of_slow_gradients()
            t = dy if second_dy is None else dy + second_dy
            return _differentiate(ctx, t, z, shortcut, parameters, bits, channels, side_channels)
        plan, needed = ctx.plan, ctx.needs_input_grad
        mu, _, a, b = channels.unbind()
        if planes is not None:
            a, b, _, _ = planes.unbind()
        side_mu = None if side_channels is None else side_channels[0]
        form = Form(a=a, b=b, mu=mu, shortcut_mu=side_mu, activation=plan.activation)
        dy, second_dy = nodes.restore_layout(dy, ctx.layout), nodes.restore_layout(second_dy, ctx.layout)
        sums, t = tiles.reduce(dy, second_dy, bits, z, shortcut, form)
        taps = None if plan.gate is None else plan.gate._replace(weight=parameters[4])
        own = compute_coefficient_grads(sums, 0, channels, planes, plan.norm, taps, parameters[5] is not None)
        dz, dshortcut, side_affine = None, t if ctx.has_shortcut else None, (None, None)
        if needed[0]:
            form = Form(a=a, b=b, mu=mu, activation=None if ctx.has_shortcut else plan.activation)
            dz = tiles.grads(t, z, form, mu, own.dmean, own.dvariance)
        if plan.side is not None:
            side = compute_coefficient_grads(sums, 2, side_channels, None, plan.side, None, False)
            side_affine = side.daffine.unbind()
            if needed[1]:
                form = Form(a=side_channels[2])
                dshortcut = tiles.grads(t, shortcut, form, side_mu, side.dmean, side.dvariance)
        affine = (*own.daffine.unbind(), *side_affine)
        affine = (d if x is not None else None for d, x in zip(affine, parameters[:4], strict=True))
        return dz, dshortcut, *affine, own.dtaps, own.dgate_bias, None


# the launches of the algebra


def compute_coefficients(
    z: Tensor, norm: Norm, gate: ChannelGate | None, addend: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the coefficients of each channel (4, C) and, with a gate, of each plane (4, N, C): see `algebra`.

    The running statistics are updated. ``addend`` (C,) is added to B.
    """
    grid = tiles.find_grid(z)
    n, c = z.shape[:2]
    moments = tiles.moments(z, 2 if norm.by_batch else 1) if norm.by_batch or gate is not None else None
    channels = z.new_empty((4, c), dtype=grid.wide)
    planes = None if gate is None else z.new_empty((4, n, c), dtype=grid.wide)
    if norm.updates or norm.tracked is not None:
        _announce_update(norm)
    blocks = _find_blocks(n, grid.parts, c, gate is not None, 1 if gate is None else gate.taps)
    with torch.cuda.device_of(z):
        algebra._coefficients[blocks.programs](
            moments, norm.weight, norm.bias, norm.mean, norm.variance, norm.tracked, addend,
            *_pack(gate), channels, planes, n, c, grid.positions, grid.parts, grid.part,
            EPS=norm.eps, MOMENTUM=norm.momentum, BATCH=norm.by_batch, UPDATE=norm.updates,
            **_describe(gate), **blocks.options, WIDE=grid.options["WIDE"], num_warps=WARPS,
        )  # fmt: skip
    return channels, planes


def _announce_update(norm: Norm) -> None:
    """Tell autograd that the kernel writes the statistics, and count the batch where the kernel only reads the count."""
    if norm.momentum is None and norm.tracked is not None:
        norm.tracked.add_(1)
    written = [x for x in (norm.mean, norm.variance) if x is not None] if norm.updates else []
    torch.autograd.graph.increment_version([*written, *([] if norm.tracked is None else [norm.tracked])])


class CoefficientGrads(NamedTuple):
    """The results of the backward algebra; None for what the tail does not have."""

    daffine: Tensor  # 2 C
    dmean: Tensor | None  # N C with a gate, else C
    dvariance: Tensor | None  # C
    dtaps: Tensor | None
    dgate_bias: Tensor | None


def compute_coefficient_grads(
    sums: Tensor, kind: int, channels: Tensor, planes: Tensor | None, norm: Norm, gate: ChannelGate | None, biased: bool
) -> CoefficientGrads:
    """Return the gradients that `algebra` computes from the sums over each plane (kinds, parts, N, C)."""
    _, parts, n, c = sums.shape
    taps = 1 if gate is None else gate.taps
    blocks = _find_blocks(n, parts, c, gate is not None, taps)
    daffine = sums.new_empty((2, c))
    dmean = sums.new_empty((c,) if gate is None else (n, c)) if norm.by_batch or gate is not None else None
    dvariance = sums.new_empty(c) if norm.by_batch else None
    dtaps = None
    if gate is not None and (gate.weight is not None or biased):
        dtaps = sums.new_empty((c, taps) if gate.own_taps else (blocks.programs[0], taps + 1))
    with torch.cuda.device_of(sums):
        algebra._coefficient_grads[blocks.programs](
            sums, channels, planes, _pack(gate)[0], daffine, dmean, dvariance, dtaps, n, c, parts,
            KIND=kind, BATCH=norm.by_batch, COLUMNS=blocks.columns, **_describe(gate), **blocks.options,
            WIDE=triton.language.float64 if sums.dtype == torch.float64 else triton.language.float32, num_warps=WARPS,
        )  # fmt: skip
    dweight = dbias = None
    if dtaps is not None and gate is not None and gate.weight is not None:
        total = dtaps if gate.own_taps else dtaps.sum(0)
        dweight = (total if gate.own_taps else total[:taps]).view(gate.weight.shape)
        dbias = total[taps:] if biased else None
    return CoefficientGrads(daffine, dmean, dvariance, dweight, dbias)


class _Blocks(NamedTuple):
    programs: tuple[int, int, int]
    columns: int
    options: dict[str, int]


@lru_cache(maxsize=4096)
def _find_blocks(n: int, parts: int, channels: int, gated: bool, taps: int) -> _Blocks:
    """Return how many programs compute the algebra of N planes of C channels, and their lanes and rows."""
    width = 16 if not gated else 32 if taps < 9 else 64
    rows = triton.next_power_of_2(n if gated else n * parts)
    options = {"BLOCK_N": min(rows, (4096 if gated else 8192) // width), "WIDTH": width}
    return _Blocks((triton.cdiv(channels, width - taps + 1), 1, 1), triton.next_power_of_2(taps + 1), options)


def _pack(gate: ChannelGate | None) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of ``gate``, contiguous."""
    if gate is None:
        return None, None
    return None if gate.weight is None else gate.weight.contiguous(), gate.bias


def _describe(gate: ChannelGate | None) -> dict[str, object]:
    """Return the constexpr arguments of the algebra that depend on the gate."""
    if gate is None:
        return {"GATED": False, "GAIN": 1.0, "TAPS": 1, "EACH": False, "CIRCULAR": False}
    return {
        "GATED": True, "GAIN": gate.gain, "TAPS": gate.taps, "EACH": gate.own_taps, "CIRCULAR": gate.circular
    }  # fmt: skip


# gradients that are differentiated themselves, or come in a batch


def _differentiate(
    ctx: _Context, dy: Tensor, z: Tensor, shortcut: Tensor | None, parameters: list[Tensor | None], bits: Tensor | None,
    channels: Tensor, side_channels: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients in differentiable operations: those of the tail computed again from its inputs."""
    plan, create_graph = ctx.plan, torch.is_grad_enabled()
    with torch.enable_grad():
        # views, because one tensor may be several of the inputs
        inputs = [None if x is None else x.view_as(x) for x in (z, shortcut, *parameters)]
        y = compute_branch(inputs, plan, channels, side_channels)
        t = dy.to(y.dtype)
        if bits is not None:
            t = t * tiles.unpack_bits(bits, z)
        elif plan.activation is not None:
            t = t * (~(y <= 0) if plan.activation == "relu" else (y > 0) & (y < 6))
        needed = [x is not None and need for x, need in zip(inputs, ctx.needs_input_grad, strict=False)]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, t, create_graph=create_graph) if wanted else ())
    gradients = [next(found) if need else None for need in needed]
    if ctx.has_shortcut and shortcut is None:
        gradients[1] = t.to(z.dtype)
    return *gradients, None


def compute_branch(
    inputs: list[Tensor | None], plan: Plan, channels: Tensor, side_channels: Tensor | None
) -> Tensor:
    """Return the tail before its activation, without a shortcut that has no norm, in PyTorch's operations."""
    z, shortcut, weight, bias, side_weight, side_bias, taps, gate_bias = inputs
    assert z is not None
    y = _normalize(z, plan.norm, weight, bias, channels)
    if plan.gate is not None:
        p = y.flatten(2).mean(2) if y.dim() > 2 else y
        y = scale(y, compute_weights(p, plan.gate._replace(weight=taps, bias=gate_bias)))
    if plan.side is not None and shortcut is not None and side_channels is not None:
        y = y + _normalize(shortcut, plan.side, side_weight, side_bias, side_channels)
    return y


def _normalize(z: Tensor, norm: Norm, weight: Tensor | None, bias: Tensor | None, channels: Tensor) -> Tensor:
    x = z.to(accumulation_dtype(z.dtype))
    shape, axes = (-1, *(1,) * (z.dim() - 2)), (0, *range(2, z.dim()))
    if norm.by_batch:
        d = x - x.mean(axes, keepdim=True)
        y = d * torch.rsqrt(d.square().mean(axes, keepdim=True) + norm.eps)
    else:
        y = (x - channels[0].view(shape)) * channels[1].view(shape)
    y = y if weight is None else y * weight.to(x.dtype).view(shape)
    return y if bias is None else y + bias.to(x.dtype).view(shape)
