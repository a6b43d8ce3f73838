"""Count the bytes that PyTorch's operations and Triton's loads and stores read and write.

The figure is the cost of a tail's passes over memory, so only whole tensors count. Convolutions, matrix products, views
and allocations are left out, and so are a Triton kernel's (N, C) coefficients.
"""

import importlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOT_COUNTED = ("convolution", "mm", "addmm", "bmm", "mkldnn", "max_pool", "empty", "new_empty", "expand", "_to_copy_")
"""Operations that are not passes of a tail, by a part of their name (short parts must be the whole name)."""


@dataclass
class Traffic:
    """Bytes read and written so far."""

    read: int = 0
    written: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written together."""
        return self.read + self.written


class _Operator(Protocol):
    """The part of ``torch._ops.OpOverload`` that is used here."""

    is_view: bool

    def name(self) -> str: ...

    def __call__(self, *args: object, **kwargs: object) -> object: ...


class _TrafficCounter(TorchDispatchMode):
    def __init__(self, traffic: Traffic, smallest: int) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.traffic, self.smallest = traffic, smallest

    def __torch_dispatch__(
        self,
        func: _Operator,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        options = kwargs or {}
        out = func(*args, **options)
        name = func.name().split("::")[1].partition(".")[0]
        if func.is_view or any(name == part or (len(part) > 4 and part in name) for part in NOT_COUNTED):
            return out
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        # an output buffer that the caller passes is written, not read
        read = {key: value for key, value in options.items() if key not in ("out", "grad_input")}
        inputs = [x for x in tree_leaves((args, read)) if isinstance(x, Tensor)]
        if name.rstrip("_") in ("zero", "fill", "copy", "zeros_like", "ones_like") and len(inputs) < 3:
            inputs = inputs[1:] if name.endswith("_") else []  # these do not read their first tensor
        self.traffic.written += sum(self._count_bytes(x) for x in outputs)
        self.traffic.read += sum(self._count_bytes(x) for x in inputs)
        return out

    def _count_bytes(self, x: Tensor) -> int:
        return x.numel() * x.element_size() if x.numel() >= self.smallest and 0 not in x.stride() else 0


@contextmanager
def count_operations(smallest: int = 1) -> Generator[Traffic]:
    """Count the bytes that PyTorch's operations move inside the block; yield the growing counts.

    Tensors of fewer than ``smallest`` elements do not count.
    """
    traffic = Traffic()
    with _TrafficCounter(traffic, smallest):
        yield traffic


class _Values(Protocol):
    """A block of values or pointers in Triton's interpreter; ``data`` is a NumPy array."""

    data: Any

    def get_element_ty(self) -> Any: ...


@contextmanager
def count_interpreted_accesses() -> Generator[Traffic]:
    """Count the bytes that Triton's interpreter loads and stores inside the block; yield the growing counts.

    Masked lanes do not count. One-dimensional accesses and blocks of fewer than 128 elements do not, either: with a few
    samples they are the (N, C) coefficients.
    """
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    traffic = Traffic()
    load: Callable[..., object] = builder.create_masked_load
    store: Callable[..., object] = builder.create_masked_store

    def count_bytes(pointers: _Values, mask: _Values) -> int:
        if pointers.data.ndim < 2 or pointers.data.size < 128:
            return 0
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self: object, pointers: _Values, mask: _Values, *rest: object) -> object:
        traffic.read += count_bytes(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: object, pointers: _Values, value: object, mask: _Values, *rest: object) -> object:
        traffic.written += count_bytes(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def count_saved_bytes(step: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps for the backward of ``step``: each storage once, parameters included."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step()
    return sum(storages.values())
