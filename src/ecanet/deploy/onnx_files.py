"""ONNX: written by PyTorch's exporter, checked in ONNX Runtime."""

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ecanet.deploy.about import KEY, About
from ecanet.deploy.programs import Session, Varies, list_varying_axes, quiet, trace
from ecanet.errors import ExportError, summarize
from ecanet.models import is_detector

__all__ = ["list_inputs", "open_file", "write_file", "write_graph"]

INPUT = "images"


def write_file(network: nn.Module, inputs: Sequence[Tensor], about: About, path: Path) -> dict[str, object]:
    """Write ``network`` to ``path`` and return what is worth knowing of the file: opset, and which axes vary.

    Raises:
        ExportError: the exporter cannot write it.
    """
    return write_graph(network, inputs, about, path, "batch and size")


def write_graph(
    network: nn.Module, inputs: Sequence[Tensor], about: About, path: Path, varies: Varies
) -> dict[str, object]:
    """Do what `write_file` does, with a graph in which no more than ``varies`` varies.

    Raises:
        ExportError: the exporter cannot write it.
    """
    onnx: Any = importlib.import_module("onnx")
    export = cast(Any, torch.onnx).export
    axes = (False, False)
    try:
        with quiet():
            if is_detector(network):
                # The newer exporter cannot record how torchvision's detectors select regions.
                export(network, (list(inputs),), str(path), dynamo=False, opset_version=18)
            else:
                program = trace(network, inputs[0], varies)
                axes = list_varying_axes(program)
                written: Any = export(program, dynamo=True, input_names=[INPUT], verbose=False)
                written.save(str(path), external_data=False)
    except (ExportError, OSError):
        raise
    except Exception as error:  # the exporter raises errors of many classes
        raise ExportError(f"PyTorch cannot write {type(network).__name__} as ONNX: {summarize(error)}") from error
    model: Any = onnx.load(str(path))
    use_global_pools(onnx, model.graph)
    onnx.helper.set_model_props(model, {KEY: about.to_json()})
    onnx.save(model, str(path))
    return {"opset": int(model.opset_import[0].version), "batch varies": axes[0], "size varies": axes[1]}


POOLS = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}


def use_global_pools(onnx: Any, graph: Any) -> None:
    """Make each mean and maximum over the two spatial axes a global pool, which ONNX Runtime has in its own layout."""
    name_axes(graph)
    constants = {x.name: x for x in graph.initializer}
    for node in graph.node:
        axes = constants.get(node.input[1]) if node.op_type in POOLS and len(node.input) == 2 else None
        # Without the attribute the axes are kept.
        keeps = all(x.i == 1 for x in node.attribute if x.name == "keepdims")
        if axes is None or not keeps or sorted(onnx.numpy_helper.to_array(axes).tolist()) not in ([2, 3], [-2, -1]):
            continue
        node.op_type = POOLS[node.op_type]
        del node.input[1:], node.attribute[:]
    used = set(list_inputs(graph))
    for constant in [x for x in graph.initializer if x.name not in used]:
        graph.initializer.remove(constant)


def name_axes(graph: Any) -> None:
    """Make the axes of means and maxima initializers, where the older exporter has written a node for each."""
    axes = {node.input[1] for node in graph.node if node.op_type in POOLS and len(node.input) == 2}
    constants = [x for x in graph.node if x.op_type == "Constant" and x.attribute[0].name == "value"]
    for node in [x for x in constants if x.output[0] in axes]:
        graph.initializer.add().CopyFrom(node.attribute[0].t)
        graph.initializer[-1].name = node.output[0]
        graph.node.remove(node)


def list_inputs(graph: Any) -> Iterator[str]:
    """Yield the names that the nodes of ``graph`` read, and those in its loops and branches."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            yield from list_inputs(attribute.g)


def open_file(path: Path) -> Session:
    """Return the file in ONNX Runtime, with as many threads as PyTorch uses.

    On x86 processors without VNNI its sums of int8 saturate at 16 bits, unless it is told not to.
    """
    onnx: Any = importlib.import_module("onnx")
    onnxruntime: Any = importlib.import_module("onnxruntime")

    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    declared = [(x.name, x.shape) for x in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        feed = {name: x.numpy() for (name, _), x in zip(declared, inputs, strict=True)}
        return tuple(torch.as_tensor(y) for y in cast(list[Any], session.run(None, feed)))

    shape = declared[0][1]
    nodes = onnx.load(str(path)).graph.node
    varies = [not isinstance(size, int) for size in shape]
    takes = (varies[0], len(varies) > 2 and all(varies[2:]))
    return Session(run=run, operations=dict(Counter(str(node.op_type) for node in nodes)), takes=takes)
