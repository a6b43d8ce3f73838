"""CUDA graphs on a CPU: record the operations of a step, and repeat them on the same memory without its Python code.

`torch.cuda.make_graphed_callables` itself runs; only what it needs of a GPU is replaced. As on a GPU, a replay repeats
what was captured: Python's numbers and choices are those of the capture, and inputs and results have fixed places.
Unlike there, the capture computes too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ecanet.ops.triton.launch import Launch

call_kernel = Launch.__call__


class RecordedGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    made: list["RecordedGraph"]

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.launches = self.replays = 0
        self.made.append(self)

    def replay(self) -> None:
        """Run what was recorded."""
        self.replays += 1
        with torch.no_grad():
            for call in self.calls:
                call()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> "_Recorder":
        self.patch.setattr(Launch, "__call__", self.launch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.undo()

    @property
    def launch(self) -> Callable[..., None]:
        """Return a function that launches a kernel and records the launch."""

        def launch(kernel: Launch, *tensors: Tensor | None) -> None:
            call_kernel(kernel, *tensors)
            self.graph.launches += 1
            self.graph.calls.append(lambda: call_kernel(kernel, *tensors))

        return launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **kwargs)
        fresh = [
            x if spec.alias_info is None and "empty" not in func.name() else None
            for spec, x in zip(func._schema.returns, result if isinstance(result, tuple) else (result,), strict=False)
        ]
        places = [x.detach() if isinstance(x, Tensor) else None for x in tree_leaves(fresh)]

        def repeat() -> None:
            for place, x in zip(places, tree_leaves(func(*args, **kwargs)), strict=False):
                if place is not None:
                    place.copy_(x)

        self.graph.calls.append(repeat)
        return result


@contextmanager
def record_graphs() -> Iterator[list[RecordedGraph]]:
    """Let PyTorch record and repeat operations on the CPU where it would capture CUDA graphs; return the graphs."""
    made: list[RecordedGraph] = []

    def capture(graph: RecordedGraph, **options: object) -> _Recorder:
        return _Recorder(graph)

    with pytest.MonkeyPatch.context() as patch:
        RecordedGraph.made = made
        for name, value in {
            "CUDAGraph": RecordedGraph,
            "graph": capture,
            "synchronize": lambda: None,
            "Stream": lambda: None,
            "stream": lambda stream: nullcontext(),
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
        yield made
