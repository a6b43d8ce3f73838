"""Whether a module must be called, or whether its parameters may be used directly.

Fused operations read a norm's or a gate's parameters and never call the module. That is only right while a call would
do nothing else: no hook listens, and nobody has replaced its ``forward``.
"""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage]

__all__ = ["has_original_forward", "must_be_called"]


def must_be_called(module: nn.Module) -> bool:
    """Return whether a call of ``module`` may do more than the forward of its class.

    It may if the module has hooks, if hooks are registered for all modules, or if its own ``forward`` was patched or
    compiled.
    """
    return any(hook_dictionaries(module)) or overrides_forward(module) or bool(_has_any_global_hook())


def hook_dictionaries(module: nn.Module) -> tuple[dict[int, object], ...]:
    """Return the dictionaries in which ``module`` keeps its hooks, one for each kind."""
    kept = vars(module)
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return tuple(kept[kind] for kind in kinds)


def overrides_forward(module: nn.Module) -> bool:
    """Return whether ``module`` itself, not its class, has another forward: a patched or a compiled one."""
    return "forward" in vars(module) or module._compiled_call_impl is not None


def has_original_forward(module: nn.Module, *, or_from: str = "") -> bool:
    """Return whether the forward of ``module``'s class was defined where the class was, or in the file ``or_from``.

    A class whose forward was patched from elsewhere, or wrapped by `functools.wraps`, has another one.
    """
    forward = type(module).forward
    return forward.__module__ in (type(module).__module__, or_from) and not hasattr(forward, "__wrapped__")
