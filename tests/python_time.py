"""Measure the Python time of one training step of ResNet-50, without a GPU: python tests/python_time.py ROUNDS.

Triton's own launcher runs with a driver that does nothing, and convolutions only allocate their results, so that what
remains is the time that Python, autograd and the launches take. The tensors are tiny. It prints one JSON object: the
shortest time of each network in milliseconds, of rounds in which the networks take turns. It must run in a process of
its own, without Triton's interpreter, and compiles the kernels for compute capability 9.0.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import ecanet
from ecanet.ops import dispatch, proof
from ecanet.ops.triton import launch


class IdleDriver:
    """Triton's driver of a device on which nothing runs."""

    utils: Any

    def __init__(self) -> None:
        self.utils = self
        self.launcher_cls = lambda source, metadata: lambda *args: None

    def load_binary(self, *args: object) -> tuple[int, ...]:
        """Return module, function, registers, spills and threads."""
        return 1, 2, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what the launcher asks of an H100 or H200."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def get_current_target(self) -> GPUTarget:
        """Return compute capability 9.0."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the only stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the device of the tensors."""
        return torch.device("cpu")


class IdleConvolution(torch.autograd.Function):
    """A convolution that allocates its results and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return an uninitialised output of 2 x 2 positions."""
        ctx.save_for_backward(x, weight)
        shape = (len(x), len(weight), 2, 2)
        return torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return uninitialised gradients."""
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def prepare(network: nn.Module) -> Callable[[], None]:
    """Return a training step of ``network`` under autocast to bfloat16."""
    network.maxpool = nn.Identity()
    network = network.to(memory_format=torch.channels_last).train()
    x = torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(2, dtype=torch.long)

    def step() -> None:
        for parameter in network.parameters():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(network(x), labels)
        loss.backward()

    return step


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    driver.set_active(IdleDriver())  # pyright: ignore[reportArgumentType]
    nn.Conv2d.forward = lambda self, x: IdleConvolution.apply(x, self.weight)
    dispatch.runs_on_gpu = launch.check = lambda x: True
    proof.is_proven = lambda *args: True
    networks = {
        "torchvision": torchvision.models.resnet50(),
        "plain": ecanet.create_model("resnet50", attention="none"),
        "eca": ecanet.create_model("resnet50"),
    }
    steps = {name: prepare(network) for name, network in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn:  # the first compiles
                times[name].append(time.process_time() - start)
    print(json.dumps({name: round(1e3 * min(found), 2) for name, found in times.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
