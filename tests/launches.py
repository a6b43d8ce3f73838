"""Count what one training step asks a GPU to do, without a GPU.

On the meta device tensors have shapes and no values, so a network at its true size takes no time. PyTorch's operations
are counted as they are dispatched, and Triton's kernels as they are launched.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ecanet import ops
from ecanet.ops import dispatch
from ecanet.ops.triton import algebra, expansion, kernels, launch

KERNEL_MODULES: tuple[ModuleType, ...] = (kernels, algebra, expansion)


class StepCounts(NamedTuple):
    """Operations of a step that are kernels on a GPU, without convolutions."""

    small: Counter[str]
    """PyTorch's operations by name. Views and allocations run no kernel, so they are left out."""
    launches: Counter[str]
    """Triton's launches by kernel."""


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        results = [r for r in func._schema.returns if "Tensor" in str(r.type)]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in results)
        if results and not views and "empty" not in name and not name.startswith("convolution"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class _Recorder:
    """It stands in for a Triton kernel and only counts its launches."""

    def __init__(self, name: str, launches: Counter[str]):
        self.name, self.launches = name, launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def run(*args: object, **options: object) -> None:
            self.launches[self.name] += 1

        return run


@contextlib.contextmanager
def record_launches() -> Iterator[Counter[str]]:
    """Count the launches of every Triton kernel in the block; none of them runs."""
    launches: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for module in KERNEL_MODULES:
            for name, value in list(vars(module).items()):
                if type(value).__name__ in ("InterpretedFunction", "JITFunction"):
                    patch.setattr(module, name, _Recorder(name, launches))
        yield launches


@contextlib.contextmanager
def force_kernels() -> Iterator[None]:
    """Let networks take the Triton kernels for tensors of every device."""
    with pytest.MonkeyPatch.context() as patch, ops.prefer_impl("fused"):
        patch.setattr(dispatch, "choose", lambda impl, x, obstacle=None: launch)
        yield


def count_step(network: nn.Module, batch: int, size: int = 224) -> StepCounts:
    """Count a forward and a backward of ``network``, built on the meta device, in channels-last training."""
    network = network.to(memory_format=torch.channels_last).train()
    x = torch.empty(batch, 3, size, size, device="meta").contiguous(memory_format=torch.channels_last)
    with force_kernels(), record_launches() as launches, _Operations() as operations:
        network(x).sum().backward()
    return StepCounts(operations.seen, launches)
