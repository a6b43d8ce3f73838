"""How tensors are cut into tiles, and the launches of the four passes over them.

Each launch enters its tensors' device, which need not be the current one. Tensors have elements: a launch over an
empty grid is an error.
"""

# Triton's launcher converts plain numbers to constexpr, but its annotations do not accept them.
# pyright: reportArgumentType=false

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecanet.ops.passes import Form
from ecanet.ops.reference import Activation, accumulation_dtype
from ecanet.ops.triton import kernels

TILE = 2048
"""Elements of a tile: 16 for each thread of four warps."""

PROGRAMS = 1024
"""A reduction with fewer programs splits planes into parts: about eight programs for each processor of a large GPU."""

ACTIVATIONS: dict[Activation, int] = {None: 0, "relu": 1, "relu6": 2}


class Grid(NamedTuple):
    """How a tensor (N, C, ...) is cut into tiles, and the grids of launches over it."""

    channels: int
    positions: int
    last: bool
    """The tensor is channels-last."""
    part: int
    """Positions of a plane that one program sums: all of them, unless that gives fewer than PROGRAMS programs."""
    parts: int
    tiles: tuple[int, int, int]
    """The grid with a program for each tile. Only the first axis of a grid is long enough for any number."""
    columns: tuple[int, int, int]
    """The grid with one program for each sample, block of channels and part of the planes."""
    options: dict[str, Any]
    """The constexpr arguments that all passes take."""
    wide: torch.dtype


def find_grid(z: Tensor) -> Grid:
    """Return how ``z`` is cut. It is computed once for each shape and layout, because it takes longer than a launch."""
    return _compute_grid(z.shape, z.stride(), z.dtype)


