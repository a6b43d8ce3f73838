"""The end of a residual block: norm, gate, shortcut and activation, in as few passes over memory as there are."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from ecanet import ops
from ecanet.attention import ChannelAttention
from ecanet.ops import genuine, watched

Twins = tuple[Tensor, Tensor]
"""A block's output for the next block's branch, and the same for its shortcut; see `ops.residual_tail_pair`."""


class Stage(nn.Sequential):
    """Blocks one after the other; what goes from one to the next goes on two edges, whose gradients meet for nothing.

    Where anything listens to a module in it, every block is called as any module and gives one tensor with all of its
    gradient.
    """

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(N, C, H, W) -> (N, C', H', W')."""
        if not self._unwatched(x):
            return super().forward(x)
        twin, last = x, len(self) - 1
        for index, block in enumerate(self):
            if gives_twins(block):
                x, twin = block.twice(x, twin, index < last)  # pyright: ignore[reportCallIssue]
            else:
                x = twin = block(x)
        return x

    def _unwatched(self, x: Tensor) -> bool:
        """Whether gradients are wanted, and nobody can see the tensors between the blocks or asks for a graph."""
        if type(x) is not Tensor or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return not torch._C._get_tracing_state() and not any(watched(m) for m in self.modules())


def gives_twins(block: nn.Module) -> bool:
    """Whether ``block``'s class has ``twice`` beside its forward; a wrapper or a subclass with its own forward has not.

    Asked of the class: wrappers answer for what they wrap.
    """
    kinds = type(block).__mro__
    twice = next((kind for kind in kinds if "twice" in vars(kind)), None)
    own = twice is not None and twice is next(kind for kind in kinds if "forward" in vars(kind))
    return own and genuine(block, also="ecanet.inference.fusion")


def finish(
    z: Tensor,
    norm: nn.Module,
    attention: nn.Module,
    x: Tensor,
    downsample: nn.Module,
    activation: nn.Module,
    twice: bool = False,
) -> Twins:
    """``activation(attention(norm(z)) + downsample(x))`` for the last convolution ``z`` and the block's input ``x``.

    Gates of the squeeze, gate, scale form and a ReLU go through `ops.residual_tail`; others, and modules that something
    listens to, are called one after the other.
    """
    plain = plain_relu(activation)
    gate = attention.weigh if is_gate(attention) else None
    if watched(attention) or not (gate or isinstance(attention, nn.Identity)):
        y = attention(norm(z)).add(downsample(x))
        y = y.relu_() if plain else activation(y)
        return y, y
    side_norm = None
    if isinstance(downsample, nn.Sequential) and len(downsample) == 2 and not watched(downsample):
        x, side_norm = downsample[0](x), downsample[1]
    else:
        x = downsample(x)
    if plain:
        return ops.residual_tail_pair(z, norm, gate, x, side_norm, second_output=twice)
    y = activation(ops.residual_tail(z, norm, gate, x, side_norm, None))
    return y, y


def is_gate(attention: nn.Module) -> TypeGuard[ChannelAttention]:
    """Whether ``attention`` is a gate of this library, or one with its forward."""
    return isinstance(attention, ChannelAttention) and type(attention).forward is ChannelAttention.forward


def plain_relu(activation: nn.Module) -> bool:
    """Whether ``activation`` is ReLU and nothing else."""
    return type(activation) is nn.ReLU and not watched(activation)


def activated(z: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
    """``activation(norm(z))`` inside a block or in the stem: in one kernel where ops fuses."""
    if ops.uses_kernels(z) and plain_relu(activation):
        return ops.residual_tail(z, norm)
    return activation(norm(z))
