"""ExecuTorch: phones and small devices, with XNNPACK as the fast backend, checked in its own runtime."""

import importlib
import operator
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecanet.deploy.about import About
from ecanet.deploy.programs import Session, flatten, quiet, trace
from ecanet.errors import ExportError, summarize

__all__ = ["open_file", "write_file"]

MEAN, VIEW = torch.ops.aten.mean.dim, torch.ops.aten.view.default


def write_file(network: nn.Module, inputs: Sequence[Tensor], about: About, path: Path) -> dict[str, object]:
    """Write ``network`` to ``path`` (.pte), and what it says about itself beside it (.json).

    Memory is planned in advance, so the file takes the example's size alone.

    Raises:
        ExportError: ExecuTorch cannot lower it.
    """
    exir: Any = importlib.import_module("executorch.exir")
    xnnpack: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    program = trace(network, inputs[0], "nothing")
    keep_spatial_axes(program)
    try:
        with quiet():
            lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
            content = lowered.to_executorch().buffer
    except Exception as error:  # the compiler raises errors of many classes
        raise ExportError(f"ExecuTorch cannot lower {type(network).__name__}: {summarize(error)}") from error
    path.write_bytes(content)
    path.with_suffix(".json").write_text(about.to_json() + "\n", encoding="utf-8")
    return {"executorch": version("executorch"), "batch varies": False, "size varies": False}


def keep_spatial_axes(program: torch.export.ExportedProgram) -> None:
    """Let each mean over the two spatial axes keep them, and remove them afterwards: XNNPACK has no other mean."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target != MEAN or node.kwargs or len(node.args) > 2:
            continue
        x, axes = node.args
        if x.meta["val"].dim() != 4 or sorted(axes) not in ([2, 3], [-2, -1]):
            continue
        with graph.inserting_after(node):
            flat = graph.call_function(VIEW, (node, list(node.meta["val"].shape)))
        node.replace_all_uses_with(flat, delete_user_cb=partial(operator.is_not, flat))
        flat.meta = dict(node.meta)
        node.args = (x, axes, True)
        node.meta = dict(node.meta, val=node.meta["val"][..., None, None])
    program.graph_module.recompile()


def open_file(path: Path) -> Session:
    """Return the file in ExecuTorch's runtime, which runs in one thread for each core unless it was built otherwise."""
    runtime: Any = importlib.import_module("executorch.runtime").Runtime
    method = runtime.get().load_program(str(path)).load_method("forward")
    counts = count_instructions(path)

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # The runtime reads dense tensors, and gives memory that its next call writes again.
        return tuple(x.clone() for x in flatten(method.execute([x.contiguous() for x in inputs])))

    return Session(
        run=run,
        operations=dict(counts),
        partitions=counts["delegate"],
        stray=sum(counts.values()) - counts["delegate"],
        takes=(False, False),
    )


def count_instructions(path: Path) -> Counter[str]:
    """Return how often the file calls each kernel and, as "delegate", a part that XNNPACK runs as a whole."""
    serialize: Any = importlib.import_module("executorch.exir._serialize._program")
    plan = serialize.deserialize_pte_binary(path.read_bytes()).program.execution_plan[0]
    counts: Counter[str] = Counter()
    for chain in plan.chains:
        for instruction in chain.instructions:
            call = instruction.instr_args
            if type(call).__name__ == "DelegateCall":
                counts["delegate"] += 1
            elif type(call).__name__ == "KernelCall":
                counts[plan.operators[call.op_index].name] += 1
    return counts
