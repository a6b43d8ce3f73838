"""A network's forward and backward in training as CUDA graphs: Python then costs two launches a step.

A graph repeats the same kernels on the same memory. So it serves batches of one shape, and a network whose steps do not
depend on values: a network that reads a value on the way cannot be captured, and that is an error.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ecanet.errors import ConfigError, summarize

__all__ = ["TrainingGraph"]


class TrainingGraph:
    """Call ``network`` on a batch: in training by graphs, which the first batch is captured for, else as it is.

    Batches of another shape than the first one, and evaluation, run without graphs. The loss, the optimizer and the
    average of the weights stay outside.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.captured: Callable[[Tensor], Tensor] | None = None
        self.batch: tuple[object, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the network's output for ``x`` (N, C, H, W). The next call may write into the same memory.

        Raises:
            ConfigError: the network cannot be captured.
        """
        if not self.network.training or not torch.is_grad_enabled():
            return self.network(x)
        batch = x.shape, x.stride(), x.dtype
        if self.captured is None:
            self.captured, self.batch = capture(self.network, x), batch
        return self.captured(x) if batch == self.batch else self.network(x)


class _Whole(nn.Module):
    """A module around the network: PyTorch patches the forward of the module that it captures."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def capture(network: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that replays the forward of ``network`` on batches like ``x``, and in autograd its backward.

    PyTorch runs the network a few times before the capture. There the kernels are compiled and proven, and cuDNN
    chooses its algorithms. These steps leave no trace: the buffers and the random state are put back.

    Raises:
        ConfigError: it cannot be captured.
    """
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    # The cache of autocast would keep weights of the capture for the eager steps after it.
    half = torch.autocast(
        x.device.type,
        torch.get_autocast_dtype(x.device.type),
        enabled=torch.is_autocast_enabled(x.device.type),
        cache_enabled=False,
    )
    try:
        with half, torch.random.fork_rng([x.device] if x.is_cuda else []):  # pyright: ignore[reportUnknownMemberType]
            captured = torch.cuda.make_graphed_callables(_Whole(network), (x.clone(),), allow_unused_input=True)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"cuda_graph: this network cannot be captured ({summarize(error)}); leave cuda_graph out"
        ) from None
    with torch.no_grad():
        for buffer, old in before:
            buffer.copy_(old)
    return cast(Callable[[Tensor], Tensor], captured)
