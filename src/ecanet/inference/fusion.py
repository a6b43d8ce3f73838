"""Run torchvision's and timm's ResNet blocks by their parts: same parameters, fewer passes over memory."""

from functools import cache
from typing import TypeVar

from torch import Tensor, nn

from ecanet.errors import ConfigError
from ecanet.models import Stage, is_eager, run, runnable_parts, tail_gate_of

__all__ = ["FusedBlock", "fuse"]

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """Run the ResNet blocks of torchvision's and timm's networks in fewer passes over memory; returns ``model`` itself.

    The blocks stay where they are, with their parameters, hooks and names, so state dicts do not show it. Outputs and
    gradients are the same within float rounding. Blocks are taken whose attention, if any, is timm's ECA or SE or a
    gate of this library as a module of theirs. Blocks with anything else in them (drop path, anti-aliasing, another
    activation) stay as they are, and so do blocks with gates from `ecanet.attach`. This library's own networks need no
    fusing.

    >>> import ecanet, torchvision
    >>> model = ecanet.fuse(torchvision.models.resnet18())
    >>> type(model.layer1[0]).__mro__[1].__name__
    'FusedBlock'

    Raises:
        ConfigError: ``model`` has no block that can be fused.
    """
    blocks = [module for module in model.modules() if can_fuse(module)]
    if not blocks:
        hint = " Its blocks have gates from attach(): detach, fuse, then attach again." * _has_attached_gates(model)
        raise ConfigError(
            f"{type(model).__name__} has no block for fuse(), which takes torchvision's and timm's ResNets as they "
            f"are made.{hint}"
        )
    for block in blocks:
        block.__class__ = make_fused_class(type(block))
    for module in model.modules():
        if type(module) is nn.Sequential and len(module) and all(isinstance(child, FusedBlock) for child in module):
            module.__class__ = Stage
    return model


def can_fuse(module: nn.Module) -> bool:
    """Return whether ``module`` is a residual block of torchvision or timm that a `FusedBlock` computes as well."""
    if isinstance(module, FusedBlock):
        return False
    if type(module).__module__ not in ("torchvision.models.resnet", "timm.models.resnet"):
        return False
    parts = runnable_parts(module)
    return parts is not None and (parts.attention is None or tail_gate_of(parts.attention) is not None)


def _has_attached_gates(model: nn.Module) -> bool:
    return any(getattr(module, "attachment", None) is not None for module in model.modules())


class FusedBlock(nn.Module):
    """The forward of a fused block; mixed into the block's own class."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the block by its parts where that is allowed, else by its original forward; same shapes as that one."""
        parts = runnable_parts(self) if is_eager(x) else None
        if parts is None or (parts.attention is not None and tail_gate_of(parts.attention) is None):
            return super().forward(x)
        return run(parts, x, x)[0]

    def __reduce__(self) -> tuple[object, ...]:
        return make_empty, (type(self).__mro__[2],), self.__dict__


@cache
def make_fused_class(block: type[nn.Module]) -> type[nn.Module]:
    """Return the class ``block`` with the forward of `FusedBlock`, under its own name."""
    names = {"__module__": block.__module__, "__qualname__": block.__qualname__}
    return type(block.__name__, (FusedBlock, block), names)


def make_empty(block: type[nn.Module]) -> nn.Module:
    """Return a fused block of class ``block`` without content, for pickle to fill."""
    return nn.Module.__new__(make_fused_class(block))
