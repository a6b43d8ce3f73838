"""Count what one training step, or one batch in evaluation, asks a GPU to do, without a GPU.

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
from torch.utils._pytree import tree_leaves

from ecanet import ops
from ecanet.ops import choices, convolution, dispatch
from ecanet.ops.triton import launch
from ecanet.ops.triton.launch import Launch
from ecanet.studies.bench import traffic

LARGE = 2**22
"""Elements. At batch 256 the smallest map of ResNet-50 has 6.4 million, and its planes at most 1 million statistics."""


class StepCounts(NamedTuple):
    """Operations of a step that are kernels on a GPU, without convolutions."""

    small: Counter[str]
    """PyTorch's operations by name. Views and allocations run no kernel, so they are left out."""
    launches: Counter[str]
    """Triton's launches by kernel."""
    large: Counter[str]
    """Those of `small` that read or write a tensor of `LARGE` elements: each is a pass over memory."""


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.large: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        results = [r for r in func._schema.returns if "Tensor" in str(r.type)]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in results)
        found = func(*args, **(kwargs or {}))
        if results and not views and "empty" not in name:
            self.seen[name] += 1
            tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)]
            self.large[name] += any(x.numel() >= LARGE for x in tensors)
        return found


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
    return StepCounts(operations.seen, launches, +operations.large)


class BatchCounts(NamedTuple):
    """Kernels of a batch in evaluation on a GPU."""

    kernels: Counter[str]
    """By name; those of convolutions are ``convolution``, ``convolution_relu`` and ``ecanet::expansion``."""
    moved: int
    """Bytes that the other kernels read and write: whole tensors, without the max pooling."""


def count_batch(network: nn.Module, batch: int, chosen: str | None, size: int = 224) -> BatchCounts:
    """Count the kernels of one batch for a copy that `ecanet.optimize` has made, on the meta device, in bfloat16.

    PyTorch adds the bias of a convolution on a GPU in a kernel of its own, which reads and writes the result.
    ``chosen`` is the form for bias and ReLU wherever there is a choice: cuDNN's "kernel", "one pass", or neither.
    """
    kernels: Counter[str] = Counter()
    biases = traffic.Traffic()

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        y = _shape_output(x, weight, *geometry[:3])
        kernels.update({"convolution": 1, "bias": bias is not None})
        biases.read += y.nbytes * (bias is not None)
        return y

    def run_operator(given: convolution.Operands, geometry: convolution.Geometry) -> Tensor:
        kernels.update({"convolution_relu": 1})
        return _shape_output(given.x, given.weight, *geometry[:3])

    def run_with_one_pass(given: convolution.Operands, geometry: convolution.Geometry) -> Tensor:
        kernels.update({"convolution": 1, "one pass": 1})
        y = _shape_output(given.x, given.weight, *geometry[:3])
        biases.read += y.nbytes  # in one kernel, as a bias
        return y

    network = network.to("meta", torch.bfloat16).to(memory_format=torch.channels_last).eval()
    x = torch.empty(batch, 3, size, size, device="meta", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch, ops.prefer_impl("fused"), torch.no_grad():
        for name in ("runs_on_gpu", "has_epilogues"):
            patch.setattr(ops, name, lambda *args: True)
        patch.setattr(
            choices, "is_chosen", lambda *key: chosen == ("one pass" if key[2][0] == "one pass" else "kernel")
        )
        patch.setattr(ops.proof, "is_proven", lambda *key: True)
        patch.setattr(convolution, "run_operator", run_operator)
        patch.setattr(convolution, "run_with_one_pass", run_with_one_pass)
        patch.setattr(nn.functional, "conv2d", convolve)
        patch.setattr(traffic, "NOT_COUNTED", (*traffic.NOT_COUNTED, "expansion"))
        with traffic.count_operations(smallest=batch * 2**13) as others, _Operations() as operations:
            network(x)
    # views that PyTorch does not declare as such
    kernels.update({name: n for name, n in operations.seen.items() if name not in ("_unsafe_view", "as_strided_")})
    return BatchCounts(kernels, others.moved + 2 * biases.read)


def _shape_output(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Return the result of a convolution, without values."""
    places = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    plane = [(side + 2 * p - d * (window - 1) - 1) // s + 1 for side, window, s, p, d in places]
    shape = (len(x), len(weight), *plane)
    return torch.empty(shape, device="meta", dtype=x.dtype, memory_format=torch.channels_last)
