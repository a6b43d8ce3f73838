"""int8 for ExecuTorch: PyTorch's PT2E quantisation with XNNPACK's quantizer, then lowered to XNNPACK."""

import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ecanet.deploy.about import About
from ecanet.deploy.programs import flatten, measure_layers, name_module, quiet, trace
from ecanet.errors import ExportError, summarize

__all__ = ["open_int8", "write_int8"]

LAYERS = {
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.linear.default,
}
CLAMPS = {torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default}
"""ReLU6, as it is recorded."""
ACTIVATIONS = {torch.ops.aten.relu.default, torch.ops.aten.relu_.default} | CLAMPS
CORRECTED = 32
"""Images, at most, on which biases are corrected."""


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
    graph = trace(network, one, "nothing").module()
    try:
        with quiet(), torch.no_grad():
            prepared = tools.prepare_pt2e(copy.deepcopy(graph), _make_quantizer())  # it changes what it gets
            for at in range(len(calibration)):
                prepared(calibration[at : at + 1])
            quantized = tools.convert_pt2e(prepared)
            _correct_biases(graph, quantized, calibration[:: -(-len(calibration) // CORRECTED)])
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
    """Return XNNPACK's quantizer, with ranges from the smallest to the largest value, and those of ReLU6 behind it."""
    module: Any = importlib.import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    pt2e: Any = importlib.import_module("torchao.quantization.pt2e")
    config = module.get_symmetric_quantization_config(is_per_channel=True)
    observer = pt2e.MinMaxObserver.with_args(eps=2**-12)  # the tool's smallest scale
    activation = dataclasses.replace(config.input_activation, observer_or_fake_quant_ctr=observer)
    config = dataclasses.replace(config, input_activation=activation, output_activation=activation)
    quantizer = module.XNNPACKQuantizer().set_global(config)
    annotate = quantizer.annotate
    quantizer.annotate = lambda graph: _observe_behind_clamps(annotate(graph))  # pyright: ignore[reportUnknownLambdaType]
    return quantizer


def _observe_behind_clamps(graph: Any) -> Any:
    """Let the range of a convolution that ReLU6 follows be that of ReLU6's output, and return ``graph``.

    XNNPACK runs both as one step, but its quantizer takes the range before ReLU6, of which 0 to 6 is a small part:
    MobileNetV2 loses two of eight bits in each layer.
    """
    annotations: Any = importlib.import_module("torchao.quantization.pt2e.quantizer")
    for node in graph.graph.nodes:
        layer: Any = node.args[0] if node.target in CLAMPS else None
        if layer is None or layer.target not in LAYERS or len(layer.users) > 1:
            continue
        if (found := layer.meta.get("quantization_annotation")) is not None:
            node.meta["quantization_annotation"] = annotations.QuantizationAnnotation(
                output_qspec=found.output_qspec, _annotated=True
            )
            found.output_qspec = None
    return graph


def _run_in_step(graph: fx.GraphModule, images: Tensor) -> Iterator[tuple[fx.Node, list[dict[fx.Node, Any]]]]:
    """Yield each operation after it ran on every image, with the values so far of each image, which may be changed.

    A recorded graph takes one image at a time.
    """
    runs = [fx.Interpreter(graph) for _ in images]
    for at, run in enumerate(runs):
        run.args_iter = iter((images[at : at + 1],))
    for node in graph.graph.nodes:
        if node.op == "output":
            return
        for run in runs:
            run.env[node] = run.run_node(node)
        yield node, [run.env for run in runs]
        for run in runs:
            for unused in run.user_to_last_uses.get(node, ()):
                del run.env[unused]


def _correct_biases(graph: fx.GraphModule, quantized: fx.GraphModule, images: Tensor) -> None:
    """Add to each bias what the layer's output has lost on average, layer by layer (Nagel et al., 2019, section 4.2).

    Rounded weights shift the means of the channels, and the layers behind add the shifts up.
    """
    means = [_average(node, values) for node, values in _run_in_step(graph, images) if node.target in LAYERS]
    biases = dict(quantized.named_parameters(remove_duplicate=False))
    for node, values in _run_in_step(quantized, images):
        if node.target not in LAYERS:
            continue
        wanted, bias = means.pop(0), node.args[2] if len(node.args) > 2 else None
        # A layer that runs twice, as before an early gate, keeps the correction of its first run.
        if isinstance(bias, fx.Node) and (parameter := biases.pop(str(bias.target), None)) is not None:
            lost = wanted - _average(node, values)
            parameter.add_(lost)
            for one in values:
                one[node] = one[node] + lost.reshape(-1, *(1 for _ in one[node].shape[2:]))


def _average(node: fx.Node, values: Sequence[dict[fx.Node, Any]]) -> Tensor:
    """Return the mean of each channel of the output of ``node``."""
    outputs = torch.cat([one[node] for one in values])  # N C ...
    return outputs.transpose(0, 1).flatten(1).mean(1)


def _compare_layers(graph: fx.GraphModule, quantized: fx.GraphModule, sample: Tensor) -> dict[str, float]:
    before, after = (list(_read_outputs(one, sample)) for one in (graph, quantized))
    return measure_layers((name, y, x) for (name, x), (_, y) in zip(before, after, strict=True))


@torch.no_grad()
def _read_outputs(graph: fx.GraphModule, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the output of each layer, behind its activation where only this reads it."""
    names: dict[fx.Node, str] = {}
    for node in graph.graph.nodes:
        if node.target in LAYERS:
            users = list(node.users)
            last = users[0] if len(users) == 1 and users[0].target in ACTIVATIONS else node
            names[last] = name_module(node)
    for node, values in _run_in_step(graph, images):
        if node in names:
            yield names[node], torch.cat([one[node] for one in values])
