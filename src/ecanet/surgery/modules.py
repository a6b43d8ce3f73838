"""Typed views of what `torch.nn.Module` keeps in its dictionaries, where PyTorch's own annotations say nothing."""

from collections.abc import Callable, Iterable
from typing import TypeVar, cast

from torch import Tensor, nn

Hook = Callable[..., object]

Mixin = TypeVar("Mixin", bound=nn.Module)


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


def derive_class(mixin: type[Mixin], original: type[nn.Module], names: dict[str, object]) -> type[Mixin]:
    """Return a subclass of ``original`` with the methods of ``mixin`` and ``names``; objects can change to it."""
    derived = type(original.__name__, (mixin, original), names)
    try:
        object.__new__(original).__class__ = derived
    except TypeError:
        # Python compares memory layouts along first bases, and `class Block(Generic[T], nn.Module)` has another one
        # than the mixin. So the original is the only base, and the mixin comes in by the order of methods.
        def mro(kind: type) -> list[type]:
            return [kind, mixin, *original.__mro__] if kind.__bases__ == (original,) else type.mro(kind)

        derived = type("Derived", (type(original),), {"mro": mro})(original.__name__, (original,), names)
    return cast("type[Mixin]", derived)
