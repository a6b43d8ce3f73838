"""The end of a residual block: norm, gate, shortcut and activation, in as few passes over memory as there are."""

from torch import Tensor, nn

from ecanet import ops
from ecanet.attention.gates import ChannelAttention


def finish(z: Tensor, norm: nn.Module, attention: nn.Module, x: Tensor, downsample: nn.Module) -> Tensor:
    """``relu(attention(norm(z)) + downsample(x))`` for the block's last convolution ``z`` and its input ``x``.

    Gates of the squeeze, gate, scale form go through `ops.residual_tail`; others, and modules that something hooks
    into, are called one after the other.
    """
    identity = isinstance(attention, nn.Identity)
    if hooked(attention) or not (identity or isinstance(attention, ChannelAttention)):
        return attention(norm(z)).add(downsample(x)).relu_()
    gate = attention.weigh if isinstance(attention, ChannelAttention) else None
    if isinstance(downsample, nn.Sequential) and len(downsample) == 2 and not hooked(downsample):
        return ops.residual_tail(z, norm, gate, downsample[0](x), downsample[1])
    return ops.residual_tail(z, norm, gate, downsample(x))


def hooked(module: nn.Module) -> bool:
    """Whether something listens to ``module``'s calls, so that it must be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
