"""What the copies of `ecanet.optimize` are made of: a residual block, or one convolution, with folded norms."""

import copy

from torch import Tensor, nn

from ecanet import ops
from ecanet.models import DescribesItself, Layer, Parts, call, describe, is_eager, run, runnable_parts
from ecanet.surgery import list_records, take_apart


class InferenceBlock(DescribesItself):
    """A residual block with folded norms: ``end(attention(branch(x)) + shortcut(x))``.

    A convolution with the gate and the activation that follow it is such a block, too: one of a single layer.
    """

    def __init__(self, parts: Parts):
        super().__init__()
        self.branch = nn.ModuleList(join_norm(layer) for layer in parts.branch)
        self.activations = nn.ModuleList(_make_inplace(layer.activation) for layer in parts.branch[:-1])
        self.attention = parts.attention
        if self.attention is not None:
            vars(self.attention).pop("attachment", None)  # `ecanet.detach` can undo nothing in a copy
        self.shortcut = parts.shortcut
        self.end = _make_inplace(parts.end)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block by its parts where that is allowed, else call each module: (N, C, H, W) -> (N, C', H', W')."""
        eager = is_eager(x)
        single = len(self.branch) == 1 and self.attention is None and self.shortcut is None
        if eager and single and not ops.runs_on_gpu(x) and ops.get_requested_impl() is None:
            return self.end(self.branch[0](x))  # on a CPU nothing is gained, and small networks feel each check
        # compilers and tracers may see the parts, too: without norms they are plain PyTorch operations
        parts = runnable_parts(self) if eager else self.parts()
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
    if not list_records(block):
        return describe(block)
    plain = copy.copy(block)
    targets = take_apart(plain)
    parts = describe(plain)
    if parts is None:
        return None
    last = parts.branch[-1].norm or block
    ((key, target), *more) = targets.items()
    if more or parts.attention is not None or plain.get_submodule(target) is not last:
        return None
    return parts._replace(attention=plain.get_submodule(key))


def join_norm(layer: Layer) -> nn.Module:
    """Return the layer's convolution, with its norm behind it where that could not be folded."""
    if layer.norm is None or isinstance(layer.norm, nn.Identity):
        return layer.convolution
    return nn.Sequential(layer.convolution, layer.norm)


def _make_inplace(activation: nn.Module | None) -> nn.Module:
    """Return ``activation`` in place where it is a ReLU or ReLU6."""
    assert activation is not None
    return type(activation)(inplace=True) if type(activation) in (nn.ReLU, nn.ReLU6) else activation
