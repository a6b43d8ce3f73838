"""How tensors are cut into tiles, and the launches of the four passes over them.

Callers enter the device of their tensors, which need not be the current one. Tensors have elements: a launch over an
empty grid is an error.
"""

# Triton's launcher converts plain numbers to constexpr, but its annotations do not accept them.
# pyright: reportArgumentType=false

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ecanet.ops.passes import Form
from ecanet.ops.reference import Activation, accumulation_dtype
from ecanet.ops.triton import kernels, reductions

TILE = 2048
"""Elements of a tile: 16 for each thread of four warps."""

PROGRAMS = 1024
"""A reduction with fewer programs splits planes into parts. A large GPU runs eight at once on each of 132 processors.

So they are one whole wave: none waits for a place while others have ended.
"""

STEPS = 4
"""Tiles of a program of an elementwise pass, if that leaves four waves of programs."""

ACTIVATIONS: dict[Activation, int] = {None: 0, "relu": 1, "relu6": 2}


class Launch:
    """A kernel with its grid and all arguments but its tensors, which come first.

    Triton finds the compiled kernel by the type of each argument, which takes longer than the launch. A `Launch` is
    made for tensors of known types, so it looks only at what the compiled code depends on besides: whether all tensors
    start at multiples of 16 bytes. Triton finds the kernel where they do not, and where a profiler listens to launches.
    """

    def __init__(self, kernel: Any, programs: tuple[int, int, int], others: tuple[object, ...], warps: int = 4):
        self.kernel, self.programs, self.others, self.warps = kernel, programs, others, warps
        self.run: Any = None
        """Triton's launcher of the compiled kernel."""
        self.compiled: tuple[object, ...] = ()
        """The launcher's arguments after grid and stream: function, metadata, and no listeners."""

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch the kernel."""
        addresses = 0
        for x in tensors:
            if x is not None:
                addresses |= x.data_ptr()
        hooks = knobs.runtime
        if addresses % 16 or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            self.kernel[self.programs](*tensors, *self.others, num_warps=self.warps)
        elif self.run is None:
            compiled = self.kernel[self.programs](*tensors, *self.others, num_warps=self.warps)
            if compiled is not None:  # the interpreter compiles nothing
                self.compiled = compiled.function, compiled.packed_metadata, None, None, None
                self.run = compiled.run
        else:
            device = driver.active
            stream = device.get_current_stream(device.get_current_device())
            self.run(*self.programs, stream, *self.compiled, *tensors, *self.others)


@dataclass(frozen=True, eq=False)
class Grid:
    """How a tensor (N, C, ...) is cut into tiles, and the grids of launches over it."""

    samples: int
    channels: int
    positions: int
    last: bool
    """The tensor is channels-last."""
    part: int
    """Positions of a plane that one program sums: all of them, unless that gives fewer than PROGRAMS programs."""
    parts: int
    tiles: tuple[int, int, int]
    """The grid of elementwise passes. Only the first axis of a grid is long enough for any number."""
    columns: tuple[int, int, int]
    """The grid with one program for each sample and block of channels, and each part of the planes."""
    steps: int
    """Tiles that one program of an elementwise pass computes."""
    options: tuple[object, ...]
    """The last arguments of the passes: LAST, PLANES, BLOCK_P, BLOCK_C and WIDE."""
    reduce_options: tuple[object, ...]
    """Those of `reductions._reduce`, which has smaller tiles: eight elements of four tensors for each thread."""
    wide: torch.dtype
    layout: torch.memory_format
    bits: tuple[int, ...]
    """The shape of the sign bits: one byte for eight neighbours in memory."""


def find_grid(z: Tensor) -> Grid:
    """Return how ``z`` is cut. It is computed once for each kind of tensor, because it takes longer than a launch."""
    return _compute_grid(z.shape, z.stride(), z.dtype, z.device)


@lru_cache(maxsize=4096)
def _compute_grid(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Grid:
    n, channels = shape[:2]
    positions = shape[2:].numel()
    last = is_channels_last(channels, positions, stride)
    planes = kernels.ALIGNED if last or positions % 8 == 0 else kernels.SHIFTED if positions > 6 else kernels.SMALL
    whole = last or planes == kernels.ALIGNED
    if last:
        block_c = min(64, max(8, triton.next_power_of_2(channels)))
        block_p = min(TILE // block_c, triton.next_power_of_2(positions))
    else:
        block_p = min(TILE // 8, triton.next_power_of_2(positions if whole else positions + 7))
        block_c = min(max(8, TILE // block_p), max(8, triton.next_power_of_2(channels)))
    across = triton.cdiv(channels, block_c)
    parts = max(1, min(triton.cdiv(PROGRAMS, n * across), triton.cdiv(positions, 2 * block_p))) if whole else 1
    part = triton.cdiv(triton.cdiv(positions, parts), block_p) * block_p
    parts = triton.cdiv(positions, part)
    steps = STEPS if last else 1
    while steps > 1 and n * across * triton.cdiv(positions, steps * block_p) < 4 * PROGRAMS:
        steps //= 2
    programs = across * triton.cdiv(positions, steps * block_p)
    if not last:
        programs = triton.cdiv(channels * positions, block_p * block_c)
    wide_type = tl.float64 if dtype == torch.float64 else tl.float32
    options = last, planes.value, block_p, block_c, wide_type
    reduce_options = last, planes.value, block_p if block_p < 16 else block_p // 2, block_c, wide_type
    bits = (n, positions, (channels + 7) // 8) if last else (n, (channels * positions + 7) // 8)
    wide, layout = accumulation_dtype(dtype), torch.contiguous_format
    if last:
        layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return Grid(
        n, channels, positions, last, part, parts, (n * programs, 1, 1), (n * across, parts, 1), steps, options,
        reduce_options, wide, layout, bits,
    )  # fmt: skip


def is_channels_last(channels: int, positions: int, stride: tuple[int, ...]) -> bool:
    """Return whether the channels of one position are neighbours in memory, in planes of ``positions`` elements."""
    return channels > 1 and positions > 1 and stride[1] == 1


# the launches of the passes. Coefficients are (N, C) where ``planes``, else (C,). They begin at ``places`` of their
# tensors, so that several may be rows of one.


@lru_cache(maxsize=4096)
def prepare_moments(grid: Grid, order: int) -> Launch:
    """Return the launch that stores means and variances in a tensor (2, parts, N, C)."""
    others = grid.channels, grid.positions, grid.part, order, *grid.options
    return Launch(reductions._moments, grid.columns, others)


@lru_cache(maxsize=4096)
def prepare_apply(
    grid: Grid, planes: bool, has_b: bool, has_mu: bool, shortcut: int, activation: Activation, bits: bool,
    places: tuple[int, int, int] = (0, 0, 0),
) -> Launch:  # fmt: skip
    """Return the launch for z, shortcut, y, bits, a, b, mu, and the shortcut's a and mu.

    ``shortcut`` is 0 without one, 1 for a plain one and 2 for one with a norm. ``places`` are those of a, b and the
    shortcut's a.
    """
    row = grid.channels if planes else 0
    flags = has_b, has_mu, shortcut, ACTIVATIONS[activation], bits, grid.steps
    return Launch(kernels._apply, grid.tiles, (*places, grid.channels, grid.positions, row, *flags, *grid.options))


@lru_cache(maxsize=4096)
def prepare_reduce(
    grid: Grid, planes: bool, has_b: bool, has_mu: bool, normed: bool, activation: Activation, second_dy: bool,
    bits: bool, places: tuple[int, int] = (0, 0),
) -> Launch:  # fmt: skip
    """Return the launch for two dy, bits, z, the shortcut with a norm, t, a, b, mu, its mu, and the sums.

    ``t`` is written where there are bits or two dy. ``places`` are those of a and b.
    """
    row = grid.channels if planes else 0
    flags = has_b, has_mu, normed, ACTIVATIONS[activation], second_dy, bits, bits or second_dy
    others = *places, grid.channels, grid.positions, grid.part, row, *flags, *grid.reduce_options
    return Launch(reductions._reduce, grid.columns, others)


@lru_cache(maxsize=4096)
def prepare_grads(
    grid: Grid, planes: bool, norm_planes: bool, has_b: bool, has_mu: bool, has_dm: bool, has_dv: bool,
    activation: Activation, places: tuple[int, int] = (0, 0),
) -> Launch:  # fmt: skip
    """Return the launch for t, z, dz, a, b, mu, m, dm and dv, where m may be None if it is mu.

    ``norm_planes``: m and dv are (N, C). ``places`` are those of a and b.
    """
    rows = grid.channels if planes else 0, grid.channels if norm_planes else 0
    flags = has_b, has_mu, has_dm, has_dv, ACTIVATIONS[activation], grid.steps
    others = *places, grid.channels, grid.positions, *rows, *flags, *grid.options
    return Launch(kernels._grads, grid.tiles, others)


# the passes with coefficients (N, C), as `launch` makes operators of them


def moments(z: Tensor, order: int) -> Tensor:
    """Return means and biased variances of the parts of each plane: (2, parts, N, C). Order 1 stores only means."""
    grid = find_grid(z)
    out = z.new_empty((2, grid.parts, *z.shape[:2]), dtype=grid.wide)
    prepare_moments(grid, order)(z, out)
    return out


def apply(z: Tensor, shortcut: Tensor | None, form: Form) -> tuple[Tensor, Tensor | None]:
    """Return ``y`` of the form and, with a shortcut and an activation, the activation's sign bits."""
    grid = find_grid(z)
    y = torch.empty_like(z)
    keep = form.activation is not None and shortcut is not None
    bits = z.new_empty(grid.bits, dtype=torch.uint8) if keep else None
    kind = 0 if shortcut is None else 1 if form.shortcut_a is None else 2
    run = prepare_apply(grid, True, form.b is not None, form.mu is not None, kind, form.activation, keep)
    run(z, shortcut, y, bits, form.a, form.b, form.mu, form.shortcut_a, form.shortcut_mu)
    return y, bits


