"""int8 for ExecuTorch: PyTorch's PT2E quantisation with XNNPACK's quantizer, then lowered to XNNPACK."""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ecanet.deploy.about import About
from ecanet.deploy.programs import flatten, quiet, trace
from ecanet.errors import ExportError, summarize

__all__ = ["open_int8", "write_int8"]

LAYERS = {
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.linear.default,
}


def write_int8(network: nn.Module, calibration: Tensor, sample: Tensor, about: About, path: Path) -> dict[str, float]:
    """Write ``network`` in int8 to ``path`` (.pte); return the relative error of each layer's output on ``sample``.

    Memory is planned in advance, so the file takes one image at a time.

    Raises:
        ExportError: the network cannot be quantised or lowered.
    """
    exir: Any = importlib.import_module("executorch.exir")
    xnnpack: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    tools: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    one = calibration[:1]
    graph = trace(network, one, fixed=True).module()
    try:
        with quiet(), torch.no_grad():
            prepared = tools.prepare_pt2e(copy.deepcopy(graph), _make_quantizer())  # it changes what it gets
            for at in range(len(calibration)):
                prepared(calibration[at : at + 1])
            quantized = tools.convert_pt2e(prepared)
            program = torch.export.export(quantized, (one,))
            lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
            content = lowered.to_executorch().buffer
    except Exception as error:  # the compilers raise errors of many classes
        raise ExportError(f"ExecuTorch cannot quantise {type(network).__name__}: {summarize(error)}") from error
    path.write_bytes(content)
    path.with_suffix(".json").write_text(about.to_json() + "\n", encoding="utf-8")
    return _compare_layers(graph, quantized, sample)


def open_int8(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the function from one image (1, C, H, W) to logits that the file computes in ExecuTorch's runtime."""
    runtime: Any = importlib.import_module("executorch.runtime").Runtime
    method = runtime.get().load_program(str(path)).load_method("forward")
    # The runtime reads dense tensors, and gives memory that its next call writes again.
    return lambda image: flatten(method.execute([image.contiguous()]))[0].clone()


def _make_quantizer() -> Any:
    module: Any = importlib.import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    config = module.get_symmetric_quantization_config(is_per_channel=True)
    return module.XNNPACKQuantizer().set_global(config)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the outputs of its layers in their order."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.found: list[tuple[str, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; keep the output of a layer under the name of its module."""
        result: Any = super().run_node(n)
        if n.target in LAYERS:
            stack: Any = n.meta.get("nn_module_stack") or {}
            names = [name for name, _ in stack.values() if name]
            self.found.append((names[-1] if names else n.name, result))
        return result


def _compare_layers(graph: fx.GraphModule, quantized: fx.GraphModule, sample: Tensor) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    with torch.no_grad():
        for image in (sample[at : at + 1] for at in range(len(sample))):
            before, after = _Recorder(graph), _Recorder(quantized)
            before.run(image)
            after.run(image)
            for (name, value), (_, other) in zip(before.found, after.found, strict=True):
                both = sums.setdefault(name, [0.0, 0.0])
                both[0] += float((other - value).square().sum())
                both[1] += float(value.square().sum())
    return {name: (difference / (size or 1)) ** 0.5 for name, (difference, size) in sums.items()}