@lru_cache(maxsize=4096)
def _compute_grid(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Grid:
    n, channels = shape[:2]
    positions = shape[2:].numel()
    last = is_channels_last(channels, positions, stride)
    if last:
        block_c = min(64, max(8, triton.next_power_of_2(channels)))
        block_p = min(TILE // block_c, triton.next_power_of_2(positions))
    else:
        block_p = min(TILE // 8, triton.next_power_of_2(positions))
        block_c = min(max(8, TILE // block_p), max(8, triton.next_power_of_2(channels)))
    across = triton.cdiv(channels, block_c)
    parts = max(1, min(triton.cdiv(PROGRAMS, n * across), triton.cdiv(positions, 2 * block_p)))
    part = triton.cdiv(triton.cdiv(positions, parts), block_p) * block_p
    parts = triton.cdiv(positions, part)
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    options = {"LAST": last, "BLOCK_P": block_p, "BLOCK_C": block_c, "WIDE": wide}
    tiles = n * triton.cdiv(positions, block_p) * across
    return Grid(
        channels, positions, last, part, parts, (tiles, 1, 1), (n, across, parts), options, accumulation_dtype(dtype)
    )


def is_channels_last(channels: int, positions: int, stride: tuple[int, ...]) -> bool:
    """Return whether the channels of one position are neighbours in memory, in planes of ``positions`` elements."""
    return channels > 1 and positions > 1 and stride[1] == 1


def allocate_bits(z: Tensor) -> Tensor:
    """Return an uninitialised tensor for the sign bits: one byte for eight channels of a position."""
    positions, width = z.shape[2:].numel(), (z.shape[1] + 7) // 8
    last = is_channels_last(z.shape[1], positions, z.stride())
    return z.new_empty((z.shape[0], *((positions, width) if last else (width, positions))), dtype=torch.uint8)


def moments(z: Tensor, order: int) -> Tensor:
    """Return means and biased variances of the parts of each plane: (2, parts, N, C). Order 1 stores only means."""
    grid = find_grid(z)
    out = z.new_empty((2, grid.parts, *z.shape[:2]), dtype=grid.wide)
    with torch.cuda.device_of(z):
        kernels._moments[grid.columns](
            z, out, out[1], grid.channels, grid.positions, grid.part, ORDER=order, **grid.options
        )
    return out


def apply(z: Tensor, shortcut: Tensor | None, form: Form) -> tuple[Tensor, Tensor | None]:
    """Return ``y`` of the form and, with a shortcut and an activation, the activation's sign bits."""
    grid = find_grid(z)
    y = torch.empty_like(z)
    bits = allocate_bits(z) if form.activation is not None and shortcut is not None else None
    with torch.cuda.device_of(z):
        kernels._apply[grid.tiles](
            z, shortcut, y, bits, form.a, form.b, form.mu, form.shortcut_a, form.shortcut_mu,
            grid.channels, grid.positions, _row(form.a), HAS_B=form.b is not None, HAS_MU=form.mu is not None,
            SHORTCUT=0 if shortcut is None else 1 if form.shortcut_a is None else 2,
            ACTIVATION=ACTIVATIONS[form.activation], BITS=bits is not None, **grid.options,
        )  # fmt: skip
    return y, bits


def reduce(
    dy: Tensor, second_dy: Tensor | None, bits: Tensor | None, z: Tensor, shortcut: Tensor | None, form: Form
) -> tuple[Tensor, Tensor]:
    """Return the sums over the parts of each plane, and t, which is dy where the sign is recomputed.

    The sums are ``t (z - mu)``, ``t`` and, if the shortcut has a norm, ``t (shortcut - shortcut_mu)``: (2 or 3, parts,
    N, C).
    """
    grid = find_grid(z)
    normed = shortcut is not None and form.shortcut_mu is not None
    write = bits is not None or second_dy is not None
    t = torch.empty_like(z) if write else dy
    sums = z.new_empty((3 if normed else 2, grid.parts, *z.shape[:2]), dtype=grid.wide)
    with torch.cuda.device_of(z):
        kernels._reduce[grid.columns](
            dy, second_dy, bits, z, shortcut, t, form.a, form.b, form.mu, form.shortcut_mu, sums, sums[1], sums[-1],
            grid.channels, grid.positions, grid.part, _row(form.a), HAS_B=form.b is not None,
            HAS_MU=form.mu is not None, NORMED_SHORTCUT=normed, ACTIVATION=ACTIVATIONS[form.activation],
            SECOND_DY=second_dy is not None, BITS=bits is not None, WRITE=write, **grid.options,
        )  # fmt: skip
    return sums, t


def grads(t: Tensor, z: Tensor, form: Form, m: Tensor, dm: Tensor | None, dv: Tensor | None) -> Tensor:
    """Return ``dz = a t + dm / P + 2 (z - m) dv / P``."""
    grid = find_grid(z)
    dz = torch.empty_like(z)
    with torch.cuda.device_of(z):
        kernels._grads[grid.tiles](
            t, z, dz, form.a, form.b, form.mu, m, dm, dv, grid.channels, grid.positions, _row(form.a), _row(m),
            HAS_B=form.b is not None, HAS_MU=form.mu is not None, HAS_DM=dm is not None, HAS_DV=dv is not None,
            ACTIVATION=ACTIVATIONS[form.activation], **grid.options,
        )  # fmt: skip
    return dz


def _row(a: Tensor) -> int:
    """Return the distance between samples in ``a``: C for (N, C), 0 for (C,), which all samples share."""
    return a.shape[1] if a.dim() == 2 else 0


def unpack_bits(bits: Tensor, z: Tensor) -> Tensor:
    """Return the sign bits of a tail of ``z`` as booleans of ``z``'s shape."""
    grid = find_grid(z)
    eight = (bits[..., None] >> torch.arange(8, device=bits.device)) & 1
    if grid.last:
        live = eight.flatten(2)[..., : grid.channels].transpose(1, 2)  # N C P
    else:
        live = eight.transpose(2, 3).flatten(1, 2)[:, : grid.channels]
    return live.reshape(z.shape).bool()