def reduce(
    dy: Tensor, second_dy: Tensor | None, bits: Tensor | None, z: Tensor, shortcut: Tensor | None, form: Form
) -> tuple[Tensor, Tensor]:
    """Return the sums over the parts of each plane, and t, which is dy where the sign is recomputed.

    The sums are ``t (z - mu)``, ``t`` and, if the shortcut has a norm, ``t (shortcut - shortcut_mu)``: (2 or 3, parts,
    N, C).
    """
    grid = find_grid(z)
    shortcut = None if form.shortcut_mu is None else shortcut
    write = bits is not None or second_dy is not None
    t = torch.empty_like(z) if write else dy
    sums = z.new_empty((2 if shortcut is None else 3, grid.parts, *z.shape[:2]), dtype=grid.wide)
    flags = form.b is not None, form.mu is not None, shortcut is not None
    run = prepare_reduce(grid, True, *flags, form.activation, second_dy is not None, bits is not None)
    written = t if write else None
    run(dy, second_dy, bits, z, shortcut, written, form.a, form.b, form.mu, form.shortcut_mu, sums)
    return sums, t


def grads(t: Tensor, z: Tensor, form: Form, m: Tensor, dm: Tensor | None, dv: Tensor | None) -> Tensor:
    """Return ``dz = a t + dm / P + 2 (z - m) dv / P``."""
    grid = find_grid(z)
    dz = torch.empty_like(z)
    flags = form.b is not None, form.mu is not None, dm is not None, dv is not None
    run = prepare_grads(grid, True, True, *flags, form.activation)
    read = z if dv is not None or form.activation is not None else None
    run(t, read, dz, form.a, form.b, form.mu, m, dm, dv)
    return dz


