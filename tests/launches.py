"""Count what one training step asks a GPU to do, without a GPU.

On the meta device tensors have shapes and no values, so a network at its true size takes no time. PyTorch's operations
are counted as they are dispatched, and Triton's kernels as they are launched.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ecanet import ops
from ecanet.ops import dispatch
from ecanet.ops.triton import launch
from ecanet.ops.triton.launch import Launch


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
        if results and not views and "empty" not in name:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def record_launches() -> Iterator[Counter[str]]:
    """Count the launches of a tail's kernels in the block; none of them runs."""
    launches: Counter[str] = Counter()

    def record(launch: Launch, *tensors: Tensor | None) -> None:
        launches[launch.kernel.fn.__name__] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", record)
        yield launches


class _Convolution(torch.autograd.Function):
    """A convolution without values, whose results are channels-last as on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        side = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
        shape = (len(x), len(weight), side, side)
        return torch.empty(shape, device="meta", memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dx = torch.empty(x.shape, device="meta", memory_format=torch.channels_last)
        return dx, torch.empty_like(weight), None, None


@contextlib.contextmanager
def force_kernels() -> Iterator[None]:
    """Let networks take the Triton kernels for tensors of every device."""
    with pytest.MonkeyPatch.context() as patch, ops.prefer_impl("fused"):
        patch.setattr(dispatch, "choose", lambda *args, **settings: launch)
        yield


@contextlib.contextmanager
def skip_convolutions() -> Iterator[None]:
    """Let convolutions only allocate their results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Conv2d, "forward", lambda self, x: _Convolution.apply(x, self.weight, self.stride[0], self.padding[0])
        )
        yield


def count_step(network: nn.Module, batch: int, size: int = 224) -> StepCounts:
    """Count a forward and a backward of ``network``, built on the meta device, in channels-last training."""
    network = network.to(memory_format=torch.channels_last).train()
    x = torch.empty(batch, 3, size, size, device="meta").contiguous(memory_format=torch.channels_last)
    with force_kernels(), skip_convolutions(), record_launches() as launches, _Operations() as operations:
        network(x).sum().backward()
    return StepCounts(operations.seen, launches)
