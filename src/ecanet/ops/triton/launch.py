"""The passes of a residual tail in Triton kernels: launchers, and operators that `torch.compile` leaves whole."""

# Triton's launcher converts plain numbers to constexpr, but its annotations do not accept them.
# pyright: reportArgumentType=false

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecanet.errors import ConfigError
from ecanet.ops.passes import Form
from ecanet.ops.reference import Activation, accumulation_dtype
from ecanet.ops.triton import kernels

TILE = 2048
"""Elements of a tile: 16 for each thread of four warps."""

PROGRAMS = 1024
"""A reduction with fewer programs splits planes into parts: about eight programs for each processor of a large GPU."""

ACTIVATIONS: dict[Activation, int] = {None: 0, "relu": 1, "relu6": 2}

INTERPRETED = type(kernels._apply).__name__ == "InterpretedFunction"
"""True if Triton's interpreter runs these kernels on the CPU (TRITON_INTERPRET=1 before the import)."""

recomputes_sign = True


def check(x: Tensor) -> None:
    """Check that the kernels can run on ``x``'s device.

    Raises:
        ConfigError: They cannot.
    """
    if not (x.is_cuda or INTERPRETED or x.device.type == "meta"):
        raise ConfigError(f"impl='fused' needs a CUDA tensor, got one on {x.device}; use impl='lean'")


