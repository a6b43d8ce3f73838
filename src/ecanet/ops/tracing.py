"""Let `torch.fx` record a function as one node.

A function whose steps depend on its input's rank or size cannot be traced step by step: a traced input has neither.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import fx
from torch.overrides import handle_torch_function

__all__ = ["is_exporting", "is_jit_tracing", "is_traced", "record_as_one_node"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def is_traced(x: object) -> bool:
    """Return whether ``x`` stands for a tensor in a graph that `torch.fx` is recording."""
    return isinstance(x, fx.Proxy)


def is_exporting() -> bool:
    """Return whether `torch.export` is recording.

    The compiler of torch 2.11 takes `torch.compiler.is_exporting()` for True even where nothing is exported, so this
    reads the flag behind it.
    """
    return torch.compiler._is_exporting_flag  # pyright: ignore[reportPrivateUsage]


def is_jit_tracing() -> bool:
    """Return whether `torch.jit.trace`, or an exporter built on it, is recording."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def record_as_one_node(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return ``function``; called on a traced tensor it becomes one node of the graph, a call of itself."""

    @wraps(function)
    def recorded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        traced = [x for x in (*args, *kwargs.values()) if isinstance(x, fx.Proxy)]
        if traced:
            return handle_torch_function(recorded, traced, *args, **kwargs)
        return function(*args, **kwargs)

    # TorchScript, given such a graph, compiles the function itself: it cannot read the lines above.
    recorded.__prepare_scriptable__ = lambda: function  # pyright: ignore[reportAttributeAccessIssue]
    return recorded
