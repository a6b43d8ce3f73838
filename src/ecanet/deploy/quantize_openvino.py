"""int8 for OpenVINO, by NNCF: ranges from images, and biases corrected for the rounding of the weights."""

import importlib
import logging
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecanet.deploy.about import KEY, About
from ecanet.deploy.programs import measure_layers, name_module, quiet, trace
from ecanet.errors import ExportError, summarize

__all__ = ["open_int8", "write_int8"]

LAYERS = ("Convolution", "GroupConvolution", "MatMul")
KINDS = {"conv1d": "convolution", "conv2d": "convolution", "conv3d": "convolution", "linear": "linear"}
"""How OpenVINO calls PyTorch's layers: it names every convolution alike."""


def write_int8(network: nn.Module, calibration: Tensor, sample: Tensor, about: About, path: Path) -> dict[str, float]:
    """Write ``network`` in int8 to ``path`` (.xml); return the relative error of each layer's output on ``sample``.

    Raises:
        ExportError: OpenVINO cannot convert it, or NNCF cannot quantise it.
    """
    openvino: Any = importlib.import_module("openvino")
    nncf: Any = importlib.import_module("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    program = trace(network, calibration[:2])
    try:
        with quiet(), redirect_stdout(sys.stderr):  # where NNCF shall say how far it is
            model = openvino.convert_model(program)
            images = nncf.Dataset([calibration[at : at + 1].numpy() for at in range(len(calibration))])
            quantized = nncf.quantize(model, images, subset_size=len(calibration))
            quantized.set_rt_info(about.to_json(), [KEY])
            openvino.save_model(quantized, str(path), compress_to_fp16=False)
    except Exception as error:  # converter and tool raise errors of many classes
        raise ExportError(f"NNCF cannot quantise {type(network).__name__}: {summarize(error)}") from error
    before, after = (_read_outputs(openvino, one, sample) for one in (model, quantized))
    names = _name_layers(program)
    return measure_layers(
        (names.get(name.partition("/")[0], name), torch.as_tensor(after[name]), torch.as_tensor(value))
        for name, value in before.items()
        if name in after
    )


def _name_layers(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Return the module of each layer by OpenVINO's name for it: the operation's, with a number from the second on."""
    counts, names = Counter[str](), dict[str, str]()
    for node in program.graph.nodes:
        kind = str(node.target).removeprefix("aten.").partition(".")[0]
        if kind in KINDS:
            number = counts[KINDS[kind]]
            names[f"{KINDS[kind]}_{number}" if number else KINDS[kind]] = name_module(node)
            counts[KINDS[kind]] += 1
    return names


def open_int8(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the function from images (N, C, H, W) to logits that the file computes in OpenVINO on the CPU.

    What is not in int8 is computed in float32: with the default precision the runtime may refuse an int8 file.
    """
    openvino: Any = importlib.import_module("openvino")
    compiled = _compile(openvino, str(path))
    return lambda images: torch.as_tensor(compiled(images.numpy())[0].copy())


def _compile(openvino: Any, model: Any) -> Any:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return openvino.Core().compile_model(model, "CPU", settings)


def _read_outputs(openvino: Any, model: Any, sample: Tensor) -> dict[str, Any]:
    """Return the output of each convolution and matrix product of ``model`` for the images, by the layer's name."""
    copy = model.clone()
    readers = {
        node.get_friendly_name(): _find_reader(node) for node in copy.get_ops() if node.get_type_name() in LAYERS
    }
    copy.add_outputs([reader.output(0) for reader in readers.values()])
    results = _compile(openvino, copy)(sample.numpy())
    # An operation that is an output already, or that reads two layers, is not added again.
    sources = [port.get_node().input_value(0).get_node().get_friendly_name() for port in copy.outputs]
    return {name: results[sources.index(reader.get_friendly_name())] for name, reader in readers.items()}


def _find_reader(layer: Any) -> Any:
    """Return the operation that takes the output of ``layer``, which is the addition of the bias if there is one.

    The CPU plugin computes other values in an int8 network, also in its logits, if the layer's own output is read.
    """
    readers = [port.get_node() for port in layer.output(0).get_target_inputs()]
    return next((node for node in readers if node.get_type_name() != "Result"), layer)
