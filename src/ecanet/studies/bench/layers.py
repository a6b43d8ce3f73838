"""The end of one residual block alone, forward and backward: with and without attention, ours and timm's."""

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
"""What is divided by what: below 1 the first is faster."""

PEERS = ("tail plain", "tail timm", "gate timm")
"""What is not this library's."""


@dataclass(frozen=True)
class Block:
    """What the end of a block works on; ``dy`` is the gradient that comes back."""

    z: Tensor  # N C H W
    shortcut: Tensor  # N C H W
    dy: Tensor  # N C H W
    norm: nn.BatchNorm2d
    gate: ECA
    theirs: nn.Module

    def double(self) -> "Block":
        """The same numbers in float64."""
        z, shortcut = (x.detach().double().requires_grad_() for x in (self.z, self.shortcut))
        norm, gate = copy.deepcopy(self.norm).double(), copy.deepcopy(self.gate).double()
        return Block(z, shortcut, self.dy.double(), norm, gate, copy.deepcopy(self.theirs).double())


def block(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Block:
    """Random numbers of ``shape`` (N, C, H, W), channels-last, and modules in training mode."""
    from timm.layers import EcaModule  # pyright: ignore[reportPrivateImportUsage]

    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    tensors = [torch.randn(shape, generator=generator) + 0.5 for _ in range(3)]
    z, shortcut, dy = (x.to(device, dtype).contiguous(memory_format=torch.channels_last) for x in tensors)
    norm, gate, theirs = nn.BatchNorm2d(channels), ECA(channels), EcaModule(channels)
    with torch.no_grad():
        for parameter in (norm.weight, norm.bias, *gate.parameters()):
            parameter.uniform_(0.2, 1.0, generator=generator)
    theirs.load_state_dict(gate.state_dict())
    z, shortcut = z.requires_grad_(), shortcut.requires_grad_()
    return Block(z, shortcut, dy, norm.to(device), gate.to(device), theirs.to(device))


def steps(b: Block, *, fused: bool = False) -> dict[str, Callable[[], list[Tensor]]]:
    """What is timed, by name: each gives its output and all gradients."""

    def tail(impl: ops.Impl) -> Callable[[], Tensor]:
        return lambda: ops.residual_tail(b.z, b.norm, b.gate.weigh, b.shortcut, impl=impl)

    forwards: dict[str, Callable[[], Tensor]] = {
        "tail plain": lambda: (b.norm(b.z) + b.shortcut).relu_(),
        "tail reference": tail("reference"),
        "tail timm": lambda: (b.theirs(b.norm(b.z)) + b.shortcut).relu_(),
        "tail ecanet": tail("auto"),
        "gate timm": lambda: b.theirs(b.z),
        "gate ecanet": lambda: b.gate(b.z),
    }
    if fused:
        forwards["tail fused"] = tail("fused")
    return {name: _with_backward(forward, b, name) for name, forward in forwards.items()}


def _with_backward(forward: Callable[[], Tensor], b: Block, name: str) -> Callable[[], list[Tensor]]:
    kind, whose = name.split()
    taps = () if whose == "plain" else (b.theirs if whose == "timm" else b.gate).parameters()
    inputs = [b.z, *taps] if kind == "gate" else [b.z, b.shortcut, *b.norm.parameters(), *taps]

    def step() -> list[Tensor]:
        with torch.autocast(b.z.device.type, torch.bfloat16, enabled=b.z.dtype == torch.bfloat16):
            y = forward()
        return [y.detach(), *torch.autograd.grad(y, inputs, b.dy.to(y.dtype))]

    return step


def oracle(b: Block, name: str) -> list[Tensor]:
    """What the step called ``name`` gives in float64, by the specification."""
    wide = b.double()
    if name == "tail plain":
        return steps(wide)[name]()
    if name.startswith("tail"):
        return steps(wide)["tail reference"]()
    y = ops.squeeze_scale(wide.z, wide.gate.weigh, impl="reference")
    return [y.detach(), *torch.autograd.grad(y, [wide.z, *wide.gate.parameters()], wide.dy)]
