"""int8 for ONNX Runtime: its own static quantisation, with QuantizeLinear and DequantizeLinear around every layer."""

import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ecanet.deploy import onnx_files
from ecanet.deploy.about import KEY, About
from ecanet.deploy.programs import measure_layers, quiet
from ecanet.errors import ExportError, summarize
from ecanet.models import quiet_loggers

__all__ = ["open_int8", "write_int8"]

INPUT = "images"
BATCH = 16
"""Images that the calibration runs at once."""
READ = "_DequantizeLinear_Output"
"""End of the names that ONNX Runtime's tool gives to tensors which it reads back from int8."""
STEPS = 256
"""Steps between 0 and the gain of a gate. With 256 of them a neutral gate, sigmoid(0) = 128 / 256, is exact."""


def write_int8(network: nn.Module, calibration: Tensor, sample: Tensor, about: About, path: Path) -> dict[str, float]:
    """Write ``network`` in int8 to ``path``; return the relative error of each layer's output on ``sample``.

    Weights have one scale for each output channel, activations one for each tensor, from their smallest and largest
    values on the images ``calibration`` (N, C, H, W).

    Raises:
        ExportError: ONNX Runtime cannot quantise it.
    """
    tools: Any = importlib.import_module("onnxruntime.quantization")
    onnx: Any = importlib.import_module("onnx")
    with tempfile.TemporaryDirectory() as folder:
        float_path = Path(folder, "float.onnx")
        onnx_files.write_file(network, [calibration[:2]], about, float_path)
        graph = onnx.load(str(float_path)).graph
        try:
            with quiet(), quiet_loggers("root"):
                tools.quantize_static(
                    str(float_path),
                    str(path),
                    _make_reader(tools, calibration),
                    quant_format=tools.QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=tools.QuantType.QUInt8,
                    weight_type=tools.QuantType.QInt8,
                    extra_options={"TensorQuantOverrides": _fix_gate_ranges(graph, tools, onnx)},
                )
        except Exception as error:  # the tool raises errors of many classes
            raise ExportError(f"ONNX Runtime cannot quantise {type(network).__name__}: {summarize(error)}") from error
        model: Any = onnx.load(str(path))
        onnx.helper.set_model_props(model, {KEY: about.to_json()})
        onnx.save(model, str(path))
        names = _name_layers(graph, model.graph)
        if not names:
            return {}
        before = _read_outputs(onnx, float_path, list(names), sample)
        after = _read_outputs(onnx, path, [name for name, _ in names.values()], sample)
    rows = zip(names.values(), after, before, strict=True)
    return measure_layers((layer, torch.as_tensor(a), torch.as_tensor(b)) for (_, layer), a, b in rows)


def open_int8(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the function from images (N, C, H, W) to logits that the file computes in ONNX Runtime."""
    session = onnx_files.open_file(path)
    return lambda images: session.run([images])[0]


def _make_reader(tools: Any, calibration: Tensor) -> Any:
    """Return what ONNX Runtime asks for the next images until there are none."""

    class Reader(tools.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest: Iterator[Tensor] = iter(
                [calibration[at : at + BATCH] for at in range(0, len(calibration), BATCH)]
            )

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.rest, None)
            return None if images is None else {INPUT: images.numpy()}

    return Reader()


def _fix_gate_ranges(graph: Any, tools: Any, onnx: Any) -> dict[str, list[dict[str, Any]]]:
    """Return the scale of every sigmoid's output, and of its product with a constant gain: from 0 to what it can reach.

    On a few images a gate shows a part of its range alone, and other images would be clipped to it.
    """
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    reach: dict[str, float] = {}
    for node in graph.node:
        if node.op_type in ("Sigmoid", "HardSigmoid"):
            reach[node.output[0]] = 1.0
        elif node.op_type == "Mul" and len(gates := [name for name in node.input if name in reach]) == 1:
            gains = [constants[name] for name in node.input if name in constants and constants[name].size == 1]
            if gains and float(gains[0].item()) > 0:
                reach[node.output[0]] = reach[gates[0]] * float(gains[0].item())
    return {
        name: [
            {
                "scale": np.array(largest / STEPS, np.float32),
                "zero_point": np.array(0, np.uint8),
                "quant_type": tools.QuantType.QUInt8,
            }
        ]
        for name, largest in reach.items()
    }


def _name_layers(graph: Any, quantized: Any) -> dict[str, tuple[str, str]]:
    """Return each layer's output in the ``quantized`` graph and its module, by its output in the float ``graph``.

    Where the tool has joined a layer with the activation behind it, the activation's output stands for the layer's.
    """
    there = {name for node in quantized.node for name in node.output}
    after = {name: node.output[0] for node in graph.node if node.op_type in ("Relu", "Clip") for name in node.input[:1]}
    last = {output.name for output in graph.output}
    names: dict[str, tuple[str, str]] = {}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            layer = node.input[1].removesuffix(".weight")
            for name in (node.output[0], after.get(node.output[0], "")):
                if name + READ in there or name in last:  # the network's own outputs keep their names
                    names[name] = (name if name in last else name + READ), layer
                    break
    return names


def _read_outputs(onnx: Any, path: Path, names: list[str], sample: Tensor) -> list[Any]:
    """Return the tensors ``names`` inside the file for the images ``sample``."""
    runtime: Any = importlib.import_module("onnxruntime")
    model: Any = onnx.load(str(path))
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options: Any = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(names, {INPUT: sample.numpy()}))
