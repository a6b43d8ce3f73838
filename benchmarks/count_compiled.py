"""Count the bytes and the kernels of a compiled training step of ResNet-50, without a GPU and without running it.

    python benchmarks/count_compiled.py

`torch.compile` traces each network on tensors without values and schedules its kernels. The schedule is the one for a
CPU: the graph is that for a GPU, where a few kernels are split or fused in another way. Convolutions are left out.
"""

import os
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the operators accept tensors on a CPU

import timm
import torch
from torch import Tensor, nn
from torch._functorch import config as graphs
from torch._inductor import config as compiler
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import ecanet
from ecanet import ops

BATCH = 256
CONVOLUTIONS = ("convolution", "addmm")


class Done(BaseException):
    """Forward and backward are scheduled."""


class Schedules:
    """Takes the place of the compiler's last step: it counts what the scheduler has made, and compiles nothing."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []
        self.kernels: list[int] = []

    def count(self, lowering: Any) -> SimpleNamespace:
        lowering.init_wrapper_code()
        lowering._update_scheduler()
        moved: Counter[str] = Counter()
        kernels: Counter[str] = Counter()
        for node in lowering.scheduler.nodes:
            name = str(getattr(node.node, "op_overload", None) or getattr(node.node, "python_kernel_name", ""))
            is_view = type(node.node).__name__ == "MultiOutput" or type(node).__name__.startswith("Nop")
            if not is_view and not any(part in name for part in CONVOLUTIONS):
                moved[name] += node.get_read_write_buffers_sizes()
                kernels[name] += 1
        self.megabytes.append(moved.total() / BATCH / 1e6)
        self.kernels.append(kernels.total())
        if len(self.kernels) == 2:
            raise Done
        return SimpleNamespace(call=None, __file__="", __path__="", key="")


def schedule(network: nn.Module, *, keeps_tails: bool) -> Schedules:
    """Return the counts of forward and backward of ``network``, which is on the meta device."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def place(x: Tensor) -> Tensor:
        return FakeTensor(mode, x.detach(), torch.device("cpu"))

    network = network.to(memory_format=torch.channels_last).train()
    for module in network.modules():
        module._parameters |= {name: nn.Parameter(place(p)) for name, p in module._parameters.items() if p is not None}
        module._buffers |= {name: place(b) for name, b in module._buffers.items() if b is not None}
    images = torch.empty(BATCH, 3, 224, 224, device="meta").to(memory_format=torch.channels_last)
    found = Schedules()
    GraphLowering.compile_to_module = lambda lowering: found.count(lowering)
    torch._dynamo.reset()
    try:
        with mode, torch.autocast("cpu", torch.bfloat16), ops.prefer_impl("fused") if keeps_tails else nullcontext():
            torch.compile(network, fullgraph=True)(place(images))
    except Done:
        pass
    return found


def main() -> None:
    """Print a line for each network."""
    compiler.fx_graph_cache = graphs.enable_autograd_cache = False
    compiler.compile_threads = 1
    graphs.force_non_lazy_backward_lowering = True  # the backward is scheduled with the forward
    with torch.device("meta"):
        networks = {
            "timm's, ECA": (timm.create_model("resnet50", block_args={"attn_layer": "eca"}), False),
            "ours, plain": (ecanet.create_model("resnet50", attention="none"), False),
            "ours, plain, kernels kept": (ecanet.create_model("resnet50", attention="none"), True),
            "ours, ECA": (ecanet.create_model("resnet50"), False),
            "ours, ECA, kernels kept": (ecanet.create_model("resnet50"), True),
        }
    print(f"{'outside convolutions':28s} MB an image: forward backward    kernels: forward backward")
    for name, (network, keeps_tails) in networks.items():
        found = schedule(network, keeps_tails=keeps_tails)
        mb, kernels = found.megabytes, found.kernels
        print(f"{name:28s} {mb[0]:21.1f} {mb[1]:8.1f} {kernels[0]:19d} {kernels[1]:8d}", flush=True)


if __name__ == "__main__":
    main()
