"""ONNX for ONNX Runtime on CPUs: products of a map and its gate's factors stay in the runtime's blocked layout.

ONNX Runtime computes convolutions on blocks of channels, and multiplies there too if both operands have one shape. A
gate's factors (N, C, 1, 1) have another, so that the map is laid out anew before the product and after it. Here the
factors are spread over the map by a Resize, which the layout has. Its scales are constants, so the image size is fixed.

Outside of the layout a Resize is slow, so factors are spread only where the map and they have the layout.

A large map is pooled over squares first, and their means afterwards: its global pooling there takes longer than both.
"""

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ecanet.deploy.about import About
from ecanet.deploy.onnx_files import list_inputs, write_graph

__all__ = ["spread_factors", "write_file"]

BLOCK, LARGEST = 8, 16
"""Channels of a block on processors with AVX2, and on those with AVX-512."""
KEEP = {"Relu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "Identity", "BatchNormalization"}
"""Operations that take a value in the layout and leave it there."""
SIGMOIDS = {"Sigmoid", "HardSigmoid"}
FUSED = {"Clip", "LeakyRelu"}
"""Operations that do so behind a convolution alone, which takes them over."""
SQUARE, LARGE = 4, 2048
"""Side of the squares over which a map is pooled first, and the fewest pixels of such a map."""

Shape = list[int | str]


def write_file(network: nn.Module, inputs: Sequence[Tensor], about: About, path: Path) -> dict[str, object]:
    """Write ``network`` to ``path`` for images of the example's size, and return what is worth knowing of the file.

    Raises:
        ExportError: the exporter cannot write it.
    """
    facts = write_graph(network, inputs, about, path, "batch")
    onnx: Any = importlib.import_module("onnx")
    model: Any = onnx.load(str(path))
    count = spread_factors(model)
    onnx.save(model, str(path))
    return {**facts, "products in the blocked layout": count}


def spread_factors(model: Any) -> int:
    """Edit the ONNX ``model`` so that products of a map and factors stay in the layout; return how many do."""
    editor = Editor(model)
    for place, node in enumerate(model.graph.node):
        editor.pool_squares(place, node)
        editor.spread(place, node)
        editor.fuse(place, node)
        editor.layout.follow(node)
    editor.added.sort(key=lambda one: one[0])
    for place, node in reversed(editor.added):
        model.graph.node.insert(place, node)
    return len(editor.products)


class Layout:
    """Which values of a graph have the blocked layout in ONNX Runtime 1.32, found in the order of execution."""

    def __init__(self, onnx: Any, model: Any):
        graph = model.graph
        self.shapes = dict(list_shapes(onnx, model))
        """Of the values in float32 whose every axis has a size, or a name as the batch has."""
        self.weights: dict[str, tuple[int, ...]] = {x.name: tuple(x.dims) for x in graph.initializer}
        self.places = {name: place for place, node in enumerate(graph.node) for name in node.output}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers = Counter([*list_inputs(graph), *(x.name for x in graph.output)])
        self.blocked: set[str] = set()

    def follow(self, node: Any) -> None:
        """Note the layout of what ``node`` computes; those before it have been followed."""
        if self.keeps(node):
            self.blocked.add(node.output[0])

    def keeps(self, node: Any) -> bool:
        """Return whether the result of ``node`` has the layout."""
        kind, channels = node.op_type, self.count_channels(node.output[0])
        inside = [name in self.blocked for name in node.input]
        if kind == "Conv":
            return self.keeps_convolution(node)
        if kind in ("MaxPool", "AveragePool"):
            return channels % LARGEST == 0 and len(node.output) == 1
        if kind in ("GlobalMaxPool", "GlobalAveragePool"):
            return channels % LARGEST == 0 and inside[0]
        if kind in ("Add", "Mul"):
            return all(inside) and self.are_alike(node.input)
        if kind == "Concat":
            aligned = all(self.count_channels(name) % LARGEST == 0 for name in node.input)
            return all(inside) and aligned and node.attribute[0].i == 1
        if kind in FUSED:
            return inside[0] and self.is_convolution_for_one(node.input[0])
        return kind in KEEP and inside[0]

    def keeps_convolution(self, node: Any) -> bool:
        """Return whether a convolution is computed in the layout, which it enters by itself."""
        if not all(name in self.weights for name in node.input[1:]) or len(self.weights[node.input[1]]) != 4:
            return False
        outputs, inputs = self.weights[node.input[1]][:2]
        groups = next((x.i for x in node.attribute if x.name == "group"), 1)
        if groups == 1:
            return outputs % BLOCK == 0 and (inputs < BLOCK or inputs % 4 == 0)
        if (inputs, outputs) == (1, groups):
            return outputs % BLOCK == 0
        return inputs % LARGEST == 0 and outputs // groups % LARGEST == 0

    def is_convolution_for_one(self, name: str) -> bool:
        """Return whether a convolution in the layout computes ``name``, which one operation reads."""
        maker = self.makers.get(name)
        return maker is not None and maker.op_type == "Conv" and name in self.blocked and self.readers[name] == 1

    def are_alike(self, names: Sequence[str]) -> bool:
        """Return whether the values have one known shape."""
        found = [self.shapes.get(name) for name in names]
        return found[0] is not None and all(shape == found[0] for shape in found)

    def count_channels(self, name: str) -> int:
        """Return the number of the channels of a map; 1, which no block has, if it is not known."""
        axes = self.shapes.get(name, [])
        return axes[1] if len(axes) == 4 and isinstance(axes[1], int) else 1


class Editor:
    """A graph, its layout, and the nodes that are added to it."""

    def __init__(self, model: Any):
        self.onnx: Any = importlib.import_module("onnx")
        self.graph: Any = model.graph
        self.layout = Layout(self.onnx, model)
        self.rectified = {node.input[0] for node in self.graph.node if node.op_type == "Relu"}
        self.names = set(list_names(self.graph))
        self.products: set[str] = set()
        self.added: list[tuple[int, Any]] = []
        """Each node, and the place of the one before which it is to stand."""
        self.copies: dict[tuple[object, ...], str] = {}
        """Names of factors in the layout and of spread ones, which several products may read."""

    def pool_squares(self, place: int, node: Any) -> None:
        """Let ``node`` read means of squares, if it is the global pooling of a large map that they fill."""
        value = node.input[0] if node.input else ""
        if node.op_type != "GlobalAveragePool" or value not in self.layout.blocked:
            return
        *head, height, width = self.layout.shapes.get(value, [0, 0])
        if not isinstance(height, int) or not isinstance(width, int):
            return
        if height * width < LARGE or height % SQUARE or width % SQUARE:
            return
        sides = [SQUARE, SQUARE]
        shape = [*head, height // SQUARE, width // SQUARE]
        window = {"kernel_shape": sides, "strides": sides}
        node.input[0] = self.add(place, "AveragePool", [value], self.name(f"{value}_squares"), shape, window)

    def spread(self, place: int, node: Any) -> None:
        """Let ``node`` read factors that are spread over the map, if it is the product of such in the layout."""
        layout = self.layout
        index = find_factors(node, layout.shapes)
        if index is None or node.input[1 - index] not in layout.blocked:
            return
        factors, shape = node.input[index], layout.shapes[node.input[1 - index]]
        if (factors, *shape) not in self.copies:
            inside = factors if factors in layout.blocked else self.bring_back(place, factors)
            self.copies[factors, *shape] = self.resize(place, inside, shape)
        node.input[index] = self.copies[factors, *shape]
        self.products.add(node.output[0])

    def fuse(self, place: int, node: Any) -> None:
        """Let a convolution with 1 take a product and, as ONNX Runtime fuses them, the addition and ReLU behind it.

        It is one pass over memory instead of two. A convolution on the other side of the addition does it already.
        """
        layout = self.layout
        if node.op_type != "Add" or node.output[0] not in self.rectified or layout.readers[node.output[0]] != 1:
            return
        if not all(name in layout.blocked for name in node.input) or not layout.are_alike(node.input):
            return
        if any(layout.is_convolution_for_one(name) for name in node.input):
            return
        for index, name in enumerate(node.input):
            if name in self.products and layout.readers[name] == 1:
                node.input[index] = self.convolve_with_one(place, name)
                return

    def bring_back(self, place: int, factors: str) -> str:
        """Return the name of ``factors`` in the layout, where a convolution with 1 brings them.

        It stands before their sigmoid, which ONNX Runtime then makes a part of it.
        """
        maker = self.layout.makers.get(factors)
        if maker is not None and maker.op_type in SIGMOIDS:
            maker.input[0] = self.convolve_with_one(self.layout.places[factors], maker.input[0])
            self.layout.blocked.add(factors)
            return factors
        if (factors,) not in self.copies:
            self.copies[factors,] = self.convolve_with_one(place, factors)
        return self.copies[factors,]

    def resize(self, place: int, factors: str, shape: Shape) -> str:
        """Return the name of ``factors`` (N, C, 1, 1) spread to the map's ``shape``."""
        name = self.name(f"{factors}_spread")
        scales = self.add_constant(f"{name}_scales", np.array([1, 1, *shape[2:]], np.float32))
        # ONNX infers no batch size behind a Resize, and without one the runtime does not see that the shapes are equal.
        info = self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, shape)
        self.graph.value_info.append(info)
        nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.add(place, "Resize", [factors, "", scales], name, shape, nearest)

    def convolve_with_one(self, place: int, value: str) -> str:
        """Return the name of ``value`` behind a convolution of each channel with 1, which changes no number."""
        name, shape = self.name(f"{value}_blocked"), self.layout.shapes[value]
        ones = self.add_constant(f"{name}_ones", np.ones((int(shape[1]), 1, 1, 1), np.float32))
        return self.add(place, "Conv", [value, ones], name, shape, {"group": shape[1], "kernel_shape": [1, 1]})

    def add(self, place: int, kind: str, inputs: list[str], name: str, shape: Shape, attributes: dict[str, Any]) -> str:
        """Add a node, whose result has the layout, before the one at ``place``, and return the result's name."""
        self.added.append((place, self.onnx.helper.make_node(kind, inputs, [name], name=name, **attributes)))
        self.layout.blocked.add(name)
        self.layout.shapes[name] = shape
        return name

    def add_constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        """Add an initializer, and return its name."""
        self.graph.initializer.append(self.onnx.numpy_helper.from_array(value, self.name(name)))
        return self.graph.initializer[-1].name

    def name(self, wish: str) -> str:
        """Return ``wish``, or a name like it if the graph has that already."""
        while wish in self.names:
            wish += "_"
        self.names.add(wish)
        return wish


def list_shapes(onnx: Any, model: Any) -> Iterator[tuple[str, Shape]]:
    """Yield the names and shapes of the values in float32 whose every axis ONNX can infer."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape: Shape = [axis.dim_param or axis.dim_value for axis in kind.shape.dim]
        if kind.elem_type == onnx.TensorProto.FLOAT and all(shape):
            yield value.name, shape


def list_names(graph: Any) -> Iterator[str]:
    """Yield the names of all that ``graph`` has, and its loops and branches."""
    for named in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        yield named.name
    for node in graph.node:
        yield from node.input
        yield from node.output
        for attribute in node.attribute:
            yield from list_names(attribute.g)


def find_factors(node: Any, shapes: dict[str, Shape]) -> int | None:
    """Return which input of a product holds one factor for each channel of the other; None if neither does."""
    if node.op_type != "Mul":
        return None
    found = [shapes.get(name, []) for name in node.input]
    for index, (factors, values) in enumerate(zip(found, reversed(found), strict=True)):
        if len(factors) != 4 or len(values) != 4 or factors[:2] != values[:2] or factors[2:] != [1, 1]:
            continue
        if values[2:] != [1, 1] and all(isinstance(size, int) for size in values[1:]):
            return index
    return None
