"""The launches of the algebra between the passes, and what they need to know of norms and gates."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch import distributed as dist

from ecanet.ops import tail
from ecanet.ops.reference import Activation
from ecanet.ops.triton import algebra, algebra_grads
from ecanet.ops.triton.tiles import Grid, Launch, prepare_grads, prepare_moments

WARPS = 8

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class NormKind(NamedTuple):
    """What the compiled algebra depends on of a batch norm."""

    eps: float
    momentum: float | None
    by_batch: bool
    updates: bool
    """The running statistics are updated."""
    synchronised: bool
    """The statistics are those of several processes."""
    dtypes: tuple[torch.dtype | None, ...]


class Norm(NamedTuple):
    """What a tail needs of a batch norm."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    """The running mean."""
    variance: Tensor | None
    tracked: Tensor | None
    """The number of batches, if this one counts."""
    group: dist.ProcessGroup | None
    """The processes over which a synchronised norm sums."""
    kind: NormKind


class GateKind(NamedTuple):
    """What the compiled algebra depends on of a gate."""

    gain: float
    taps: int
    own_taps: bool
    circular: bool
    dtypes: tuple[torch.dtype | None, ...]


def describe_norm(norm: nn.Module, z: Tensor) -> Norm | None:
    """Return what a tail of ``z`` needs of ``norm``, None if this node does not apply to it."""
    own = vars(norm)
    # the module's own dictionaries: `nn.Module.__getattr__`, which searches them, takes several times as long
    held = own["_parameters"] | own["_buffers"]
    weight, bias, mean, variance, counted = (held[x] if x in held else getattr(norm, x, None) for x in NORM_TENSORS)
    tracked, momentum, updates, by_batch, group = None, None, False, tail.uses_batch_statistics(norm), None
    if by_batch and norm.training:
        group = tail.find_sync_group(norm)
        if z.numel() == z.shape[1] and group is None:
            return None
        if own["track_running_stats"]:
            tracked, momentum, updates = counted, own["momentum"], mean is not None and variance is not None
            if tracked is None and momentum is None:
                momentum = 0.0
    channels, dtypes = z.shape[1], []
    for x in (weight, bias, mean, variance):
        if x is None:
            dtypes.append(None)
        elif x.dim() != 1 or x.numel() != channels or not x.is_contiguous():
            return None
        else:
            dtypes.append(x.dtype)
    dtypes.append(None if tracked is None else tracked.dtype)
    kind = NormKind(own["eps"], momentum, by_batch, updates, group is not None, (*dtypes,))
    return Norm(weight, bias, mean, variance, tracked, group, kind)


@dataclass(frozen=True, eq=False)
class NormLaunches:
    """The launches of one norm of a tail: its statistics and algebra, forward and backward."""

    moments: Launch | None
    totals: Launch | None
    """Before the all-reduce of a synchronised norm; `finish` is after that of the backward."""
    coefficients: Launch
    coefficient_grads: Launch
    finish: Launch | None
    grads: Launch
    """That of the last pass, which writes the gradient of the norm's input."""
    reads_input: bool
    """The last pass reads that input again."""
    moments_shape: tuple[int, ...]
    channels_shape: tuple[int, ...]
    planes_shape: tuple[int, ...] | None
    dmean_shape: tuple[int, ...] | None
    dtaps_shape: tuple[int, ...] | None


