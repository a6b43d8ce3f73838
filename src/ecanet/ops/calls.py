"""Whether a module must be called: somebody listens to its calls, or something else stands in for its forward."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

__all__ = ["genuine", "has_any_global_hook", "hooks_of", "replaced", "watched"]


def watched(module: nn.Module) -> bool:
    """Whether a call of ``module`` may do more than its class's forward."""
    return any(hooks_of(module)) or replaced(module) or bool(has_any_global_hook())


def hooks_of(module: nn.Module) -> tuple[dict[Any, Callable[..., Any]], ...]:
    """The hooks of ``module``'s own, by kind."""
    return (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)


def replaced(module: nn.Module) -> bool:
    """Whether ``module`` itself, not its class, has another forward: one that was patched in, or compiled."""
    return "forward" in vars(module) or module._compiled_call_impl is not None


def genuine(module: nn.Module, *, also: str = "") -> bool:
    """Whether the forward of ``module``'s class stands where the class does (or in the module named ``also``)."""
    forward = type(module).forward
    return forward.__module__ in (type(module).__module__, also) and not hasattr(forward, "__wrapped__")