def moments(z: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each plane."""
    if order == 0:
        return z.new_zeros((2, *z.shape[:2]), dtype=accumulation_dtype(z.dtype)).unbind()  # pyright: ignore[reportReturnType]
    return _find_launcher(_moments)(z, order).unbind()


def apply(z: Tensor, shortcut: Tensor | None, form: Form) -> tuple[Tensor, Tensor | None]:
    """Return ``y`` of the form and, with a shortcut and an activation, the activation's sign bits."""
    y, bits = _find_launcher(_apply)(
        z, shortcut, form.a, form.b, form.mu, form.shortcut_a, form.shortcut_mu, form.activation
    )
    return y, None if shortcut is None or form.activation is None else bits


def reduce(
    dy: Tensor, second_dy: Tensor | None, kept: Tensor | None, z: Tensor, shortcut: Tensor | None, form: Form
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the sums over each plane, and t (dy where the sign is recomputed)."""
    sums, t = _find_launcher(_reduce)(
        dy, second_dy, kept, z, shortcut, form.a, form.b, form.mu, form.shortcut_mu, form.activation
    )
    return sums[0], sums[1], sums[2] if len(sums) > 2 else None, dy if kept is None and second_dy is None else t


def grads(t: Tensor, z: Tensor, form: Form, m: Tensor, dm: Tensor | None, dv: Tensor | None) -> Tensor:
    """Return ``dz = a t + dm / P + 2 (z - m) dv / P``."""
    return _find_launcher(_grads)(t, z, form.a, form.b, form.mu, m, dm, dv, form.activation)


def find_active(kept: Tensor, z: Tensor, form: Form) -> Tensor:
    """Return the sign bits as booleans of ``z``'s shape."""
    grid = _Grid(z)
    eight = (kept[..., None] >> torch.arange(8, device=kept.device)) & 1
    if grid.last:
        live = eight.flatten(2)[..., : grid.channels].transpose(1, 2)  # N C P
    else:
        live = eight.transpose(2, 3).flatten(1, 2)[:, : grid.channels]
    return live.reshape(z.shape).bool()


def _find_launcher(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the launcher or, under `torch.compile`, the operator that calls it."""
    return getattr(torch.ops.ecanet, function.__name__[1:]) if torch.compiler.is_compiling() else function


# launchers: shapes, grids, allocations. Each enters its tensors' device, which need not be the current one.


class _Grid:
    """How a tensor (N, C, ...) is cut into tiles, and the grids of launches over it."""

    def __init__(self, z: Tensor):
        self.n, self.channels = z.shape[:2]
        self.positions = z[:1, :1].numel() if z.numel() else 0
        self.last = self.channels > 1 and self.positions > 1 and z.stride(1) == 1
        if self.last:
            self.block_c = min(64, max(8, triton.next_power_of_2(self.channels)))
            self.block_p = min(TILE // self.block_c, triton.next_power_of_2(self.positions))
        else:
            self.block_p = min(TILE // 8, triton.next_power_of_2(max(1, self.positions)))
            self.block_c = min(max(8, TILE // self.block_p), max(8, triton.next_power_of_2(self.channels)))
        self.wide = tl.float64 if z.dtype == torch.float64 else tl.float32

    @property
    def tiles(self) -> tuple[int, int, int]:
        """The grid with a program for each tile. Only the first axis of a grid is long enough for any number."""
        return self.n * triton.cdiv(self.positions, self.block_p) * triton.cdiv(self.channels, self.block_c), 1, 1

    @property
    def part(self) -> int:
        """Positions of a plane that one program sums: all of them, unless that gives fewer than PROGRAMS programs."""
        programs = self.n * triton.cdiv(self.channels, self.block_c)
        parts = max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(self.positions, 2 * self.block_p)))
        return triton.cdiv(triton.cdiv(self.positions, parts), self.block_p) * self.block_p

    @property
    def columns(self) -> tuple[int, int, int]:
        """The grid with one program for each sample, block of channels and part of the planes."""
        return self.n, triton.cdiv(self.channels, self.block_c), triton.cdiv(self.positions, self.part)

    @property
    def options(self) -> dict[str, Any]:
        """The constexpr arguments that all kernels take."""
        return {"LAST": self.last, "BLOCK_P": self.block_p, "BLOCK_C": self.block_c, "WIDE": self.wide}

    def allocate_bits(self, z: Tensor) -> Tensor:
        """Return an uninitialised tensor for the sign bits: one byte for eight channels of a position."""
        width = triton.cdiv(self.channels, 8)
        shape = (self.n, self.positions, width) if self.last else (self.n, width, self.positions)
        return z.new_empty(shape, dtype=torch.uint8)


def _moments(z: Tensor, order: int) -> Tensor:
    grid = _Grid(z)
    if not z.numel():
        return z.new_zeros((2, *z.shape[:2]), dtype=accumulation_dtype(z.dtype))
    count = grid.columns[2]
    parts = z.new_empty((2, count, *z.shape[:2]), dtype=accumulation_dtype(z.dtype))
    if order == 1:
        parts[1].zero_()
    with torch.cuda.device_of(z):
        kernels._moments[grid.columns](
            z, parts[0], parts[1], grid.channels, grid.positions, grid.part, ORDER=order, **grid.options
        )
    if count == 1:
        return parts[:, 0]
    # combine the parts by the law of total variance; the last one may be shorter
    share = parts.new_full((count, 1, 1), grid.part / grid.positions)
    share[-1] = 1 - (count - 1) * grid.part / grid.positions
    m = (share * parts[0]).sum(0)
    return torch.stack((m, (share * (parts[1] + (parts[0] - m).square())).sum(0)))


def _apply(
    z: Tensor, shortcut: Tensor | None, a: Tensor, b: Tensor | None, mu: Tensor | None,
    shortcut_a: Tensor | None, shortcut_mu: Tensor | None, activation: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grid = _Grid(z)
    y = torch.empty_like(z)
    keep = activation is not None and shortcut is not None
    bits = grid.allocate_bits(z) if keep else z.new_empty(0, dtype=torch.uint8)
    if not z.numel():
        return y, bits
    with torch.cuda.device_of(z):
        kernels._apply[grid.tiles](
            z, shortcut, y, bits, _pack(a), _pack(b), mu, _pack(shortcut_a), shortcut_mu,
            grid.channels, grid.positions, HAS_B=b is not None, HAS_MU=mu is not None,
            SHORTCUT=0 if shortcut is None else 1 if shortcut_a is None else 2,
            ACTIVATION=ACTIVATIONS[activation], BITS=keep, **grid.options,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    return y, bits


def _reduce(
    dy: Tensor, second_dy: Tensor | None, bits: Tensor | None, z: Tensor, shortcut: Tensor | None, a: Tensor,
    b: Tensor | None, mu: Tensor | None, shortcut_mu: Tensor | None, activation: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grid = _Grid(z)
    normed = shortcut is not None and shortcut_mu is not None
    write = bits is not None or second_dy is not None
    t = torch.empty_like(z) if write else z.new_empty(0)
    kinds = 3 if normed else 2
    if not z.numel():
        return z.new_zeros((kinds, *z.shape[:2]), dtype=accumulation_dtype(z.dtype)), t
    parts = z.new_empty((kinds, grid.columns[2], *z.shape[:2]), dtype=accumulation_dtype(z.dtype))
    with torch.cuda.device_of(z):
        kernels._reduce[grid.columns](
            dy, second_dy, bits, z, shortcut, t, _pack(a), _pack(b), mu, shortcut_mu, parts[0], parts[1], parts[-1],
            grid.channels, grid.positions, grid.part, HAS_B=b is not None, HAS_MU=mu is not None,
            NORMED_SHORTCUT=normed, ACTIVATION=ACTIVATIONS[activation],  # pyright: ignore[reportArgumentType]
            SECOND_DY=second_dy is not None, BITS=bits is not None, WRITE=write, **grid.options,
        )  # fmt: skip
    return parts.sum(1) if parts.shape[1] > 1 else parts[:, 0], t


def _grads(
    t: Tensor, z: Tensor, a: Tensor, b: Tensor | None, mu: Tensor | None, m: Tensor, dm: Tensor | None,
    dv: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    grid = _Grid(z)
    dz = torch.empty_like(z)
    if not z.numel():
        return dz
    with torch.cuda.device_of(z):
        kernels._grads[grid.tiles](
            t, z, dz, _pack(a), _pack(b), _pack(mu), m, _pack(dm), _pack(dv),
            grid.channels, grid.positions, HAS_B=b is not None, HAS_MU=mu is not None, HAS_DM=dm is not None,
            HAS_DV=dv is not None, ACTIVATION=ACTIVATIONS[activation], **grid.options,  # pyright: ignore
        )  # fmt: skip
    return dz


def _pack(x: Tensor | None) -> Tensor | None:
    """Return ``x`` contiguous: kernels index (N, C) tensors without strides."""
    return None if x is None else x.contiguous()


# operators: the launchers as operators of PyTorch, which torch.compile leaves whole


def _register_operator(function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    torch.library.custom_op(f"ecanet::{function.__name__[1:]}", function, mutates_args=()).register_fake(fake)


def _fake_moments(z: Tensor, order: int) -> Tensor:
    return z.new_empty((2, *z.shape[:2]), dtype=accumulation_dtype(z.dtype))


def _fake_apply(z: Tensor, shortcut: Tensor | None, a: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    keep = shortcut is not None and rest[-1] is not None
    return torch.empty_like(z), _Grid(z).allocate_bits(z) if keep else z.new_empty(0, dtype=torch.uint8)


def _fake_reduce(
    dy: Tensor, second_dy: Tensor | None, bits: Tensor | None, z: Tensor, shortcut: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor]:
    kinds = 3 if shortcut is not None and rest[-2] is not None else 2
    sums = z.new_empty((kinds, *z.shape[:2]), dtype=accumulation_dtype(z.dtype))
    return sums, z.new_empty(0) if bits is None and second_dy is None else torch.empty_like(z)


def _fake_grads(t: Tensor, z: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(z)


_register_operator(_moments, _fake_moments)
_register_operator(_apply, _fake_apply)
_register_operator(_reduce, _fake_reduce)
_register_operator(_grads, _fake_grads)
