"""The launches of the algebra between the passes, and what they need to know of norms and gates."""

from functools import lru_cache
from typing import NamedTuple, cast

import torch
import triton
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from ecanet.ops import tail
from ecanet.ops.triton import algebra
from ecanet.ops.triton.tiles import Grid, Launch, prepare_moments

WARPS = 8


class NormKind(NamedTuple):
    """What the compiled algebra depends on of a batch norm."""

    eps: float
    momentum: float | None
    by_batch: bool
    updates: bool
    """The running statistics are updated."""
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
    known = cast(_BatchNorm, norm)  # or a frozen norm, which has the same attributes
    mean, variance = known.running_mean, known.running_var
    weight, bias, tracked, momentum = cast("Tensor | None", known.weight), known.bias, None, None
    by_batch, updates = tail.uses_batch_statistics(norm), False
    if by_batch and norm.training:
        if z.numel() == z.shape[1] or tail.find_sync_group(norm) is not None:
            return None
        if known.track_running_stats:
            tracked, momentum = known.num_batches_tracked, known.momentum
            updates = mean is not None and variance is not None
            if tracked is None and momentum is None:
                momentum = 0.0
    size, dtypes = z.shape[1:2], []
    for x in (weight, bias, mean, variance, tracked):
        dtypes.append(None if x is None else x.dtype)
        if x is not None and x is not tracked and (x.shape != size or not x.is_contiguous()):
            return None
    return Norm(weight, bias, mean, variance, tracked, NormKind(known.eps, momentum, by_batch, updates, (*dtypes,)))


def compute_coefficients(
    z: Tensor, grid: Grid, norm: Norm, gate: GateKind | None, addend: Tensor | None, taps: Tensor | None,
    gate_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the coefficients of each channel (4, C) and, with a gate, of each plane (4, N, C): see `algebra`.

    The running statistics are updated. ``addend`` (C,) is added to B.
    """
    n, c, kind, moments, planes = grid.samples, grid.channels, norm.kind, None, None
    if kind.by_batch or gate is not None:
        moments = z.new_empty((2, grid.parts, n, c), dtype=grid.wide)
        prepare_moments(grid, 2 if kind.by_batch else 1)(z, moments)
    channels = z.new_empty((4, c), dtype=grid.wide)
    if gate is not None:
        planes = z.new_empty((4, n, c), dtype=grid.wide)
        taps = None if taps is None else taps.contiguous()
    if norm.tracked is not None or kind.updates:
        _announce_update(norm)
    run = _prepare_coefficients(grid, kind, gate, None if addend is None else addend.dtype)
    statistics = norm.mean, norm.variance, norm.tracked
    run(moments, norm.weight, norm.bias, *statistics, addend, taps, gate_bias, channels, planes)
    return channels, planes


def _announce_update(norm: Norm) -> None:
    """Tell autograd that the kernel writes the statistics; count the batch where the kernel only reads the count."""
    if norm.kind.momentum is None and norm.tracked is not None:
        norm.tracked.add_(1)
    written = (norm.mean, norm.variance) if norm.kind.updates else ()
    written = [x for x in (*written, norm.tracked) if x is not None]
    torch.autograd.graph.increment_version(written)


class CoefficientGrads(NamedTuple):
    """The results of the backward algebra; None for what the tail does not have."""

    daffine: Tensor  # 2 C
    dmean: Tensor | None  # N C with a gate, else C
    dvariance: Tensor | None  # C
    dtaps: Tensor | None
    dgate_bias: Tensor | None


def compute_coefficient_grads(
    grid: Grid, sums: Tensor, first: int, channels: Tensor, planes: Tensor | None, norm: Norm, gate: GateKind | None,
    taps: Tensor | None, gate_bias: Tensor | None,
) -> CoefficientGrads:  # fmt: skip
    """Return the gradients that `algebra` computes from the sums over each plane (kinds, parts, N, C).

    ``first`` is the kind of sums of this norm's input.
    """
    n, c, by_batch = grid.samples, grid.channels, norm.kind.by_batch
    daffine, dmean, dvariance, dtaps = sums.new_empty((2, c)), None, None, None
    run = _prepare_coefficient_grads(grid, first, by_batch, gate)
    if by_batch or gate is not None:
        dmean = sums.new_empty((c,) if gate is None else (n, c))
    if by_batch:
        dvariance = sums.new_empty((c,))
    if gate is None or taps is None:
        run(sums, channels, planes, None, daffine, dmean, dvariance, None)
        return CoefficientGrads(daffine, dmean, dvariance, None, None)
    k = gate.taps
    dtaps = sums.new_empty((c, k) if gate.own_taps else (run.programs[0], k + 1))
    run(sums, channels, planes, taps.contiguous(), daffine, dmean, dvariance, dtaps)
    if gate.own_taps:
        return CoefficientGrads(daffine, dmean, dvariance, dtaps.view(taps.shape), None)
    total = dtaps.sum(0)
    dbias = None if gate_bias is None else total[k:]
    return CoefficientGrads(daffine, dmean, dvariance, total[:k].view(taps.shape), dbias)


@lru_cache(maxsize=4096)
def _prepare_coefficients(grid: Grid, norm: NormKind, gate: GateKind | None, addend: torch.dtype | None) -> Launch:
    """Return the launch of `algebra._coefficients`. Of ``addend`` only the dtype matters, to tell launches apart."""
    numbers = grid.samples, grid.channels, grid.positions, grid.parts, grid.part
    blocks, programs = _choose_blocks(grid, gate)
    others = *numbers, *norm[:4], *_describe(gate), *blocks, grid.options[3]
    return Launch(algebra._coefficients, programs, others, WARPS)


@lru_cache(maxsize=4096)
def _prepare_coefficient_grads(grid: Grid, first: int, by_batch: bool, gate: GateKind | None) -> Launch:
    blocks, programs = _choose_blocks(grid, gate)
    columns = triton.next_power_of_2(gate.taps + 1) if gate is not None else 1
    flags = first, by_batch, *_describe(gate), columns
    others = grid.samples, grid.channels, grid.parts, *flags, *blocks, grid.options[3]
    return Launch(algebra._coefficient_grads, programs, others, WARPS)


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
