"""Make a copy of a network for inference: norms folded, gates computed early, additions and activations in place."""

import copy
from itertools import pairwise
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from ecanet import ops
from ecanet.errors import ConfigError
from ecanet.models import DescribesItself, Layer, Parts, call, describe, is_eager, run, runnable_parts
from ecanet.surgery import take_apart

__all__ = ["InferenceBlock", "optimize"]


def optimize(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` for inference, with the same outputs within float rounding; ``model`` is not changed.

    Batch norms are folded into the convolutions before them. Gate, addition and activation work in place, and weights
    are channels-last. Where a block ends in a 1x1 convolution with more channels out than in, the gate takes its
    channel means from that convolution's input, because ``mean(W h + b) = W mean(h) + b``: in a bottleneck it then
    reads a quarter of what it scales. On a GPU and without gradients, one Triton kernel runs that convolution, the
    gate, the addition and the activation, after it has passed a check on that GPU.

    It takes every network of `create_model` and `create_detector`, torchvision's ResNets and MobileNetV2, and timm's
    ResNets, with or without attention, built in or attached. Attention of another form than squeeze, gate, scale is
    called as it is. A block that has hooks stays as it is.

    >>> import ecanet
    >>> model = ecanet.create_model("resnet8").eval()
    >>> fast = ecanet.optimize(model)
    >>> x = torch.randn(2, 3, 32, 32)
    >>> torch.allclose(fast(x), model(x), rtol=1e-4, atol=1e-4)
    True

    Raises:
        ConfigError: ``model`` is no network, or has no block of a kind that this function knows.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"optimize takes a network (a torch.nn.Module), got {model!r}")
    result = copy.deepcopy(model).eval().requires_grad_(False)
    found = False
    for parent in list(result.modules()):
        for name, child in list(parent.named_children()):
            parts = describe_for_copy(child)
            if parts is not None:
                parent.register_module(name, InferenceBlock(parts))
                found = True
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no block that optimize knows; it takes ResNets and MobileNetV2 of ecanet and "
            f"torchvision, and timm's ResNets"
        )
    fold_norms(result)
    result.eval()
    return result.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


class InferenceBlock(DescribesItself):
    """A residual block with folded norms: ``end(attention(branch(x)) + shortcut(x))``."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.branch = nn.ModuleList(fold_norm(layer) for layer in parts.branch)
        self.activations = nn.ModuleList(_make_inplace(layer.activation) for layer in parts.branch[:-1])
        self.attention = parts.attention
        if self.attention is not None:
            vars(self.attention).pop("attachment", None)  # `ecanet.detach` can undo nothing in a copy
        self.shortcut = parts.shortcut
        self.end = _make_inplace(parts.end)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block by its parts where that is allowed, else call each module: (N, C, H, W) -> (N, C', H', W')."""
        # compilers and tracers may see the parts, too: without norms they are plain PyTorch operations
        parts = runnable_parts(self) if is_eager(x) else self.parts()
        return call(self.parts(), x) if parts is None else run(parts, x, x)[0]

    def parts(self) -> Parts:
        """Return what the block is made of; its layers have no norms."""
        activations = (*self.activations, None)
        layers = (Layer(conv, None, act) for conv, act in zip(self.branch, activations, strict=True))
        return Parts(tuple(layers), self.attention, self.shortcut, self.end)


def describe_for_copy(block: nn.Module) -> Parts | None:
    """Return the parts of ``block``, with a gate that `ecanet.attach` put behind its last norm as the attention.

    None if the block is of no known kind, if it was changed, or if it has hooks.
    """
    if any(ops.must_be_called(module) for module in block.modules()):
        return None
    plain = copy.copy(block)
    targets = take_apart(plain)
    parts = describe(plain)
    if parts is None or not targets:
        return parts
    last = parts.branch[-1].norm or block
    ((key, target), *more) = targets.items()
    if more or parts.attention is not None or plain.get_submodule(target) is not last:
        return None
    return parts._replace(attention=plain.get_submodule(key))


def _make_inplace(activation: nn.Module | None) -> nn.Module:
    """Return ``activation`` in place where it is a ReLU or ReLU6."""
    assert activation is not None
    return type(activation)(inplace=True) if type(activation) in (nn.ReLU, nn.ReLU6) else activation


def fold_norm(layer: Layer) -> nn.Module:
    """Return the layer's convolution with its norm in the weights, or the two in a Sequential if that cannot be."""
    convolution, norm = layer.convolution, cast(nn.Module, layer.norm)
    if not can_fold(convolution, norm):
        return nn.Sequential(convolution, norm)
    # in float64, so that the folded weights are rounded once
    wide, dtype = (copy.deepcopy(module).double() for module in (convolution, norm)), convolution.weight.dtype
    return fuse_conv_bn_eval(*wide).to(dtype).requires_grad_(False)  # pyright: ignore


def can_fold(convolution: nn.Module, norm: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether ``norm`` is a batch norm with running statistics, and ``convolution`` a plain convolution."""
    known = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or ops.is_frozen_norm(norm)
    return type(convolution) is nn.Conv2d and known and getattr(norm, "running_mean", None) is not None


def fold_norms(model: nn.Module) -> None:
    """Fold each norm that directly follows a convolution, in a Sequential or as conv1 and bn1 of a ResNet."""
    for parent in list(model.modules()):
        in_order = isinstance(parent, nn.Sequential) and ops.has_original_forward(
            parent, or_from=nn.Sequential.__module__
        )
        resnet = type(parent).__name__ in ("ResNet", "ResNetFeatures", "IntermediateLayerGetter")  # the last: detectors
        for (first, convolution), (second, norm) in pairwise(list(parent.named_children())):
            follows = in_order or (resnet and (first, second) == ("conv1", "bn1"))
            if not follows or not can_fold(convolution, norm):
                continue
            if not (ops.must_be_called(convolution) or ops.must_be_called(norm)):
                parent.register_module(first, fold_norm(Layer(convolution, norm, None)))
                parent.register_module(second, nn.Identity())
