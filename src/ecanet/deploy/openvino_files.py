"""OpenVINO: converted from the graph of `torch.export`, checked in OpenVINO's CPU plugin in float32."""

import importlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecanet.deploy.about import KEY, About
from ecanet.deploy.programs import Session, list_varying_axes, quiet, trace
from ecanet.errors import ExportError, summarize

__all__ = ["open_file", "write_file"]

LAYOUT_CHANGES = ("Reorder", "Convert")
"""Layers that the runtime adds between two that want another layout or precision."""
PASSIVE = ("Input", "Output", "Const")


def write_file(network: nn.Module, inputs: Sequence[Tensor], about: About, path: Path) -> dict[str, object]:
    """Write ``network`` to ``path`` (.xml) and its weights in float32 beside it (.bin).

    Raises:
        ExportError: OpenVINO cannot convert it.
    """
    openvino: Any = importlib.import_module("openvino")
    program = trace(network, inputs[0])
    batch, size = list_varying_axes(program)
    varies = [batch, False, *(size for _ in inputs[0].shape[2:])]
    shape = [-1 if free else length for free, length in zip(varies, inputs[0].shape, strict=True)]
    try:
        with quiet():
            model = openvino.convert_model(program)
            model.reshape(openvino.PartialShape(shape))  # as converted, it takes sizes that its steps do not fit
            model.set_rt_info(about.to_json(), [KEY])
            openvino.save_model(model, str(path), compress_to_fp16=False)
    except Exception as error:  # the converter raises errors of many classes
        raise ExportError(f"OpenVINO cannot convert {type(network).__name__}: {summarize(error)}") from error
    return {"openvino": str(openvino.__version__), "batch varies": batch, "size varies": size}


def open_file(path: Path) -> Session:
    """Return the file in OpenVINO on the CPU, with as many threads as PyTorch uses.

    The precision hint is float32: without it some processors compute in bfloat16 or float16.
    """
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32", **threads})
    default = core.compile_model(str(path), "CPU", threads)
    shape = compiled.input(0).partial_shape
    varies = [bool(axis.is_dynamic) for axis in shape]
    kinds = [str(layer.get_rt_info()["layerType"].value) for layer in compiled.get_runtime_model().get_ops()]
    counts = Counter(kind for kind in kinds if kind not in PASSIVE)
    return Session(
        run=make_runner(compiled),
        operations=dict(counts),
        stray=sum(counts[kind] for kind in LAYOUT_CHANGES),
        takes=(varies[0], len(varies) > 2 and all(varies[2:])),
        default=(default.get_property("INFERENCE_PRECISION_HINT").get_type_name(), make_runner(default)),
    )


def make_runner(compiled: Any) -> Any:
    """Return the function from inputs to outputs of a compiled model."""
    request = compiled.create_infer_request()

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        results = request.infer([x.numpy() for x in inputs])
        return tuple(torch.as_tensor(results[i].copy()) for i in range(len(results)))

    return run
