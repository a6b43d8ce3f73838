"""Bytes moved, by count: what each PyTorch operation and each Triton load and store reads and writes.

Whole tensors only: convolutions and matrix products, views and allocations are left out, and of a Triton kernel the
(N, C) coefficients, so that the figure is what a tail's passes over memory cost.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ELSEWHERE = ("convolution", "mm", "addmm", "bmm", "mkldnn", "max_pool", "empty", "new_empty", "expand", "_to_copy_")
"""Operations whose traffic is not the tail's, by part of their name."""


@dataclass
class Traffic:
    """Bytes read and written so far."""

    read: int = 0
    written: int = 0

    @property
    def moved(self) -> int:
        """Both."""
        return self.read + self.written


class _Count(TorchDispatchMode):
    def __init__(self, traffic: Traffic, smallest: int):
        super().__init__()
        self.traffic, self.smallest = traffic, smallest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or any(name == part or (len(part) > 4 and part in name) for part in ELSEWHERE):
            return out
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        given = {name: x for name, x in (kwargs or {}).items() if name not in ("out", "grad_input")}  # only written
        inputs = [x for x in tree_leaves((args, given)) if isinstance(x, Tensor)]
        if name.rstrip("_") in ("zero", "fill", "copy", "zeros_like", "ones_like") and len(inputs) < 3:
            inputs = inputs[1:] if name.endswith("_") else []  # the target is only written
        self.traffic.written += sum(self._bytes(x) for x in written)
        self.traffic.read += sum(self._bytes(x) for x in inputs)
        return out

    def _bytes(self, x: Tensor) -> int:
        size = x.numel() * x.element_size()
        return size if x.numel() >= self.smallest and 0 not in x.stride() else 0


@contextmanager
def counted(smallest: int = 1) -> Iterator[Traffic]:
    """Count what PyTorch's operations move inside; tensors of fewer than ``smallest`` elements are left out."""
    traffic = Traffic()
    with _Count(traffic, smallest):
        yield traffic


@contextmanager
def interpreted() -> Iterator[Traffic]:
    """Count what Triton's interpreter loads and stores inside, tile by tile, masked lanes left out.

    One-dimensional accesses are those of (N, C) numbers and are not counted.
    """
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    traffic = Traffic()
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def lanes(pointers: Any, mask: Any) -> int:
        if pointers.data.ndim < 2:
            return 0
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.read += lanes(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.written += lanes(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    Builder.create_masked_load, Builder.create_masked_store = counting_load, counting_store  # type: ignore[method-assign]
    try:
        yield traffic
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store  # type: ignore[method-assign]


def saved(step: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward of ``step``, each storage once, parameters included."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step()
    return sum(storages.values())
