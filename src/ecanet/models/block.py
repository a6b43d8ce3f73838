"""What a residual block is made of, and whether it may be run by these parts instead of being called.

There is one description for this library's blocks, for torchvision's and timm's, and for the copies that
`ecanet.optimize` makes; `execution` runs it.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeGuard, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ecanet import ops
from ecanet.attention import Attention, ChannelAttention, MomentsAttention


class Layer(NamedTuple):
    """``activation(norm(convolution(x)))``."""

    convolution: nn.Module
    norm: nn.Module | None
    """None in a copy for inference, where the convolution's weights contain the norm."""
    activation: nn.Module | None
    """None in the last layer of a branch."""


class Parts(NamedTuple):
    """The parts of a residual block: ``end(attention(branch(x)) + shortcut(x))``."""

    branch: tuple[Layer, ...]
    attention: nn.Module | None
    shortcut: nn.Module | None
    """None where nothing is added."""
    end: nn.Module


class DescribesItself(nn.Module):
    """A block of this library: it names its parts."""

    def parts(self) -> Parts:
        """Return what the block is made of."""
        raise NotImplementedError


ENDS: dict[type[nn.Module], ops.Activation] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Identity: None}
"""What may end a block: the activations that the fused operations can apply."""

RESIDUAL = frozenset(
    f"{module}.models.resnet.{name}" for module in ("torchvision", "timm") for name in ("BasicBlock", "Bottleneck")
)
INVERTED = frozenset(["ecanet.models.mobilenet.InvertedResidual", "torchvision.models.mobilenetv2.InvertedResidual"])
FUSED = "ecanet.inference.fusion"
"""Where the forward of a block that `ecanet.fuse` has changed is defined."""


def describe(block: nn.Module) -> Parts | None:
    """Return the parts of ``block``; None if its class is unknown or was patched, or if a part is of an unknown kind.

    Hooks are not looked for: see `runnable_parts`.
    """
    if not ops.has_original_forward(block, or_from=FUSED):
        return None
    name = f"{type(block).__module__}.{type(block).__qualname__}"
    if isinstance(block, DescribesItself):
        parts = block.parts() if _owner(block, "forward") is _owner(block, "parts") else None
    elif name in RESIDUAL:
        parts = _describe_residual(block)
    else:
        parts = _describe_inverted(block) if name in INVERTED else None
    return parts if parts is not None and type(parts.end) in ENDS else None


def _owner(block: nn.Module, attribute: str) -> type:
    """Return the class that defines ``attribute`` for ``block``: a subclass may override one and not the other."""
    return next(kind for kind in type(block).__mro__ if attribute in vars(kind))


def _describe_residual(block: nn.Module) -> Parts | None:
    """Describe a ResNet's block: conv1, bn1, ReLU, ..., the last norm, attention, addition, ReLU."""
    if not _is_identity(block, "aa"):
        return None
    count = 3 if hasattr(block, "conv3") else 2
    # torchvision has one ReLU for a whole block, timm has one after each norm
    relus = [block.get_submodule("relu" if hasattr(block, "relu") else f"act{i}") for i in range(1, count + 1)]
    layers = [
        Layer(block.get_submodule(f"conv{i}"), block.get_submodule(f"bn{i}"), relus[i - 1] if i < count else None)
        for i in range(1, count + 1)
    ]
    attention = getattr(block, "se", None)
    attention = None if isinstance(attention, nn.Identity) else attention
    return Parts(tuple(layers), attention, getattr(block, "downsample", None) or nn.Identity(), relus[-1])


