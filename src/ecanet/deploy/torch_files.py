"""PyTorch's own files: `torch.export` and TorchScript."""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ecanet.deploy.about import KEY, About
from ecanet.deploy.programs import Session, flatten, list_varying_axes, quiet, trace
from ecanet.deploy.value_reads import reads_values, refuse_value_reads
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


def write_script(network: nn.Module, inputs: Sequence[Tensor], about: About, path: Path) -> dict[str, object]:
    """Write the trace of ``network``; `torch.jit.load` reads it without Python, too.

    Raises:
        ExportError: `torch.jit.trace` cannot record it, or its steps depend on the values of the images.
    """
    file = io.BytesIO()
    try:
        if reads_values(network, inputs):
            raise refuse_value_reads(network)
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
