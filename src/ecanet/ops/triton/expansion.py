"""The end of a block in its last convolution: ``act(gate * (weight h + bias) + shortcut)``, for inference.

A 1x1 convolution is a matrix product of rows (positions of all samples) and channels. Where the gate is known before
it, gate, shortcut and activation are applied to the sums before they are written: h, weight and shortcut are read,
y is written, and nothing else is.
"""

# ruff: noqa: N803
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ecanet.errors import ConfigError
from ecanet.ops.reference import Activation
from ecanet.ops.triton.launch import ACTIVATIONS
from ecanet.testing import bound_sums, find_elementwise_excess

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PROGRAMS = 256
"""Programs with large tiles below which tiles are small: about two for each processor of a large GPU."""

BAND = tl.constexpr(8)
"""Tiles of rows that go through all channels together, so that both are found in the cache again."""

# kernel: each program owns one tile of rows and channels


@triton.jit
def _expand(
    h_ptr, w_ptr, b_ptr, g_ptr, s_ptr, y_ptr, rows, inner, channels, positions,
    BIAS: tl.constexpr, GATE: tl.constexpr, SHORTCUT: tl.constexpr, ACTIVATION: tl.constexpr, WITHIN: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y = act(g (h w^T + b) + s)``; WITHIN says that a tile meets two samples at most."""
    down, across = tl.cdiv(rows, BLOCK_R), tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    band, place = program // (BAND * across), program % (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    start = (band * BAND + place % height).to(tl.int64) * BLOCK_R
    r = start + tl.arange(0, BLOCK_R)
    c = (place // height).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < channels
    inside = (r < rows)[:, None] & known[None, :]
    y = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, inner, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        here = (r < rows)[:, None] & (k < inner)[None, :]
        h = tl.load(h_ptr + r[:, None] * inner + k[None, :], mask=here, other=0.0)
        here = (k < inner)[:, None] & known[None, :]
        w = tl.load(w_ptr + c[None, :] * inner + k[:, None], mask=here, other=0.0)
        if WIDEN:  # the interpreter has no products of bfloat16; these are exact in float32
            h, w = h.to(tl.float32), w.to(tl.float32)
        y = tl.dot(h, w, y, input_precision="ieee")
    if BIAS:
        y += tl.load(b_ptr + c, mask=known, other=0.0).to(tl.float32)[None, :]
    if GATE:
        if WITHIN:
            n = start // positions
            following = tl.minimum(n + 1, rows // positions - 1)
            g = tl.load(g_ptr + n * channels + c, mask=known, other=0.0).to(tl.float32)
            after = tl.load(g_ptr + following * channels + c, mask=known, other=0.0).to(tl.float32)
            y *= tl.where((r < (n + 1) * positions)[:, None], g[None, :], after[None, :])
        else:
            at = (r // positions)[:, None] * channels + c[None, :]
            y *= tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = r[:, None] * channels + c[None, :]
    if SHORTCUT:
        y += tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != 0:
        y = tl.where(y <= 0, 0.0, y)  # NaN stays
        if ACTIVATION == 2:
            y = tl.where(y >= 6, 6.0, y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


INTERPRETED = type(_expand).__name__ == "InterpretedFunction"
"""Whether Triton runs the kernel on the CPU."""

# launcher


class Tiles(NamedTuple):
    """How the product is cut, and how many warps work on a tile."""

    rows: int
    channels: int
    inner: int
    warps: int


def tiles(rows: int, inner: int, channels: int, dtype: torch.dtype) -> Tiles:
    """Fixed sizes, so that a result is the same every time: small ones for float32 and for few programs."""
    wide = dtype == torch.float32
    depth = min(32 if wide else 64, max(16, triton.next_power_of_2(inner)))
    large = not wide and triton.cdiv(rows, 128) * triton.cdiv(channels, 128) >= PROGRAMS
    side = 128 if large else 64
    return Tiles(side, min(side, max(16, triton.next_power_of_2(channels))), depth, 8 if large else 4)


def _expansion(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, shortcut: Tensor | None, activation: str | None
) -> Tensor:
    y = _fake_expansion(h, weight)
    if not y.numel():
        return y
    inner, channels = h.shape[1], weight.shape[0]
    positions = h.shape[2] * h.shape[3]
    rows = h.shape[0] * positions
    block = tiles(rows, inner, channels, h.dtype)
    programs = triton.cdiv(rows, block.rows) * triton.cdiv(channels, block.channels)
    with torch.cuda.device_of(h):
        _expand[(programs, 1, 1)](
            h, weight.flatten(1).contiguous(), None if bias is None else bias.contiguous(),
            None if gate is None else gate.flatten(1).contiguous(), shortcut, y, rows, inner, channels, positions,
            BIAS=bias is not None, GATE=gate is not None, SHORTCUT=shortcut is not None,
            ACTIVATION=ACTIVATIONS[activation], WITHIN=positions >= block.rows,
            WIDEN=INTERPRETED and h.dtype == torch.bfloat16,
            BLOCK_R=block.rows, BLOCK_C=block.channels, BLOCK_K=block.inner, num_warps=block.warps, num_stages=3,
        )  # fmt: skip
    return y


# operator: the launcher as torch.compile keeps it, whole; modes that watch operations see it too


def _fake_expansion(h: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    shape = (h.shape[0], weight.shape[0], *h.shape[2:])
    return torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=torch.channels_last)


torch.library.custom_op("ecanet::expansion", _expansion, mutates_args=()).register_fake(_fake_expansion)


@register_flop_formula(torch.ops.ecanet.expansion)
def _flops(h: Any, weight: Any, *rest: Any, **options: Any) -> int:
    return 2 * h[0] * h[1] * h[2] * h[3] * weight[0]


# entry point


def expand(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    shortcut: Tensor | None = None,
    activation: Activation = "relu",
) -> Tensor:
    """``act(gate * (weight h + bias) + shortcut)``: a 1x1 convolution and the end of its block, in one kernel.

    ``h`` is (N, K, H, W), ``weight`` (C, K) or (C, K, 1, 1) of the same dtype; ``bias`` (C,), ``gate`` (N, C) or
    (N, C, 1, 1) and ``shortcut`` (N, C, H, W) may be of another. Sums run in float32 and are rounded once, at the end.
    Returns (N, C, H, W), channels-last. It has no gradient.

    Raises:
        ConfigError: a shape, dtype, device or memory format does not fit, or a gradient is asked for.
    """
    why = _mismatch(h, weight, bias, gate, shortcut) or _obstacle(h, weight, bias, gate, shortcut)
    if activation not in ACTIVATIONS:
        why = f"unknown activation {activation!r}; choose 'relu', 'relu6' or None"
    if why is not None:
        raise ConfigError(f"expand does not apply: {why}")
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    launch = torch.ops.ecanet.expansion if watched else _expansion
    return launch(h, weight, bias, gate, shortcut, activation)


def _mismatch(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, shortcut: Tensor | None
) -> str | None:
    """Which shape does not fit, if one does not."""
    if h.dim() != 4:
        return f"h must be (N, K, H, W), got shape {tuple(h.shape)}"
    (n, inner, *plane), channels = h.shape, weight.shape[0]
    expected = {
        "weight": (weight, [(channels, inner), (channels, inner, 1, 1)]),
        "bias": (bias, [(channels,)]),
        "gate": (gate, [(n, channels), (n, channels, 1, 1)]),
        "shortcut": (shortcut, [(n, channels, *plane)]),
    }
    for name, (x, shapes) in expected.items():
        if x is not None and tuple(x.shape) not in shapes:
            return f"{name} must be {shapes[0]} for h {tuple(h.shape)}, got {tuple(x.shape)}"
    return None


def _obstacle(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, shortcut: Tensor | None
) -> str | None:
    """Why tensors of fitting shapes cannot be taken, if they cannot."""
    given = [x for x in (h, weight, bias, gate, shortcut) if x is not None]
    if not (h.is_cuda or INTERPRETED or h.device.type == "meta"):
        return f"it needs CUDA tensors, got one on {h.device}"
    if any(x.device != h.device for x in given):
        return f"tensors lie on {' and '.join(sorted({str(x.device) for x in given}))}"
    if weight.dtype != h.dtype:
        return f"h is {h.dtype} and weight {weight.dtype}"
    for x in given:
        if x.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, got {x.dtype}"
    for name, x in (("h", h), ("shortcut", shortcut)):
        if x is not None and not x.is_contiguous(memory_format=torch.channels_last):
            return f"{name} is not channels-last; use {name}.contiguous(memory_format=torch.channels_last)"
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "it has no gradient; use it under torch.no_grad()"
    return None


# proof: what `proof` tries on a device before networks use the kernel there by themselves


class Case(NamedTuple):
    """Which parts of the equation there are."""

    biased: bool
    gated: bool
    added: bool
    activation: Activation


USUAL = (Case(True, True, True, "relu"), Case(True, False, True, "relu"))

TRIED = {
    (3, 19, 37, 5, 3): (*USUAL, Case(True, True, False, "relu6"), Case(False, False, True, None)),
    (2, 64, 208, 14, 14): USUAL,
    (3, 128, 96, 7, 7): USUAL[:1],
    (3, 144, 208, 93, 61): USUAL,
}
"""Cases by N, K, C, H, W: multiples of nothing; and of 16 channels, as networks have them, in small and large tiles."""


def find_discrepancy(device: torch.device, dtype: torch.dtype) -> str | None:
    """How the kernel is wrong on ``device``; None if it is not."""
    for shape, cases in TRIED.items():
        for case in cases:
            given = inputs(shape, case, device, dtype)
            y = _expansion(*given, case.activation)
            expected, allowed = exact(*given, case.activation)
            excess = find_elementwise_excess("y", y, expected, allowed)
            if excess is not None:
                return f"{excess} ({case}, {shape}, {dtype})"
    return None


def inputs(shape: tuple[int, ...], case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Random h, weight, bias, gate and shortcut of a case, from a generator of their own."""
    n, inner, channels, *plane = shape
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(*size: int, wide: bool = False) -> Tensor:
        x = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        last = torch.channels_last if len(size) == 4 else torch.contiguous_format
        return x.to(device, torch.float32 if wide else dtype).contiguous(memory_format=last)

    h, weight, bias = draw(n, inner, *plane), draw(channels, inner), draw(channels)
    gate, shortcut = draw(n, channels, wide=True).sigmoid(), draw(n, channels, *plane)
    chosen = zip((case.biased, case.gated, case.added), (bias, gate, shortcut), strict=True)
    return h, weight, *(x if wanted else None for wanted, x in chosen)


def exact(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, shortcut: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far from it one may be whose sums are float32 and which is rounded once.

    Each of K products, bias, gate and shortcut may cost a rounding of the absolute values summed.
    """
    x, w = h.movedim(1, -1).double(), weight.double()
    y, terms = x @ w.t(), x.abs() @ w.abs().t()
    if bias is not None:
        y, terms = y + bias.double(), terms + bias.double().abs()
    if gate is not None:
        scale = gate.double()[:, None, None]
        y, terms = y * scale, terms * scale.abs()
    if shortcut is not None:
        addend = shortcut.movedim(1, -1).double()
        y, terms = y + addend, terms + addend.abs()
    y = y if activation is None else y.clamp(0, 6 if activation == "relu6" else None)
    truncates = INTERPRETED and h.dtype == torch.bfloat16  # the interpreter does not round to bfloat16, it truncates
    allowed = bound_sums(y, terms, h.shape[1] + 4, h.dtype, truncates=truncates)
    return y.movedim(-1, 1), allowed.movedim(-1, 1)
