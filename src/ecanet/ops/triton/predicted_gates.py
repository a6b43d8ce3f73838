"""The factors of a gate behind a 1x1 convolution, from the channel means of the convolution's input, for inference.

A 1x1 convolution maps means to means, so the gate is known before the convolution has run:

    p[n, c] = sum_k weight[c, k] m[n, k] + bias[c]
    g[n, c] = gain * sigmoid(sum_j taps[j] p[n, c + j - K // 2] + gate_bias)

PyTorch's operations are up to seven small kernels for this (casts of weight, bias and taps, a product, padding, a
product with the taps, a sigmoid). All of them read and write little, so that the time is that of their launches.
"""

# ruff: noqa: N803
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ecanet.errors import ConfigError
from ecanet.ops.channel_gates import ChannelGate
from ecanet.ops.triton.algebra import find_lanes

WIDTH = 64
"""Channels of a program. Those at both ends are neighbours only, which another program stores."""

DEPTH = 32
"""Step along the inner axis of the product."""


@triton.jit(do_not_specialize=["samples"])
def _predict_gate(
    m_ptr, w_ptr, b_ptr, taps_ptr, gate_bias_ptr, g_ptr, samples, inner, channels,
    GAIN: tl.constexpr, TAPS: tl.constexpr, EACH: tl.constexpr, CIRCULAR: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the factors of BLOCK_N samples and WIDTH channels. EACH: each channel has taps of its own.

    The product is computed in three products of TF32, which keep the digits of float32. Channels that do not exist have
    no weight and no bias, so they are the zeros with which ECA pads.
    """
    c, valid, own = find_lanes(channels, TAPS, CIRCULAR, WIDTH)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = n < samples
    p = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for first in range(0, inner, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        here, there = known[:, None] & (k < inner)[None, :], (k < inner)[:, None] & valid[None, :]
        m = tl.load(m_ptr + n[:, None] * inner + k[None, :], mask=here, other=0.0)
        w = tl.load(w_ptr + c[None, :] * inner + k[:, None], mask=there, other=0.0).to(tl.float32)
        p = tl.dot(m, w, p, input_precision="tf32x3")
    if b_ptr is not None:
        p += tl.load(b_ptr + c, mask=valid, other=0.0).to(tl.float32)[None, :]
    lane = tl.arange(0, WIDTH)
    q = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for j in tl.static_range(TAPS):
        near = tl.minimum(tl.maximum(lane + (j - TAPS // 2), 0), WIDTH - 1)
        term = tl.gather(p, tl.broadcast_to(near[None, :], [BLOCK_N, WIDTH]), 1)
        if EACH:
            term *= tl.load(taps_ptr + c * TAPS + j, mask=valid, other=0.0).to(tl.float32)[None, :]
        elif taps_ptr is not None:
            term *= tl.load(taps_ptr + j).to(tl.float32)
        q += term
    if gate_bias_ptr is not None:
        q += tl.load(gate_bias_ptr).to(tl.float32)
    g = GAIN / (1 + tl.exp(-q))
    tl.store(g_ptr + n[:, None] * channels + c[None, :], g, mask=known[:, None] & own[None, :])


def run_prediction(
    m: Tensor, weight: Tensor, bias: Tensor | None, taps_weight: Tensor | None, gate_bias: Tensor | None,
    taps: int, own_taps: bool, circular: bool, gain: float,
) -> Tensor:  # fmt: skip
    """Return the factors (N, C), float32, for means ``m`` (N, K), float32, and ``weight`` (C, K) or (C, K, 1, 1).

    The rest describes the gate as `ChannelGate` does.
    """
    g = _fake_prediction(m, weight)
    if not g.numel():
        return g
    (samples, inner), channels = m.shape, len(weight)
    block = 16 if samples <= 16 else 32 if samples <= 32 else 64
    grid = triton.cdiv(channels, WIDTH - taps + 1), triton.cdiv(samples, block), 1
    with torch.cuda.device_of(m):
        _predict_gate[grid](
            m.contiguous(), weight.flatten(1).contiguous(), None if bias is None else bias.contiguous(),
            None if taps_weight is None else taps_weight.contiguous(), gate_bias, g, samples, inner, channels,
            GAIN=gain, TAPS=taps, EACH=own_taps, CIRCULAR=circular,
            BLOCK_N=block, WIDTH=WIDTH, BLOCK_K=DEPTH, num_warps=4, num_stages=3,
        )  # fmt: skip
    return g


def _fake_prediction(m: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return torch.empty((len(m), len(weight)), dtype=torch.float32, device=m.device)


torch.library.custom_op("ecanet::predict_gate", run_prediction, mutates_args=()).register_fake(_fake_prediction)


@register_flop_formula(torch.ops.ecanet.predict_gate)
def _flops(m: Sequence[int], weight: Sequence[int], *rest: object, **options: object) -> int:
    return 2 * m[0] * m[1] * weight[0]


def predict_gate(m: Tensor, weight: Tensor, bias: Tensor | None, form: ChannelGate) -> Tensor:
    """Return the factors (N, C), float32, of the gate ``form`` behind a 1x1 convolution.

    ``m`` (N, K), float32, are the channel means of the convolution's input, ``weight`` (C, K) or (C, K, 1, 1) and
    ``bias`` (C,) its parameters in float32, bfloat16 or float16. The result has no gradient.

    Raises:
        ConfigError: The tensors are on several devices.
    """
    devices = {x.device for x in (m, weight, bias, form.weight, form.bias) if x is not None}
    if len(devices) > 1:
        raise ConfigError(f"the gate does not apply: tensors are on {' and '.join(sorted(map(str, devices)))}")
    needs_operator = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0  # as in `expand`
    launch = torch.ops.ecanet.predict_gate if needs_operator else run_prediction
    return launch(m, weight, bias, *form)
