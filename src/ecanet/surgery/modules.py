"""Typed views of what `torch.nn.Module` keeps in its dictionaries, where PyTorch's own annotations say nothing."""

from collections.abc import Callable, Iterable
from typing import cast

from torch import Tensor, nn

Hook = Callable[..., object]


def list_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the names and modules of ``model``, itself first, each module once."""
    return list(cast(Iterable[tuple[str, nn.Module]], model.named_modules()))


def forward_hooks(module: nn.Module) -> dict[str, Hook]:
    """Return the dictionary of the hooks that run after ``module``; this library's have names for keys."""
    return cast("dict[str, Hook]", vars(module)["_forward_hooks"])  # torch.compile follows no cast(dict[str, Hook], …)


def forward_pre_hooks(module: nn.Module) -> dict[str, Hook]:
    """Return the dictionary of the hooks that run before ``module``."""
    return cast("dict[str, Hook]", vars(module)["_forward_pre_hooks"])


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the dictionary of the children of ``module``."""
    return cast(dict[str, nn.Module | None], vars(module)["_modules"])


def exchange_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place of ``model`` in which ``old`` stands: a shared module has several."""
    for _, parent in list_modules(model):
        children = children_of(parent)
        for key in [key for key, child in children.items() if child is old]:
            children[key] = new


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of ``module`` without those of its children."""
    attributes = cast(dict[str, dict[str, Tensor | None]], vars(module))
    return [t for kind in ("_parameters", "_buffers") for t in attributes[kind].values() if t is not None]


def read_version(tensor: Tensor) -> int | None:
    """Return a count that grows with each in-place change of ``tensor``; inference tensors keep none."""
    return None if tensor.is_inference() else tensor._version


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` was called."""
    return vars(module).get("_compiled_call_impl") is not None
