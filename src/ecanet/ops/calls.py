"""Whether a module must be called, or whether its parameters may be used directly.

Fused operations read a norm's or a gate's parameters and never call the module. That is only right while a call would
do nothing else: no hook listens, and nobody has replaced its ``forward``.
"""

from typing import cast

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = [
    "call_state",
    "find_norm_obstacle",
    "has_global_hooks",
    "has_original_forward",
    "hook_dictionaries",
    "is_frozen_norm",
    "must_be_called",
    "overrides_forward",
]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

KNOWN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Batch norms of exactly these classes are supported: a subclass may do more in its forward."""


def must_be_called(module: nn.Module) -> bool:
    """Return whether a call of ``module`` may do more than the forward of its class.

    It may if the module has hooks, if hooks are registered for all modules, or if its own ``forward`` was patched or
    compiled.
    """
    own = vars(module)
    # `HOOKS` spelled out, without a loop: this runs for each norm in each step.
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or overrides_forward(module) or has_global_hooks()


def has_global_hooks() -> bool:
    """Return whether hooks are registered for the calls of all modules."""
    return bool(torch_module._has_any_global_hook())  # pyright: ignore[reportPrivateUsage, reportUnknownArgumentType]


def hook_dictionaries(module: nn.Module) -> tuple[dict[object, object], ...]:
    """Return the dictionaries in which ``module`` keeps its hooks, one for each kind."""
    attributes = cast(dict[str, dict[object, object]], vars(module))
    return tuple(attributes[kind] for kind in HOOKS)


def overrides_forward(module: nn.Module) -> bool:
    """Return whether ``module`` itself, not its class, has another forward: a patched or a compiled one."""
    attributes = vars(module)
    return "forward" in attributes or attributes.get("_compiled_call_impl") is not None


def call_state(module: nn.Module) -> tuple[object, ...]:
    """Return what decides whether ``module`` must be called, and its children, in a form that is quick to compare."""
    attributes = cast(dict[str, dict[object, object]], vars(module))
    kind = type(module)
    # `HOOKS` spelled out, without a loop: this runs for each block in each step.
    return (
        kind,
        kind.forward,
        attributes.get("forward"),
        attributes.get("_compiled_call_impl"),
        len(attributes["_forward_hooks"]),
        len(attributes["_forward_pre_hooks"]),
        len(attributes["_backward_hooks"]),
        len(attributes["_backward_pre_hooks"]),
        *attributes["_modules"].values(),
    )


def has_original_forward(module: nn.Module, *, or_from: str = "") -> bool:
    """Return whether the forward of ``module``'s class was defined where the class was, or in the file ``or_from``.

    A class whose forward was patched from elsewhere, or wrapped by `functools.wraps`, has another one.
    """
    forward = type(module).forward
    return forward.__module__ in (type(module).__module__, or_from) and not hasattr(forward, "__wrapped__")


def find_norm_obstacle(norm: nn.Module) -> str | None:
    """Return why ``norm`` must be called as a module: it is not a batch norm, has hooks or another forward."""
    if type(norm) not in KNOWN_NORMS and not is_frozen_norm(norm):
        return f"{type(norm).__name__} is not a supported batch norm"
    if must_be_called(norm) or not has_original_forward(norm):
        return "the norm has hooks or another forward"
    return None


def is_frozen_norm(norm: nn.Module) -> bool:
    """Return whether ``norm`` is torchvision's frozen batch norm.

    The class is recognised by its name and module, because torchvision's detection code need not be imported, and
    other libraries have a class of the same name.
    """
    return type(norm).__name__ == "FrozenBatchNorm2d" and type(norm).__module__ == "torchvision.ops.misc"
