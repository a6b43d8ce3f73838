"""Torchvision's and timm's ResNet blocks with this library's residual tail: same parameters, fewer memory passes."""

from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from ecanet import ops
from ecanet.errors import ConfigError
from ecanet.inference.block import parts_of, squeezes, weights
from ecanet.models import Stage, Twins, activated, plain_relu
from ecanet.ops import watched


def fuse(model: nn.Module) -> nn.Module:
    """Give the ResNet blocks of torchvision's and timm's networks this library's residual tail; gives ``model`` back.

    The blocks stay where they are, with their parameters, hooks and names, so that state dicts do not show it; outputs
    and gradients are the same within float rounding. Taken are blocks whose attention, if any, is timm's ECA or SE or
    a gate of this library as a module of theirs; blocks with anything else in them (drop path, anti-aliasing, another
    activation) stay as they are, and so do blocks with gates from `ecanet.attach`, which have their own short way. This
    library's own networks need no fusing.

    >>> import ecanet, torchvision
    >>> model = ecanet.fuse(torchvision.models.resnet18())
    >>> type(model.layer1[0]).__mro__[1].__name__
    'FusedBlock'

    Raises:
        ConfigError: ``model`` has no block that can be fused.
    """
    blocks = [module for module in model.modules() if fusible(module)]
    if not blocks:
        gates = " Gates from attach() have their own short way; fuse first to have both." * carries_gates(model)
        raise ConfigError(
            f"{type(model).__name__} has no block for fuse(), which takes torchvision's and timm's ResNets as they "
            f"are made.{gates}"
        )
    for block in blocks:
        block.__class__ = fused_class(type(block))
    for module in model.modules():
        if type(module) is nn.Sequential and len(module) and all(isinstance(child, FusedBlock) for child in module):
            module.__class__ = Stage
    return model


def carries_gates(model: nn.Module) -> bool:
    """Whether `ecanet.attach` has put a gate into ``model``."""
    return any(getattr(module, "attachment", None) is not None for module in model.modules())


def fusible(module: nn.Module) -> bool:
    """Whether ``module`` is a residual block of another library that `FusedBlock` computes the same as."""
    if type(module).__module__ not in ("torchvision.models.resnet", "timm.models.resnet") or isinstance(
        module, FusedBlock
    ):
        return False
    parts = parts_of(module)
    if parts is None or any(watched(m) for m in module.modules()):
        return False
    return not extended(module) and (parts.attention is None or squeezes(parts.attention))


def extended(block: nn.Module) -> bool:
    """Whether one of timm's options is at work in ``block``."""
    options = [getattr(block, name, None) for name in ("aa", "drop_path", "drop_block")]
    return not all(isinstance(m, nn.Identity | None) for m in options)


class FusedBlock(nn.Module):
    """What a fused block does; mixed into the block's own class."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return self.twice(x, x, False)[0]

    def twice(self, x: Tensor, twin: Tensor, wanted: bool) -> Twins:
        """The same, two times if ``wanted``, from the block before's output ``x`` and its ``twin``; see `Stage`."""
        block: Any = self
        attention = getattr(block, "se", None)
        last = 3 if hasattr(block, "conv3") else 2
        relus = [getattr(block, f"act{i}", None) or block.relu for i in range(1, last + 1)]
        if isinstance(attention, nn.Identity) and not watched(attention):
            attention = None
        called = attention is not None and (watched(attention) or not squeezes(attention))
        if called or extended(block) or not plain_relu(relus[-1]):
            y = super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
            return y, y
        for i in range(1, last):
            x = activated(getattr(block, f"conv{i}")(x), getattr(block, f"bn{i}"), relus[i - 1])
        z, norm = getattr(block, f"conv{last}")(x), getattr(block, f"bn{last}")
        gate = None if attention is None else partial(weights, attention)
        addend, side_norm = shortcut(block.downsample, twin)
        return ops.residual_tail_pair(z, norm, gate, addend, side_norm, second_output=wanted)

    def __reduce__(self) -> Any:
        return made, (type(self).__mro__[2],), self.__dict__


def shortcut(downsample: nn.Module | None, x: Tensor) -> tuple[Tensor, nn.Module | None]:
    """The shortcut of ``x``, and the norm it still wants."""
    if downsample is None:
        return x, None
    if isinstance(downsample, nn.Sequential) and not watched(downsample) and isinstance(downsample[-1], nn.BatchNorm2d):
        for module in downsample[:-1]:
            x = module(x)
        return x, downsample[-1]
    return downsample(x), None


@cache
def fused_class(block: type) -> type:
    """``block`` with the forward of `FusedBlock`, under its own name."""
    return type(
        block.__name__, (FusedBlock, block), {"__module__": block.__module__, "__qualname__": block.__qualname__}
    )


def made(block: type) -> nn.Module:
    """An empty fused block, for pickle to fill."""
    return nn.Module.__new__(fused_class(block))
