"""Replay a network as a CUDA graph: one launch for a whole forward, for inputs of the one shape that was captured."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from ecanet import ops
from ecanet.errors import ConfigError, summarize

WARM_UPS = 3
"""Runs before the capture: kernels are proven and compiled in them, and cuDNN chooses its algorithms."""


class Capture(NamedTuple):
    """A captured forward: `replay` computes ``output`` from ``x``, each in the memory that it had then."""

    replay: Any
    x: Tensor
    output: object


class CapturedNetwork(nn.Module):
    """Runs a network by replaying a CUDA graph.

    The first call without gradients captures one. Later calls with an input of the same shape, dtype, memory layout and
    device replay it; every other call runs the network as it is. A change of the network's dtype or device drops it.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.captured: dict[object, Capture] = {}

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return what the network returns.

        Raises:
            ConfigError: the input is not on a CUDA device, or the forward cannot be captured.
        """
        x = args[0] if len(args) == 1 and not kwargs else None
        plain = type(x) is Tensor and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if isinstance(x, Tensor) and not ops.runs_on_gpu(x):
            raise ConfigError(f"a network of optimize(graph=True) takes CUDA tensors, got one on {x.device}")
        if not isinstance(x, Tensor) or not plain or self.training:
            return self.network(*args, **kwargs)
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = x.shape, x.dtype, x.stride(), x.device, autocast
        with torch.inference_mode():
            if not self.captured:
                self.captured[key] = capture(self.network, x)
            if key not in self.captured:
                return self.network(x)
            one = self.captured[key]
            one.x.copy_(x)
            one.replay()
        # Cloned, because the next replay writes into the same memory.
        return tree.tree_map_only(Tensor, torch.clone, one.output)

    def _apply(self, fn: Any, recurse: bool = True) -> "CapturedNetwork":
        """Apply ``fn`` to all tensors, as every module does; a graph would go on with the old ones."""
        self.captured = {}
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]

    def __getstate__(self) -> dict[str, object]:
        """Return the attributes for a copy, which captures a graph of its own."""
        return {**vars(self), "captured": {}}


def check_device(model: nn.Module) -> None:
    """Check that all parameters of ``model`` are on a CUDA device.

    Raises:
        ConfigError: one is not.
    """
    for parameter in model.parameters():
        if not ops.runs_on_gpu(parameter):
            raise ConfigError(
                f"graph=True needs a network on a CUDA device, this one is on {parameter.device}; move it with .cuda() "
                f"first, or leave graph= out"
            )


def capture(network: nn.Module, x: Tensor) -> Capture:
    """Capture the forward of ``network`` for inputs like ``x``.

    Raises:
        ConfigError: it waits for the GPU or does something else that a graph cannot hold.
    """
    static = x.clone()
    try:
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                network(static)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = cast(object, network(static))
    except Exception as failed:  # CUDA's errors, and those of any forward
        raise ConfigError(
            f"{type(network).__name__} cannot be captured as a CUDA graph ({summarize(failed)}); leave graph= out"
        ) from failed
    return Capture(graph.replay, static, output)
