"""What the residual blocks of this library, of torchvision and of timm consist of."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ecanet.attention import Attention, ChannelAttention
from ecanet.models import is_gate
from ecanet.ops import genuine, has_any_global_hook, hooks_of, replaced, watched


class Parts(NamedTuple):
    """``end(attention(branch(x)) + shortcut(x))``."""

    branch: list[tuple[nn.Module, nn.Module]]
    """Convolutions, each with its norm; ``activation`` stands between them."""
    attention: nn.Module | None
    shortcut: nn.Module | None
    """None where nothing is added."""
    activation: nn.Module
    end: nn.Module


RESIDUAL = [
    f"{module}.{name}"
    for module in ("ecanet.models.resnet", "torchvision.models.resnet", "timm.models.resnet")
    for name in ("BasicBlock", "Bottleneck")
]
INVERTED = ["ecanet.models.mobilenet.InvertedResidual", "torchvision.models.mobilenetv2.InvertedResidual"]


def parts_of(block: nn.Module) -> Parts | None:
    """The parts of ``block``; None if it is not of a known class, was changed, or something hooks into it."""
    name = f"{type(block).__module__}.{type(block).__qualname__}"
    if name not in RESIDUAL + INVERTED or not genuine(block, also="ecanet.inference.fusion"):
        return None
    if has_any_global_hook() or any(listened(m) or replaced(m) for m in block.modules()):
        return None
    return residual(block) if name in RESIDUAL else inverted(block)


def residual(block: nn.Module) -> Parts | None:
    """A ResNet's block: conv1, bn1, ReLU, ..., the last norm, attention, addition, ReLU."""
    count = 3 if hasattr(block, "conv3") else 2
    branch = [(block.get_submodule(f"conv{i}"), block.get_submodule(f"bn{i}")) for i in range(1, count + 1)]
    activations = [getattr(block, name) for name in ("relu", "act1", "act2", "act3") if hasattr(block, name)]
    plain = all(type(m) is nn.ReLU for m in activations)
    if not plain or not isinstance(getattr(block, "aa", None), nn.Identity | None):  # timm's options
        return None
    attention = getattr(block, "attention", None) or getattr(block, "se", None)
    if any(watched(m) for m in block.modules()):
        hung = attached(block, f"bn{count}")
        if hung is None or not isinstance(attention, nn.Identity | None):
            return None
        attention = hung
    shortcut = getattr(block, "downsample", None) or nn.Identity()
    relu = nn.ReLU(inplace=True)
    return Parts(branch, None if isinstance(attention, nn.Identity) else attention, shortcut, relu, relu)


def inverted(block: nn.Module) -> Parts | None:
    """MobileNetV2's block: ``conv`` is a Sequential of (convolution, norm, ReLU6) ..., convolution, norm, attention."""
    layers = list(block.get_submodule("conv").children())
    attention = layers.pop() if isinstance(layers[-1], Attention) else None
    *first, convolution, norm = layers
    branch = [(p[0], p[1]) for p in first if isinstance(p, nn.Sequential) and len(p) == 3 and type(p[2]) is nn.ReLU6]
    whole = len(branch) == len(first) and type(convolution) is nn.Conv2d
    if not whole or any(watched(m) for m in block.modules()):
        return None
    added = getattr(block, "residual", False) or getattr(block, "use_res_connect", False)
    shortcut = nn.Identity() if added else None
    return Parts([*branch, (convolution, norm)], attention, shortcut, nn.ReLU6(inplace=True), nn.Identity())


def attached(block: nn.Module, norm: str) -> nn.Module | None:
    """The one gate that `ecanet.attach` hung behind ``norm`` of ``block``; None if there is none or another too."""
    records = [(m, getattr(m, "attachment", None)) for m in block.modules()]
    hung = [(module, record) for module, record in records if record is not None and record.mode == "hook"]
    if len(hung) != 1 or hung[0][1].target != norm or hung[0][0] not in block.children():
        return None
    return hung[0][0]


def listened(module: nn.Module) -> bool:
    """Whether somebody else than `ecanet.attach`, which keeps its hooks under names, listens to ``module``'s calls."""
    return any(not isinstance(key, str) for hooks in hooks_of(module) for key in hooks)


# gates


def squeezes(attention: nn.Module | None) -> bool:
    """Whether ``attention`` multiplies channels by a function of their means."""
    if attention is not None and is_gate(attention):
        return True
    kind = type(attention)  # timm's, by name: timm is not a dependency
    if not kind.__module__.startswith("timm.layers"):
        return False
    module: Any = attention
    return (kind.__name__ == "EcaModule" and module.conv2 is None) or (
        kind.__name__ == "SEModule" and not module.add_maxpool
    )


def weights(attention: nn.Module, p: Tensor) -> Tensor:
    """What ``attention``, which `squeezes`, multiplies by: channel means (N, C) -> (N, C)."""
    if isinstance(attention, ChannelAttention):
        return attention.weigh(p)
    module: Any = attention
    q = p.to(next(module.parameters()).dtype)
    if hasattr(module, "fc1"):
        q = module.fc2(module.act(module.bn(module.fc1(q[..., None, None]))))
    else:
        q = module.conv(q[:, None])
    return module.gate(q).flatten(1).to(p.dtype)