def finish_in_place(y: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> None:
    """Write ``relu(y + bias + shortcut)`` into ``y``. ``bias`` (C,) has its dtype, as launches are kept by dtype."""
    run = prepare_apply(
        find_grid(y), False, bias is not None, False, 0 if shortcut is None else 1, "relu", False
    )  # fmt: skip
    # A tensor that is made while a graph is captured has no values before the graph runs, so it must not be kept.
    captured = y.is_cuda and torch.cuda.is_current_stream_capturing()
    ones = (_make_ones.__wrapped__ if captured else _make_ones)(y.shape[1], y.device)
    run(y, shortcut, y, None, ones, None if bias is None else bias.contiguous(), None, None, None)


@lru_cache(maxsize=256)
def _make_ones(channels: int, device: torch.device) -> Tensor:
    return torch.ones(channels, device=device)


def unpack_bits(bits: Tensor, z: Tensor) -> Tensor:
    """Return the sign bits of a tail of ``z`` as booleans of ``z``'s shape."""
    grid = find_grid(z)
    eight = (bits[..., None] >> torch.arange(8, device=bits.device)) & 1
    if grid.last:
        live = eight.flatten(2)[..., : grid.channels].transpose(1, 2)  # N C P
    else:
        live = eight.flatten(1)[:, : grid.channels * grid.positions]
    return live.reshape(z.shape).bool()


def shape_bits(z: Tensor) -> tuple[int, ...]:
    """Return the shape of ``z``'s sign bits. Sizes may be symbols, as in compilers, for which there is no grid."""
    n, channels, positions = *z.shape[:2], z.shape[2:].numel()
    if is_channels_last(channels, positions, z.stride()):
        return n, positions, (channels + 7) // 8
    return n, (channels * positions + 7) // 8
