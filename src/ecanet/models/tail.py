"""The end of a residual block: norm, gate, shortcut and activation, in as few passes over memory as there are."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from ecanet import ops
from ecanet.attention.gates import ChannelAttention

Twins = tuple[Tensor, Tensor]
"""A block's output for the next block's branch, and the same for its shortcut; see `ops.residual_tail_twice`."""


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
            if hasattr(block, "twice"):
                x, twin = block.twice(x, twin, index < last)  # pyright: ignore[reportCallIssue]
            else:
                x = twin = block(x)
        return x

    def _unwatched(self, x: Tensor) -> bool:
        """Whether gradients are wanted, and nobody can see the tensors between the blocks or asks for a graph."""
        if type(x) is not Tensor or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if torch._C._get_tracing_state() or has_any_global_hook():
            return False
        return not any(hooked(m) or "forward" in vars(m) or m._compiled_call_impl for m in self.modules())


def finish(
    z: Tensor, norm: nn.Module, attention: nn.Module, x: Tensor, downsample: nn.Module, twice: bool = False
) -> Twins:
    """``relu(attention(norm(z)) + downsample(x))`` for the block's last convolution ``z`` and its input ``x``.

    Gates of the squeeze, gate, scale form go through `ops.residual_tail`; others, and modules that something hooks
    into, are called one after the other.
    """
    identity = isinstance(attention, nn.Identity)
    if hooked(attention) or not (identity or isinstance(attention, ChannelAttention)):
        y = attention(norm(z)).add(downsample(x)).relu_()
        return y, y
    gate = attention.weigh if isinstance(attention, ChannelAttention) else None
    if isinstance(downsample, nn.Sequential) and len(downsample) == 2 and not hooked(downsample):
        return ops.residual_tail_twice(z, norm, gate, downsample[0](x), downsample[1], wanted=twice)
    return ops.residual_tail_twice(z, norm, gate, downsample(x), wanted=twice)


def activated(z: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
    """``activation(norm(z))`` inside a block or in the stem: in one kernel where ops fuses."""
    if ops.fuses(z) and type(activation) is nn.ReLU and not hooked(activation):
        return ops.residual_tail(z, norm)
    return activation(norm(z))


def hooked(module: nn.Module) -> bool:
    """Whether something listens to ``module``'s calls, so that it must be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