def _describe_inverted(block: nn.Module) -> Parts | None:
    """Describe MobileNetV2's block: ``conv`` holds (convolution, norm, ReLU6) ..., convolution, norm, attention."""
    entries = list(block.get_submodule("conv").children())
    attention = entries.pop() if isinstance(entries[-1], Attention) else None
    *first, convolution, norm = entries
    layers: list[Layer] = []
    for entry in first:
        if not (isinstance(entry, nn.Sequential) and len(entry) == 3):
            return None
        layers.append(Layer(entry[0], entry[1], entry[2]))
    if type(convolution) is not nn.Conv2d:
        return None
    adds = getattr(block, "residual", False) or getattr(block, "use_res_connect", False)
    layers.append(Layer(convolution, norm, None))
    return Parts(tuple(layers), attention, nn.Identity() if adds else None, nn.Identity())


def _is_identity(block: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(block, name, None), nn.Identity | None) for name in names)


def uses_timm_options(block: nn.Module) -> bool:
    """Return whether one of timm's options acts in ``block`` while training: anti-aliasing, drop block or drop path."""
    return not _is_identity(block, "aa", "drop_block", "drop_path")


# may the parts be run?


class _Answer(NamedTuple):
    inner: tuple[nn.Module, ...]
    """The modules inside the block. Not the block: it is a weak key, which must not be kept alive by its value."""
    state: list[tuple[object, ...]]
    parts: Parts | None


_answers: WeakKeyDictionary[nn.Module, _Answer] = WeakKeyDictionary()


def runnable_parts(block: nn.Module) -> Parts | None:
    """Return the parts of ``block`` if running them is the same as calling it, else None.

    It is not the same if something in the block has hooks, a patched forward or another module in its place. The
    answer is remembered: a later call only checks that no module of the block has changed since.
    """
    if ops.has_global_hooks():
        return None
    answer = _answers.get(block)
    if answer is not None and answer.state == _state((block, *answer.inner)):
        return answer.parts
    modules = tuple(block.modules())
    untouched = not any(ops.must_be_called(module) for module in modules)
    parts = describe(block) if untouched and not uses_timm_options(block) else None
    _answers[block] = _Answer(modules[1:], _state(modules), parts)
    return parts


def _state(modules: Iterable[nn.Module]) -> list[tuple[object, ...]]:
    return [ops.call_state(module) for module in modules]


# gates


def is_gate(attention: nn.Module) -> TypeGuard[ChannelAttention]:
    """Return whether ``attention`` is a `ChannelAttention` with that class's own forward."""
    return isinstance(attention, ChannelAttention) and type(attention).forward is ChannelAttention.forward


def tail_gate_of(attention: nn.Module | None) -> ops.Gate | None:
    """Return the gate that the tail of a block can compute in ``attention``'s place; None if it must be called."""
    if isinstance(attention, MomentsAttention) and type(attention).forward is MomentsAttention.forward:
        return attention.describe_gate()
    return gate_of(attention)


def gate_of(attention: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """Return the function from channel means (N, C) to the factors (N, C) by which ``attention`` multiplies.

    None if ``attention`` is not of the form squeeze, gate, scale. timm's ECA and SE are, and are recognised by name,
    because timm is not a dependency.
    """
    if attention is None:
        return None
    if is_gate(attention):
        return attention.weigh
    kind = type(attention)
    if not kind.__module__.startswith("timm.layers"):
        return None
    eca = kind.__name__ == "EcaModule" and getattr(attention, "conv2", None) is None
    se = kind.__name__ == "SEModule" and not getattr(attention, "add_maxpool", False)
    return partial(_weigh_like_timm, attention) if eca or se else None


def _weigh_like_timm(attention: nn.Module, p: Tensor) -> Tensor:
    """Compute the factors (N, C) of timm's ECA or SE from channel means ``p`` (N, C), in the dtype of its weights."""
    layers = cast(dict[str, Callable[[Tensor], Tensor]], dict(attention.named_children()))
    q = p.to(next(attention.parameters()).dtype)
    if "fc1" in layers:
        q = layers["fc2"](layers["act"](layers["bn"](layers["fc1"](q[..., None, None]))))
    else:
        q = layers["conv"](q[:, None])
    return layers["gate"](q).flatten(1).to(p.dtype)