@lru_cache(maxsize=4096)
def prepare_norm(
    grid: Grid, first: int, norm: NormKind, gate: GateKind | None, addend: torch.dtype | None, activation: Activation
) -> NormLaunches:
    """Return the launches of a norm, and of the gate after it, if any.

    ``first`` is the kind of sums of this norm's input, and ``activation`` that whose sign the last pass recomputes. Of
    ``addend``, which the coefficients contain, only the dtype matters, to tell launches apart.
    """
    n, c, by_batch = grid.samples, grid.channels, norm.by_batch
    needs_moments, gated = by_batch or gate is not None, gate is not None
    flags = activation is not None, activation is not None, needs_moments, by_batch, activation
    grads = prepare_coefficient_grads(grid, first, by_batch, gate)
    dtaps = None
    if gate is not None:
        dtaps = (c, gate.taps) if gate.own_taps else (grads.programs[0], gate.taps + 1)
    return NormLaunches(
        moments=prepare_moments(grid, 2 if by_batch else 1) if needs_moments else None,
        totals=prepare_totals(grid) if norm.synchronised else None,
        coefficients=prepare_coefficients(grid, norm, gate),
        coefficient_grads=grads,
        finish=prepare_finish(grid, gated) if norm.synchronised else None,
        grads=prepare_grads(grid, gated, False, *flags, (0, n * c) if gated else (2 * c, 3 * c)),
        reads_input=by_batch or activation is not None,
        moments_shape=(2, grid.parts, n, c),
        channels_shape=(4, c),
        planes_shape=(4, n, c) if gated else None,
        dmean_shape=((n, c) if gated else (c,)) if needs_moments else None,
        dtaps_shape=dtaps,
    )


class Coefficients(NamedTuple):
    """The results of the forward algebra, as `algebra` describes them."""

    channels: Tensor  # 4 C
    planes: Tensor | None  # 4 N C, with a gate
    totals: Tensor | None  # 2 C + 1, of a synchronised norm


def compute_coefficients(
    z: Tensor, grid: Grid, run: NormLaunches, norm: Norm, addend: Tensor | None, taps: Tensor | None,
    gate_bias: Tensor | None,
) -> Coefficients:  # fmt: skip
    """Return the coefficients of a norm, and of the gate after it, if any.

    The running statistics are updated. ``addend`` (C,) is added to B.
    """
    moments = planes = totals = None
    if run.moments is not None:
        moments = z.new_empty(run.moments_shape, dtype=grid.wide)
        run.moments(z, moments)
    channels = z.new_empty(run.channels_shape, dtype=grid.wide)
    if run.planes_shape is not None:
        planes = z.new_empty(run.planes_shape, dtype=grid.wide)
        taps = None if taps is None else taps.contiguous()
    if run.totals is not None:
        totals = z.new_empty(2 * grid.channels + 1, dtype=torch.float64)
        run.totals(moments, totals)
        dist.all_reduce(totals, group=norm.group)
    weight, bias, mean, variance, tracked, _, kind = norm
    if tracked is not None or kind.updates:
        _announce_update(norm)
    statistics = mean, variance, tracked
    run.coefficients(moments, weight, bias, *statistics, addend, taps, gate_bias, totals, channels, planes)
    return Coefficients(channels, planes, totals)


def _announce_update(norm: Norm) -> None:
    """Tell autograd that the kernel writes the statistics; count the batch where the kernel only reads the count."""
    tracked, kind = norm.tracked, norm.kind
    if kind.momentum is None and tracked is not None:
        tracked.add_(1)
    written: list[Any] = [norm.mean, norm.variance] if kind.updates else []
    if tracked is not None:
        written.append(tracked)
    torch.autograd.graph.increment_version(written)


class CoefficientGrads(NamedTuple):
    """The results of the backward algebra; None for what the tail does not have."""

    dweight: Tensor | None  # C
    dbias: Tensor | None  # C
    dmean: Tensor | None  # N C with a gate, else C
    dvariance: Tensor | None  # C
    dtaps: Tensor | None
    dgate_bias: Tensor | None


