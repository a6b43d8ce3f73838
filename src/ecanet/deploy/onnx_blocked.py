"""ONNX for ONNX Runtime on CPUs: products of a map and its gate's factors stay in the runtime's blocked layout.

ONNX Runtime computes convolutions on blocks of channels, and multiplies there too if both operands have one shape. A
gate's factors (N, C, 1, 1) have another, so that the map is laid out anew before the product and after it. Here the
factors are spread over the map by a Resize, which the layout has. Its scales are constants, so the image size is fixed.
"""

import importlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ecanet.deploy.about import About
from ecanet.deploy.onnx_files import list_inputs, write_graph

__all__ = ["write_file"]

BLOCK = 8
"""Channels of the smallest block; a map whose channels are no multiple of it has no blocked layout."""
BLOCKED = {"Conv", "GlobalAveragePool", "GlobalMaxPool", "Add", "Mul"}
"""Operations whose results have the layout, and so have those of an activation behind them."""
ACTIVATIONS = {"Sigmoid", "HardSigmoid"}
FLOAT = 1
"""ONNX's number of float32."""

Shape = list[int | str]


def write_file(network: nn.Module, inputs: Sequence[Tensor], about: About, path: Path) -> dict[str, object]:
    """Write ``network`` to ``path`` for images of the example's size, and return what is worth knowing of the file.

    Raises:
        ExportError: the exporter cannot write it.
    """
    facts = write_graph(network, inputs, about, path, "batch")
    onnx: Any = importlib.import_module("onnx")
    model: Any = onnx.load(str(path))
    products = spread_factors(onnx, model)
    fuse_relus(onnx, model.graph, products)
    onnx.save(model, str(path))
    return {**facts, "products in the blocked layout": len(products)}


def spread_factors(onnx: Any, model: Any) -> dict[str, int]:
    """Spread the factors of each product of a map with one factor for each channel.

    Returns the number of channels of each such product, by the name of its result.
    """
    graph, shapes = model.graph, infer_shapes(onnx, model)
    makers = {name: node for node in graph.node for name in node.output}
    products: dict[str, int] = {}
    for node in list(graph.node):
        index = find_factors(node, shapes)
        if index is None:
            continue
        shape, activation = shapes[node.input[1 - index]], makers.get(node.input[index])
        products[node.output[0]] = channels = int(shape[1])
        if activation is not None and activation.op_type in ACTIVATIONS:
            maker = makers.get(activation.input[0])
            if maker is None or maker.op_type not in BLOCKED:
                convolve_with_one(onnx, graph, activation, 0, channels)
        spread(onnx, graph, node, index, shape)
    return products


def infer_shapes(onnx: Any, model: Any) -> dict[str, Shape]:
    """Return the shape of each value that ONNX can infer, with a name for the batch size."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info)
    }


def find_factors(node: Any, shapes: dict[str, Shape]) -> int | None:
    """Return which input of a product holds one factor for each channel of the other; None if neither does."""
    if node.op_type != "Mul":
        return None
    found = [shapes.get(name, []) for name in node.input]
    for index, (factors, values) in enumerate(zip(found, reversed(found), strict=True)):
        if len(factors) != 4 or len(values) != 4 or factors[:2] != values[:2] or factors[2:] != [1, 1]:
            continue
        _, channels, *sides = values
        known = all(isinstance(side, int) and side > 0 for side in sides)
        if known and sides != [1, 1] and isinstance(channels, int) and channels % BLOCK == 0:
            return index
    return None


def spread(onnx: Any, graph: Any, product: Any, index: int, shape: Shape) -> None:
    """Let ``product`` read its factors, its input number ``index``, from a Resize to the map's ``shape``."""
    name = f"{product.output[0]}_spread"
    scales = onnx.numpy_helper.from_array(np.array([1, 1, *shape[2:]], np.float32), f"{name}_scales")
    graph.initializer.append(scales)
    # ONNX infers no batch size behind a Resize, and without one the runtime does not see that the shapes are equal.
    graph.value_info.append(onnx.helper.make_tensor_value_info(name, FLOAT, shape))
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    inputs = [product.input[index], "", scales.name]
    insert(graph, onnx.helper.make_node("Resize", inputs, [name], name=name, **nearest), product)
    product.input[index] = name


def fuse_relus(onnx: Any, graph: Any, products: dict[str, int]) -> None:
    """Let a convolution with 1 take a product and, as ONNX Runtime fuses them, the addition and the ReLU behind it.

    It is one pass over memory instead of two. A convolution on the other side of the addition does it already.
    """
    readers = Counter(list_inputs(graph))
    makers = {name: node for node in graph.node for name in node.output}
    rectified = {node.input[0] for node in graph.node if node.op_type == "Relu"}
    for node in list(graph.node):
        if node.op_type != "Add" or node.output[0] not in rectified or readers[node.output[0]] > 1:
            continue
        alone = [name for name in node.input if readers[name] == 1]
        if any(name in makers and makers[name].op_type == "Conv" for name in alone):
            continue
        index = next((i for i, name in enumerate(node.input) if name in products and name in alone), None)
        if index is not None:
            convolve_with_one(onnx, graph, node, index, products[node.input[index]])


def convolve_with_one(onnx: Any, graph: Any, node: Any, index: int, channels: int) -> None:
    """Let ``node`` read its input number ``index`` from a convolution of each channel with 1, which changes no value."""
    name = f"{node.output[0]}_blocked"
    ones = onnx.numpy_helper.from_array(np.ones((channels, 1, 1, 1), np.float32), f"{name}_ones")
    graph.initializer.append(ones)
    inputs = [node.input[index], ones.name]
    insert(graph, onnx.helper.make_node("Conv", inputs, [name], name=name, group=channels, kernel_shape=[1, 1]), node)
    node.input[index] = name


def insert(graph: Any, new: Any, before: Any) -> None:
    """Put the node ``new`` before another of ``graph``, whose nodes stand in the order of execution."""
    graph.node.insert(next(i for i, node in enumerate(graph.node) if node is before or node == before), new)
