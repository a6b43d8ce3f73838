"""The tail of one residual block alone, forward and backward: without attention, with ours and with timm's.

A tail is everything after the last convolution of the block: batch norm, gate, addition of the shortcut, ReLU.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecanet import ops
from ecanet.attention import ECA

PAIRS = (
    ("tail ecanet", "tail plain"),
    ("tail ecanet", "tail reference"),
    ("tail ecanet", "tail timm"),
    ("gate ecanet", "gate timm"),
)
"""Pairs whose times are divided. Below 1 the first is faster."""

PEERS = ("tail plain", "tail timm", "gate timm")
"""Variants that are not this library's."""


@dataclass(frozen=True)
class Block:
    """The tensors and modules of a block's tail; ``dy`` is the gradient of its output."""

    z: Tensor  # N C H W, the output of the last convolution
    shortcut: Tensor  # N C H W
    dy: Tensor  # N C H W
    norm: nn.BatchNorm2d
    gate: ECA
    timm_gate: nn.Module

    def double(self) -> "Block":
        """Return the same numbers in float64."""
        z, shortcut = (x.detach().double().requires_grad_() for x in (self.z, self.shortcut))
        norm, gate = copy.deepcopy(self.norm).double(), copy.deepcopy(self.gate).double()
        return Block(z, shortcut, self.dy.double(), norm, gate, copy.deepcopy(self.timm_gate).double())


def make_block(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Block:
    """Return random tensors of ``shape`` (N, C, H, W) in channels-last layout, and modules in training mode."""
    from timm.layers import EcaModule  # pyright: ignore[reportPrivateImportUsage]

    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    with torch.device("cpu"), torch.no_grad():  # where the generator draws
        tensors = [torch.randn(shape, generator=generator) + 0.5 for _ in range(3)]
        norm, gate, timm_gate = nn.BatchNorm2d(channels), ECA(channels), EcaModule(channels)
        for parameter in (norm.weight, norm.bias, *gate.parameters()):
            parameter.uniform_(0.2, 1.0, generator=generator)
    z, shortcut, dy = (x.to(device, dtype).contiguous(memory_format=torch.channels_last) for x in tensors)
    timm_gate.load_state_dict(gate.state_dict())
    z, shortcut = z.requires_grad_(), shortcut.requires_grad_()
    return Block(z, shortcut, dy, norm.to(device), gate.to(device), timm_gate.to(device))


def make_steps(b: Block, *, fused: bool = False) -> dict[str, Callable[[], list[Tensor]]]:
    """Return the functions that are timed, by variant. Each returns the output and all gradients.

    With ``fused`` there is also a variant that requires the Triton kernels.
    """

    def tail(impl: ops.Impl) -> Callable[[], Tensor]:
        return lambda: ops.residual_tail(b.z, b.norm, b.gate.weigh, b.shortcut, impl=impl)

    forwards: dict[str, Callable[[], Tensor]] = {
        "tail plain": lambda: (b.norm(b.z) + b.shortcut).relu_(),
        "tail reference": tail("reference"),
        "tail timm": lambda: (b.timm_gate(b.norm(b.z)) + b.shortcut).relu_(),
        "tail ecanet": tail("auto"),
        "gate timm": lambda: b.timm_gate(b.z),
        "gate ecanet": lambda: b.gate(b.z),
    }
    if fused:
        forwards["tail fused"] = tail("fused")
    return {name: _add_backward(forward, b, name) for name, forward in forwards.items()}


def _add_backward(forward: Callable[[], Tensor], b: Block, name: str) -> Callable[[], list[Tensor]]:
    part, library = name.split()
    gate_parameters = () if library == "plain" else (b.timm_gate if library == "timm" else b.gate).parameters()
    tail_inputs = [] if part == "gate" else [b.shortcut, *b.norm.parameters()]
    inputs = [b.z, *tail_inputs, *gate_parameters]

    def step() -> list[Tensor]:
        with torch.autocast(b.z.device.type, torch.bfloat16, enabled=b.z.dtype == torch.bfloat16):
            y = forward()
        return [y.detach(), *torch.autograd.grad(y, inputs, b.dy.to(y.dtype))]

    return step


def compute_oracle(b: Block, name: str) -> list[Tensor]:
    """Return the output and all gradients of the variant ``name`` in float64, computed by the specification."""
    wide = b.double()
    if name == "tail plain":
        return make_steps(wide)[name]()
    if name.startswith("tail"):
        return make_steps(wide)["tail reference"]()
    y = ops.squeeze_scale(wide.z, wide.gate.weigh, impl="reference")
    return [y.detach(), *torch.autograd.grad(y, [wide.z, *wide.gate.parameters()], wide.dy)]