def compute_coefficient_grads(
    sums: Tensor, run: NormLaunches, norm: Norm, known: Coefficients, taps: Tensor | None, gate_bias: Tensor | None
) -> CoefficientGrads:
    """Return the gradients that `algebra_grads` computes from the sums over each plane (kinds, parts, N, C)."""
    shape, (channels, planes, totals) = run.channels_shape[1:], known
    dweight = None if norm.weight is None else sums.new_empty(shape)
    dbias = None if norm.bias is None else sums.new_empty(shape)
    dmean = None if run.dmean_shape is None else sums.new_empty(run.dmean_shape)
    dvariance = sums.new_empty(shape) if norm.kind.by_batch else None
    dtaps = None if taps is None or run.dtaps_shape is None else sums.new_empty(run.dtaps_shape)
    dtotals = None if totals is None else torch.empty_like(totals)
    given = sums, channels, planes, None if taps is None else taps.contiguous()
    run.coefficient_grads(*given, dweight, dbias, dmean, dvariance, dtaps, totals, dtotals)
    if run.finish is not None and dtotals is not None:
        dist.all_reduce(dtotals, group=norm.group)
        run.finish(dtotals, channels, dmean, dvariance)
    if taps is None or dtaps is None:
        return CoefficientGrads(dweight, dbias, dmean, dvariance, None, None)
    if taps.numel() == dtaps.numel():  # each channel has taps of its own
        return CoefficientGrads(dweight, dbias, dmean, dvariance, dtaps.view(taps.shape), None)
    total, k = dtaps.sum(0), taps.numel()
    dgate_bias = None if gate_bias is None else total[k:]
    return CoefficientGrads(dweight, dbias, dmean, dvariance, total[:k].view(taps.shape), dgate_bias)


def prepare_coefficients(grid: Grid, norm: NormKind, gate: GateKind | None) -> Launch:
    """Return the launch of `algebra._coefficients`."""
    numbers = grid.samples, grid.channels, grid.positions, grid.parts, grid.part
    blocks, programs = _choose_blocks(grid, gate)
    others = *numbers, *norm[:4], *_describe(gate), *blocks, grid.options[-1]
    return Launch(algebra._coefficients, programs, others, WARPS)


def prepare_coefficient_grads(grid: Grid, first: int, by_batch: bool, gate: GateKind | None) -> Launch:
    """Return the launch of `algebra_grads._coefficient_grads`."""
    blocks, programs = _choose_blocks(grid, gate)
    columns = triton.next_power_of_2(gate.taps + 1) if gate is not None else 1
    flags = first, by_batch, *_describe(gate), columns
    others = grid.samples, grid.channels, grid.parts, *flags, *blocks, grid.options[-1]
    return Launch(algebra_grads._coefficient_grads, programs, others, WARPS)


def prepare_totals(grid: Grid) -> Launch:
    """Return the launch of `algebra._totals`."""
    numbers = grid.samples, grid.channels, grid.positions, grid.parts, grid.part
    blocks, programs = _choose_blocks(grid, None)
    return Launch(algebra._totals, programs, (*numbers, *blocks, grid.options[-1]), WARPS)


def prepare_finish(grid: Grid, gated: bool) -> Launch:
    """Return the launch of `algebra_grads._finish`."""
    blocks, programs = _choose_blocks(grid, None)
    others = grid.samples, grid.channels, grid.positions, gated, *blocks, grid.options[-1]
    return Launch(algebra_grads._finish, programs, others, WARPS)


def _choose_blocks(grid: Grid, gate: GateKind | None) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Return BLOCK_N and WIDTH, and the grid of programs, each of which computes all samples of WIDTH channels."""
    rows = triton.next_power_of_2(grid.samples if gate is not None else grid.samples * grid.parts)
    taps = 1 if gate is None else gate.taps
    width = 16 if gate is None else 32 if taps < 9 else 64
    block = min(rows, (8192 if gate is None else 2048) // width)
    return (block, width), (triton.cdiv(grid.channels, width - taps + 1), 1, 1)


def _describe(gate: GateKind | None) -> tuple[object, ...]:
    """Return GATED, GAIN, TAPS, EACH and CIRCULAR."""
    return (False, 1.0, 1, False, False) if gate is None else (True, *gate[:4])
