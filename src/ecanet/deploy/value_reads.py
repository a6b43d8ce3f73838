"""Forwards whose steps depend on the values of the images: a recorded graph would hold those of the example alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecanet.errors import ExportError

__all__ = ["reads_values", "refuse_value_reads"]


def reads_values(network: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Return whether ``network``, a classifier, reads values of its ``inputs``: by an if, a loop or float(x)."""
    inputs = [x.clone() for x in inputs]  # a forward may write into its input
    with torch.no_grad(), ValueReads(inputs) as reads:
        network(*inputs)
    return reads.found


def refuse_value_reads(network: nn.Module) -> ExportError:
    """Return the error that says so."""
    return ExportError(
        f"the forward of {type(network).__name__} reads values of the images (an if, a loop, float(x)), and a graph "
        "holds those of the example alone; write it with tensors, such as torch.where"
    )


class ValueReads(TorchDispatchMode):
    """Find out whether a network turns values of its input into Python's numbers, while it runs.

    Shapes, and numbers from weights and buffers, are no such values.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.found = False
        self.derived = dict(map(identify_memory, inputs))
        """The memory of tensors computed from the input: what names it, and what keeps that name, not the memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation ``func``; its results are derived from the input if one of its arguments is."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = func(*args, **(kwargs or {}))
        if any(identify_memory(x)[0] in self.derived for x in given):
            self.found |= func is torch.ops.aten._local_scalar_dense.default
            written = given if func._schema.is_mutable else []
            made = (x for x in tree_leaves(outputs) if isinstance(x, Tensor))
            self.derived |= dict(map(identify_memory, (*made, *written)))
        return outputs


def identify_memory(x: Tensor) -> tuple[int, object]:
    """Return a name for the memory that ``x`` and its views share; no other has it as long as the object lives."""
    if x.layout is not torch.strided:
        return id(x), x
    storage: Any = StorageWeakRef(x.untyped_storage())
    return storage.cdata, storage
