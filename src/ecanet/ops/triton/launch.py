"""The passes of a residual tail in Triton kernels, as `ops.passes` describes them.

Under `torch.compile` each pass is an operator of PyTorch, which the compiler leaves whole. Otherwise `node` runs most
tails as a whole.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ecanet.errors import ConfigError
from ecanet.ops.passes import Form
from ecanet.ops.reference import accumulation_dtype
from ecanet.ops.triton import kernels, tiles
from ecanet.ops.triton.node import run_tail
from ecanet.ops.triton.tiles import Launch

__all__ = [
    "Launch", "apply", "check", "find_active", "finish_in_place", "grads", "moments", "recomputes_sign", "reduce",
    "run_tail",
]  # fmt: skip

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
    y, bits = _find_launcher(_apply_packed)(
        z, shortcut, form.a, form.b, form.mu, form.shortcut_a, form.shortcut_mu, form.activation
    )
    return y, None if shortcut is None or form.activation is None else bits


def reduce(
    dy: Tensor, second_dy: Tensor | None, kept: Tensor | None, z: Tensor, shortcut: Tensor | None, form: Form
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the sums over each plane, and t (dy where the sign is recomputed)."""
    sums, t = _find_launcher(_reduce_packed)(
        dy, second_dy, kept, z, shortcut, form.a, form.b, form.mu, form.shortcut_mu, form.activation
    )
    return sums[0], sums[1], sums[2] if len(sums) > 2 else None, dy if kept is None and second_dy is None else t


def grads(t: Tensor, z: Tensor, form: Form, m: Tensor, dm: Tensor | None, dv: Tensor | None) -> Tensor:
    """Return ``dz = a t + dm / P + 2 (z - m) dv / P``."""
    return _find_launcher(_grads)(t, z, form.a, form.b, form.mu, m, dm, dv, form.activation)


def finish_in_place(y: Tensor, bias: Tensor | None, shortcut: Tensor | None) -> Tensor:
    """Return ``relu(y + bias + shortcut)``, written into ``y``. All have one dtype, y and shortcut one dense layout."""
    with torch.cuda.device_of(y):
        tiles.finish_in_place(y, bias, shortcut)
    return y


def find_active(kept: Tensor, z: Tensor, form: Form) -> Tensor:
    """Return the sign bits as booleans of ``z``'s shape."""
    return tiles.unpack_bits(kept, z)


def _find_launcher(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function or, under `torch.compile`, the operator that calls it."""
    return getattr(torch.ops.ecanet, function.__name__[1:]) if torch.compiler.is_compiling() else function


# the operators. Their arguments are tensors and plain values, and no result is an argument. PyTorch keeps compiled
# graphs on disk by the names of their operators: change the name of one whose results get another shape.


def _moments(z: Tensor, order: int) -> Tensor:
    if not z.numel():
        return z.new_zeros((2, *z.shape[:2]), dtype=accumulation_dtype(z.dtype))
    with torch.cuda.device_of(z):
        parts, grid = tiles.moments(z, order), tiles.find_grid(z)
    if order == 1:
        parts[1].zero_()
    if grid.parts == 1:
        return parts[:, 0]
    # combine the parts by the law of total variance; the last one may be shorter
    share = parts.new_full((grid.parts, 1, 1), grid.part / grid.positions)
    share[-1] = 1 - (grid.parts - 1) * grid.part / grid.positions
    m = (share * parts[0]).sum(0)
    return torch.stack((m, (share * (parts[1] + (parts[0] - m).square())).sum(0)))


def _apply_packed(
    z: Tensor, shortcut: Tensor | None, a: Tensor, b: Tensor | None, mu: Tensor | None,
    shortcut_a: Tensor | None, shortcut_mu: Tensor | None, activation: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not z.numel():
        return _fake_apply(z, shortcut, activation)
    form = _pack(a=a, b=b, mu=mu, shortcut_a=shortcut_a, shortcut_mu=shortcut_mu, activation=activation)
    with torch.cuda.device_of(z):
        y, bits = tiles.apply(z, shortcut, form)
    return y, z.new_empty(0, dtype=torch.uint8) if bits is None else bits


def _reduce_packed(
    dy: Tensor, second_dy: Tensor | None, bits: Tensor | None, z: Tensor, shortcut: Tensor | None, a: Tensor,
    b: Tensor | None, mu: Tensor | None, shortcut_mu: Tensor | None, activation: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not z.numel():
        sums, t = _fake_reduce(dy, second_dy, bits, z, shortcut, shortcut_mu, None)
        return sums.zero_(), t
    form = _pack(a=a, b=b, mu=mu, shortcut_mu=shortcut_mu, activation=activation)
    with torch.cuda.device_of(z):
        sums, t = tiles.reduce(dy, second_dy, bits, z, shortcut, form)
    return sums.sum(1) if sums.shape[1] > 1 else sums[:, 0], z.new_empty(0) if t is dy else t


def _grads(
    t: Tensor, z: Tensor, a: Tensor, b: Tensor | None, mu: Tensor | None, m: Tensor, dm: Tensor | None,
    dv: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    if not z.numel():
        return torch.empty_like(z)
    dm, dv = (None if x is None else x.contiguous() for x in (dm, dv))
    with torch.cuda.device_of(z):
        return tiles.grads(t, z, _pack(a=a, b=b, mu=mu, activation=activation), m, dm, dv)


def _pack(**fields: Any) -> Form:
    """Return a form of these fields, contiguous: kernels index (N, C) tensors without strides."""
    return Form(**{name: x.contiguous() if isinstance(x, Tensor) else x for name, x in fields.items()})


def _register_operator(function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    torch.library.custom_op(f"ecanet::{function.__name__[1:]}", function, mutates_args=()).register_fake(fake)


def _fake_moments(z: Tensor, order: int) -> Tensor:
    return z.new_empty((2, *z.shape[:2]), dtype=accumulation_dtype(z.dtype))


def _fake_apply(z: Tensor, shortcut: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    keep = shortcut is not None and rest[-1] is not None
    return torch.empty_like(z), z.new_empty(tiles.shape_bits(z), dtype=torch.uint8) if keep else z.new_empty(
        0, dtype=torch.uint8
    )


def _fake_reduce(
    dy: Tensor, second_dy: Tensor | None, bits: Tensor | None, z: Tensor, shortcut: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    kinds = 3 if shortcut is not None and rest[-2] is not None else 2
    sums = z.new_empty((kinds, *z.shape[:2]), dtype=accumulation_dtype(z.dtype))
    return sums, z.new_empty(0) if bits is None and second_dy is None else torch.empty_like(z)


def _fake_grads(t: Tensor, z: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(z)


_register_operator(_moments, _fake_moments)
_register_operator(_apply_packed, _fake_apply)
_register_operator(_reduce_packed, _fake_reduce)
_register_operator(_grads, _fake_grads)
