"""PyTorch's own files: `torch.export` and TorchScript."""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecanet.deploy.about import KEY, About
from ecanet.deploy.programs import Session, flatten, list_varying_axes, quiet, run_network, trace
from ecanet.errors import ExportError, summarize

# The writers go through memory: on a full disk PyTorch's own writer of files ends the process without a word of Python.

__all__ = ["open_export", "open_script", "write_export", "write_script"]

jit: Any = torch.jit  # its functions have no types

ABOUT = f"{KEY}.json"
"""Name of the description among the extra files."""


def write_export(network: nn.Module, inputs: Sequence[Tensor], about: About, path: Path) -> dict[str, object]:
    """Write the graph of ``network``; `torch.export.load` reads it.

    Raises:
        ExportError: `torch.export` cannot record it.
    """
    program = trace(network, inputs[0])
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={ABOUT: about.to_json()})
    path.write_bytes(file.getvalue())
    batch, size = list_varying_axes(program)
    return {"torch": torch.__version__, "batch varies": batch, "size varies": size}


def open_export(path: Path) -> Session:
    """Return the graph in PyTorch."""
    program = torch.export.load(str(path))
    module = program.module()
    calls = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return flatten(module(*inputs))

    return Session(run=run, operations=dict(calls), takes=list_varying_axes(program))


class ValueReads(TorchDispatchMode):
    """Find out whether a network turns values of its input into Python's numbers, while it runs.

    A trace would hold those of one input. Shapes, and numbers from weights and buffers, are no such values.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.found = False
        self.derived = {find_storage(x): x for x in inputs}
        """Tensors computed from the input by their storage, which views share. None of them goes while this lives."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation ``func``; its results are derived from the input if one of its arguments is."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = func(*args, **(kwargs or {}))
        if any(find_storage(x) in self.derived for x in given):
            self.found |= func is torch.ops.aten._local_scalar_dense.default
            written = given if func._schema.is_mutable else []
            made = (x for x in tree_leaves(outputs) if isinstance(x, Tensor))
            self.derived |= {find_storage(x): x for x in (*made, *written)}
        return outputs


def find_storage(x: Tensor) -> int:
    """Return the address of the memory that ``x`` and its views share."""
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else id(x)


def write_script(network: nn.Module, inputs: Sequence[Tensor], about: About, path: Path) -> dict[str, object]:
    """Write the trace of ``network``; `torch.jit.load` reads it without Python, too.

    Raises:
        ExportError: `torch.jit.trace` cannot record it, or its steps depend on the values of the images.
    """
    file = io.BytesIO()
    try:
        with ValueReads(inputs) as reads:
            run_network(network, inputs)
        if reads.found:
            raise ExportError(
                f"the forward of {type(network).__name__} reads values of the images (an if, a loop, float(x)), and a "
                "trace holds those of the example alone; write it with tensors, such as torch.where"
            )
        with quiet(), torch.no_grad():
            # A dictionary of outputs is not strict, and the check compares them.
            traced = jit.trace(network, tuple(inputs), check_trace=False, strict=False)
            jit.save(traced, file, _extra_files={ABOUT: about.to_json().encode()})
    except ExportError:
        raise
    except Exception as error:  # the recorder raises errors of many classes
        raise ExportError(f"torch.jit.trace cannot record {type(network).__name__}: {summarize(error)}") from error
    path.write_bytes(file.getvalue())
    return {"torch": torch.__version__, "batch varies": True, "size varies": True}


def open_script(path: Path) -> Session:
    """Return the trace in PyTorch's interpreter for it."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        module = jit.load(str(path))
    calls = Counter(str(node.kind()) for node in module.inlined_graph.nodes())
    operations = {kind: count for kind, count in calls.items() if kind.startswith("aten::")}

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with quiet(), torch.no_grad():
            return flatten(cast(object, module(*inputs)))

    return Session(run=run, operations=operations)
