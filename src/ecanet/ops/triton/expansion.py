"""A block's last 1x1 convolution with what follows it, for inference: ``act(gate * (weight h + bias) + shortcut)``.

A 1x1 convolution of a channels-last tensor is a matrix product: its rows are the positions of all samples, its columns
the channels. Where the gate is known before the convolution, gate, shortcut and activation are applied to the sums
before they are written. So h, weight and shortcut are read, y is written, and there is no other traffic. A shortcut
with a convolution of its own leaves its bias to the kernel (``offset``), because PyTorch adds it in another pass.
"""

# ruff: noqa: N803
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ecanet.errors import ConfigError
from ecanet.ops.reference import Activation
from ecanet.ops.triton.kernels import load_channels
from ecanet.ops.triton.tiles import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PROGRAMS = 256
"""Large tiles are used if they give this many programs: about two for each processor of a large GPU."""

NEAR = 2**31 - 2**20
"""Tensors with fewer elements have offsets of 32 bits, also in the last tile, which may reach beyond the end."""

BAND = tl.constexpr(8)
"""Tiles of rows in a band. Successive programs compute a band for all channels: h and weight stay in the cache."""

# kernel: each program computes one tile of rows and channels


@triton.jit
def _expand(
    h_ptr, w_ptr, b_ptr, g_ptr, s_ptr, o_ptr, y_ptr, rows, inner, channels, positions,
    BIAS: tl.constexpr, GATE: tl.constexpr, SHORTCUT: tl.constexpr, OFFSET: tl.constexpr, ACTIVATION: tl.constexpr,
    WITHIN: tl.constexpr, FAR: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store ``y = act(g (h w^T + b) + s + o)``. WITHIN: a tile has rows of at most two samples.

    FAR: offsets need 64 bits, which take several times as many instructions.
    """
    down, across = tl.cdiv(rows, BLOCK_R), tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    band, place = program // (BAND * across), program % (BAND * across)  # place: number of the tile in its band
    height = tl.minimum(down - band * BAND, BAND)
    down, across = band * BAND + place % height, place // height
    if FAR:
        down, across = down.to(tl.int64), across.to(tl.int64)
    start = down * BLOCK_R
    r, c = start + tl.arange(0, BLOCK_R), across * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < channels
    inside = (r < rows)[:, None] & known[None, :]
    at = r[:, None] * channels + c[None, :]
    # the shortcut is on its way from memory during the product
    s = tl.load(s_ptr + at, mask=inside, other=0.0) if SHORTCUT else tl.zeros([1, 1], tl.float32)
    y = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, inner, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        here, there = (r < rows)[:, None] & (k < inner)[None, :], (k < inner)[:, None] & known[None, :]
        h = tl.load(h_ptr + r[:, None] * inner + k[None, :], mask=here, other=0.0)
        w = tl.load(w_ptr + c[None, :] * inner + k[:, None], mask=there, other=0.0)
        if WIDEN:  # the interpreter cannot multiply bfloat16; the products are exact in float32
            h, w = h.to(tl.float32), w.to(tl.float32)
        y = tl.dot(h, w, y, input_precision="ieee")
    y += load_channels(b_ptr, 0, c, channels, BIAS, tl.float32)
    if GATE:
        if WITHIN:
            n, following = start // positions, tl.minimum(start // positions + 1, rows // positions - 1)
            g = tl.load(g_ptr + n * channels + c, mask=known, other=0.0).to(tl.float32)
            after = tl.load(g_ptr + following * channels + c, mask=known, other=0.0).to(tl.float32)
            y *= tl.where((r < (n + 1) * positions)[:, None], g[None, :], after[None, :])
        else:
            y *= tl.load(g_ptr + (r // positions)[:, None] * channels + c[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
    if SHORTCUT:
        y += s.to(tl.float32)
    y += load_channels(o_ptr, 0, c, channels, OFFSET, tl.float32)
    if ACTIVATION != 0:
        y = tl.where(y <= 0, 0.0, y)  # this keeps NaN; tl.maximum would not
        if ACTIVATION == 2:
            y = tl.where(y >= 6, 6.0, y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


INTERPRETED = type(_expand).__name__ == "InterpretedFunction"
"""True if Triton's interpreter runs the kernel on the CPU."""

# launcher


class Tiles(NamedTuple):
    """The size of a tile of the product, the step along its inner axis, and the warps for a tile."""

    rows: int
    channels: int
    inner: int
    warps: int


def choose_tiles(rows: int, inner: int, channels: int, dtype: torch.dtype) -> Tiles:
    """Return the tiles for a product: small ones for float32, and where large ones would give few programs.

    Small ones also for few inputs, where the time goes into shortcut and output: a processor runs four small tiles at
    once, of which some wait for memory while others compute, but only one large tile. Tiles depend on shapes and dtype
    only and are not tuned by timing, so that a result is the same every time.
    """
    wide = dtype == torch.float32
    depth = min(32 if wide else 64, max(16, triton.next_power_of_2(inner)))
    large = not wide and inner > 64 and triton.cdiv(rows, 128) * triton.cdiv(channels, 128) >= PROGRAMS
    side = 128 if large else 64
    return Tiles(side, min(side, max(16, triton.next_power_of_2(channels))), depth, 8 if large else 4)


def run_expansion(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, shortcut: Tensor | None,
    activation: str | None, offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return what `expand` does, without its checks."""
    y = _fake_expansion(h, weight)
    if not y.numel():
        return y
    inner, channels = h.shape[1], weight.shape[0]
    positions = h.shape[2] * h.shape[3]
    rows = h.shape[0] * positions
    block = choose_tiles(rows, inner, channels, h.dtype)
    programs = triton.cdiv(rows, block.rows) * triton.cdiv(channels, block.channels)
    with torch.cuda.device_of(h):
        _expand[(programs, 1, 1)](
            h, weight.flatten(1).contiguous(), None if bias is None else bias.contiguous(),
            None if gate is None else gate.flatten(1).contiguous(), shortcut,
            None if offset is None else offset.contiguous(), y, rows, inner, channels, positions,
            BIAS=bias is not None, GATE=gate is not None, SHORTCUT=shortcut is not None, OFFSET=offset is not None,
            ACTIVATION=ACTIVATIONS[activation], WITHIN=positions >= block.rows, FAR=rows * max(inner, channels) >= NEAR,
            WIDEN=INTERPRETED and h.dtype == torch.bfloat16,
            BLOCK_R=block.rows, BLOCK_C=block.channels, BLOCK_K=block.inner, num_warps=block.warps, num_stages=3,
        )  # fmt: skip
    return y


# operator: the launcher as an operator of PyTorch, which torch.compile leaves whole and dispatch modes see


def _fake_expansion(h: Tensor, weight: Tensor, *rest: object) -> Tensor:
    shape = (h.shape[0], weight.shape[0], *h.shape[2:])
    return torch.empty(shape, dtype=h.dtype, device=h.device, memory_format=torch.channels_last)


torch.library.custom_op("ecanet::expansion", run_expansion, mutates_args=()).register_fake(_fake_expansion)


@register_flop_formula(torch.ops.ecanet.expansion)
def _flops(h: Sequence[int], weight: Sequence[int], *rest: object, **options: object) -> int:
    return 2 * h[0] * h[1] * h[2] * h[3] * weight[0]


# entry point


def expand(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    shortcut: Tensor | None = None,
    activation: Activation = "relu",
    offset: Tensor | None = None,
) -> Tensor:
    """Return ``act(gate * (weight h + bias) + shortcut + offset)``: a 1x1 convolution and the end of its block.

    ``h`` is (N, K, H, W), ``weight`` (C, K) or (C, K, 1, 1) in the same dtype. ``bias`` and ``offset`` (C,), ``gate``
    (N, C) or (N, C, 1, 1) and ``shortcut`` (N, C, H, W) may have other dtypes. Sums run in float32 and are rounded
    once, at the end. The result is (N, C, H, W), channels-last, and has no gradient.

    Raises:
        ConfigError: A shape, dtype, device or memory format does not fit, or an input requires a gradient.
    """
    given = h, weight, bias, gate, shortcut, offset
    obstacle = _find_mismatch(*given) or _find_obstacle(*given)
    if activation not in ACTIVATIONS:
        obstacle = f"unknown activation {activation!r}; choose 'relu', 'relu6' or None"
    if obstacle is not None:
        raise ConfigError(f"expand does not apply: {obstacle}")
    # a compiler, or a dispatch mode such as FlopCounterMode, must see an operator; the launcher itself starts faster
    needs_operator = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    launch = torch.ops.ecanet.expansion if needs_operator else run_expansion
    return launch(h, weight, bias, gate, shortcut, activation, offset)


def _find_mismatch(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, shortcut: Tensor | None, offset: Tensor | None
) -> str | None:
    """Return which shape does not fit, None if all do."""
    if h.dim() != 4:
        return f"h must be (N, K, H, W), got shape {tuple(h.shape)}"
    (n, inner, *plane), channels = h.shape, weight.shape[0]
    expected = {
        "weight": (weight, [(channels, inner), (channels, inner, 1, 1)]),
        "bias": (bias, [(channels,)]),
        "gate": (gate, [(n, channels), (n, channels, 1, 1)]),
        "shortcut": (shortcut, [(n, channels, *plane)]),
        "offset": (offset, [(channels,)]),
    }
    for name, (x, shapes) in expected.items():
        if x is not None and tuple(x.shape) not in shapes:
            return f"{name} must be {shapes[0]} for h {tuple(h.shape)}, got {tuple(x.shape)}"
    return None


def _find_obstacle(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, shortcut: Tensor | None, offset: Tensor | None
) -> str | None:
    """Return why the kernel does not support tensors whose shapes fit, None if it does."""
    given = [x for x in (h, weight, bias, gate, shortcut, offset) if x is not None]
    if not (h.is_cuda or INTERPRETED or h.device.type == "meta"):
        return f"it needs CUDA tensors, got one on {h.device}"
    if any(x.device != h.device for x in given):
        return f"tensors are on {' and '.join(sorted({str(x.device) for x in given}))}"
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
