"""The target `onnxruntime`: products of a map and its factors stay in ONNX Runtime's blocked layout."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import ecanet
from ecanet.deploy import TARGETS, onnx_blocked
from ecanet.deploy.preparation import remove_attention
from ecanet.testing import measure_relative_error
from lively import images, lively

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIDE = 8


def optimise(model, folder):
    """Return the operations of ONNX Runtime's own graph of ``model``, by domain and name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    source = model if isinstance(model, str) else model.SerializeToString()
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def run(model, **inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


@pytest.fixture(scope="module")
def blocked(tmp_path_factory):
    """Skip a test of the runtime's graph on a processor for which ONNX Runtime has no blocked layout."""
    if "ReorderOutput" not in optimise(Graph().conv("x", "y", 3, 16).build("y"), tmp_path_factory.mktemp("plain")):
        pytest.skip("ONNX Runtime has no blocked layout on this processor")


class Graph:
    """A small ONNX graph on images ``x`` (N, 3, 8, 8), written operation by operation."""

    def __init__(self):
        self.nodes, self.constants = [], []
        self.generator = np.random.default_rng(0)

    def constant(self, name, *shape):
        value = self.generator.uniform(-1, 1, shape).astype(np.float32)
        self.constants.append(onnx.numpy_helper.from_array(value, name))
        return self

    def add(self, kind, inputs, output, **attributes):
        self.nodes.append(onnx.helper.make_node(kind, inputs.split(), [output], **attributes))
        return self

    def conv(self, source, output, inputs, outputs, side=3):
        self.constant(f"{output}.weight", outputs, inputs, side, side)
        return self.add("Conv", f"{source} {output}.weight", output, pads=[side // 2] * 4)

    def gate(self, source, factors, channels):
        """Factors of the map ``source`` by a 1 x 1 convolution of its means."""
        self.add("GlobalAveragePool", source, f"{factors}.means")
        return self.conv(f"{factors}.means", f"{factors}.sums", channels, channels, 1).add(
            "Sigmoid", f"{factors}.sums", factors
        )

    def build(self, *outputs, inputs=(("x", ["batch", 3, SIDE, SIDE]),)):
        kind = onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            self.nodes,
            "graph",
            [onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs],
            [onnx.helper.make_tensor_value_info(name, kind, None) for name in outputs],
            self.constants,
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model, full_check=True)
        return model


def spread(model):
    """Edit a copy of ``model``, hold it to be valid and to compute the same; return it and the number of products."""
    edited = type(model)()
    edited.CopyFrom(model)
    count = onnx_blocked.spread_factors(edited)
    onnx.checker.check_model(edited, full_check=True)
    values = [name for node in edited.graph.node for name in node.output]
    assert len(set(values)) == len(values)
    assert len({x.name for x in edited.graph.initializer}) == len(edited.graph.initializer)
    generator = np.random.default_rng(1)
    for batch in (1, 3):
        feed = {
            x.name: generator.standard_normal(
                [axis.dim_value or batch for axis in x.type.tensor_type.shape.dim], dtype=np.float32
            )
            for x in model.graph.input
        }
        for found, expected in zip(run(edited, **feed), run(model, **feed), strict=True):
            # Of the largest value: pooling over squares adds in another order.
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * max(1, np.abs(expected).max()))
    return SimpleNamespace(model=edited, count=count, kinds=Counter(node.op_type for node in edited.graph.node))


def plain(channels=16):
    """A graph with the map ``m``."""
    return Graph().conv("x", "m", 3, channels)


def gated(channels=16):
    """A graph whose value ``p`` is the product of the map ``m`` and its factors ``f``."""
    return plain(channels).gate("m", "f", channels).add("Mul", "m f", "p")


class Wide(nn.Module):
    """A user's network, which takes images of 32 pixels alone: its gate is a kernel over 384 channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 384, 8, 8), nn.Sequential(nn.Conv2d(384, 384, 1), ecanet.ECA(384))
        self.head = nn.Linear(384 * 16, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.block(x)).relu().flatten(1))


NETWORKS = {
    "eca": (lambda: ecanet.create_model("resnet8", attention="eca", num_classes=10), 32, 3),
    "se": (lambda: ecanet.create_model("resnet8", attention="se", num_classes=10), 32, 3),
    "wide": (Wide, 32, 1),
}


@pytest.mark.parametrize("name", ["eca", pytest.param("se", marks=pytest.mark.slow), "wide"])
def test_the_products_of_a_network_stay_in_the_layout(blocked, tmp_path, name):
    build, side, gates = NETWORKS[name]
    torch.manual_seed(0)
    model, path = lively(build()), tmp_path / "model.onnx"
    report = ecanet.export(model, path, target="onnxruntime", example=images(1, side), check=False)
    facts = {"batch varies": True, "size varies": False, "products in the blocked layout": gates}
    assert {key: value for key, value in report.facts.items() if key != "opset"} == facts
    assert report.gates == {"mixed": gates}
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = TARGETS["onnxruntime"].open(path)
    assert session.takes == (True, False)
    for batch in (1, 3):
        x = images(batch, side)
        with torch.no_grad():
            expected = model(x)
            assert measure_relative_error([remove_attention(model)(x)], [expected]) > 1e-2, (
                "it would pass without gates"
            )
        assert measure_relative_error(session.run([x]), [expected]) < 1e-5
    kinds = optimise(str(path), tmp_path)
    # The last map leaves the layout. A wide kernel takes means from it, has one channel itself, and its sums come back;
    # SE's few hidden channels are read outside of it.
    assert (kinds["ReorderInput"], kinds["ReorderOutput"]) == {"eca": (0, 1), "se": (0, 1 + gates), "wide": (1, 3)}[
        name
    ]
    assert (kinds["Upsample"], kinds["Mul"]) == (gates, gates)
    assert not kinds["Resize"] + kinds["Add"] + kinds["Relu"] + kinds["Sigmoid"], "they are parts of convolutions"


def test_a_product_of_a_map_and_its_factors_is_spread(blocked, tmp_path):
    model = gated().conv("p", "y", 16, 4).build("y")
    found = spread(model)
    assert (found.count, found.kinds["Resize"]) == (1, 1)
    kinds = optimise(found.model, tmp_path)
    assert (kinds["Upsample"], kinds["ReorderInput"], kinds["ReorderOutput"]) == (1, 0, 1)
    assert optimise(model, tmp_path)["ReorderInput"] == 1


def multiply(graph, operands, **options):
    return graph.add("Mul", operands, "p").build("p", **options)


WIDE_IMAGES = [("x", ["batch", 16, SIDE, SIDE])]
UNTOUCHED = {
    "12 channels": gated(12).build("p"),
    "a spatial gate": multiply(plain().conv("m", "s", 16, 1).add("Sigmoid", "s", "f"), "m f"),
    "constants": multiply(plain().constant("f", 1, 16, 1, 1), "m f"),
    "computed constants": multiply(plain().constant("c", 1, 16, 1, 1).add("Sigmoid", "c", "f"), "m f"),
    "one factor for all channels": multiply(plain().gate("m", "g", 16).conv("g", "f", 16, 1, 1), "m f"),
    "a map outside of the layout": multiply(plain().gate("m", "f", 16).add("Erf", "m", "e"), "e f"),
    "the images are the map": multiply(Graph().gate("x", "f", 16), "x f", inputs=WIDE_IMAGES),
    "a product of factors": plain().gate("m", "f", 16).gate("m", "g", 16).add("Mul", "f g", "p").build("p"),
    "images of any size": gated().build("p", inputs=[("x", ["batch", 3, "height", "width"])]),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_other_products_are_left_alone(name):
    model = UNTOUCHED[name]
    edited = type(model)()
    edited.CopyFrom(model)
    assert onnx_blocked.spread_factors(edited) == 0
    assert edited == model


def of_size(height, width):
    return [("x", ["batch", 3, height, width])]


def test_a_large_map_is_pooled_over_squares_first(blocked, tmp_path):
    found = spread(gated().conv("p", "y", 16, 4).build("y", inputs=of_size(48, 64)))
    assert (found.count, found.kinds["AveragePool"], found.kinds["GlobalAveragePool"]) == (1, 1, 1)
    kinds = optimise(found.model, tmp_path)
    assert (kinds["AveragePool"], kinds["ReorderInput"], kinds["ReorderOutput"]) == (1, 0, 1)


POOLED_ONCE = {
    "a small map": gated().build("p", inputs=of_size(32, 60)),
    "squares do not fill its height": gated().build("p", inputs=of_size(50, 64)),
    "squares do not fill its width": gated().build("p", inputs=of_size(64, 50)),
    "outside of the layout": plain().add("Erf", "m", "e").gate("e", "f", 16).build("f", inputs=of_size(64, 64)),
    "any size": gated().build("p", inputs=of_size("height", 64)),
}


@pytest.mark.parametrize("name", POOLED_ONCE)
def test_other_maps_are_pooled_once(name):
    edited = type(POOLED_ONCE[name])()
    edited.CopyFrom(POOLED_ONCE[name])
    onnx_blocked.spread_factors(edited)
    assert "AveragePool" not in {node.op_type for node in edited.graph.node}


def rectify(graph, operands):
    return graph.add("Add", operands, "s").add("Relu", "s", "r")


def shortcut(graph):
    """Add a map ``b`` behind a convolution and its ReLU."""
    return graph.conv("x", "a", 3, 16).add("Relu", "a", "b")


def residual():
    """A product, a shortcut ``b`` that a convolution reads too, and their rectified sum ``r``."""
    return rectify(shortcut(gated()).conv("b", "c", 16, 16), "b p")


def test_a_convolution_takes_addition_and_relu_behind_a_product(blocked, tmp_path):
    model = residual().conv("r", "y", 16, 4).build("y", "c")
    found = spread(model)
    assert found.kinds["Conv"] == Counter(node.op_type for node in model.graph.node)["Conv"] + 1
    kinds = optimise(found.model, tmp_path)
    assert (kinds["Add"], kinds["Relu"]) == (0, 0)
    assert kinds["ReorderInput"] == 0


ALREADY = {
    "the sum is an output": residual().build("r", "s", "c"),
    "another operation reads the sum": residual().add("Erf", "s", "e").build("r", "e", "c"),
    "the product is an output": residual().build("r", "p", "c"),
    "a convolution on the other side": rectify(gated().conv("x", "a", 3, 16), "a p").build("r"),
    "no ReLU": shortcut(gated()).add("Add", "b p", "s").build("s"),
    "an addition to itself": rectify(gated(), "p p").build("r"),
    "a constant of another shape": rectify(gated().constant("b", 16, 1, 1), "p b").build("r"),
    "a map outside of the layout": rectify(shortcut(gated()).add("Erf", "b", "e"), "p e").build("r"),
}


@pytest.mark.parametrize("name", ALREADY)
def test_additions_that_gain_nothing_get_no_convolution(name):
    found = spread(ALREADY[name])
    before = Counter(node.op_type for node in ALREADY[name].graph.node)
    assert (found.count, found.kinds) == (1, before + Counter({"Resize": 1}))


def test_a_sum_of_two_products_gets_one_convolution(blocked, tmp_path):
    graph = gated().conv("x", "n", 3, 16).gate("n", "g", 16).add("Mul", "n g", "q")
    found = spread(rectify(graph, "p q").conv("r", "y", 16, 4).build("y"))
    assert (found.count, found.kinds["Resize"], found.kinds["Conv"]) == (2, 2, 6)
    kinds = optimise(found.model, tmp_path)
    assert (kinds["Add"], kinds["Relu"], kinds["Mul"]) == (0, 0, 2)


def test_a_sigmoid_outside_of_the_layout_becomes_part_of_a_convolution(blocked, tmp_path):
    """A grouped convolution of two channels each has no layout. Other readers of the factors have the same values."""
    graph = plain().add("GlobalAveragePool", "m", "a").constant("w", 16, 2, 1, 1).add("Conv", "a w", "s", group=8)
    graph.add("Sigmoid", "s", "f").add("Mul", "m f", "p").conv("p", "q", 16, 16).add("Mul", "f q", "r")
    found = spread(graph.conv("r", "y", 16, 4).add("Flatten", "f", "z").add("Flatten", "s", "t").build("y", "z", "t"))
    assert (found.count, found.kinds["Resize"], found.kinds["Conv"]) == (2, 1, 5)
    kinds = optimise(found.model, tmp_path)
    assert (kinds["Upsample"], kinds["Resize"], kinds["Sigmoid"]) == (1, 0, 0)


def test_added_nodes_stand_before_their_readers():
    """The second product adds a convolution before its sigmoid, which stands before the first product."""
    graph = plain().add("GlobalAveragePool", "m", "a").constant("w", 16, 2, 1, 1).add("Conv", "a w", "s", group=8)
    graph.add("Sigmoid", "s", "f").gate("m", "g", 16).add("Mul", "m g", "p").conv("p", "q", 16, 16)
    assert spread(graph.add("Mul", "q f", "y").build("y")).count == 2


def test_factors_from_elsewhere_come_back_once(blocked, tmp_path):
    inputs = [("x", ["batch", 3, SIDE, SIDE]), ("f", ["batch", 16, 1, 1])]
    graph = plain().add("Mul", "m f", "p").add("MaxPool", "p", "q", kernel_shape=[2, 2]).add("Mul", "f q", "r")
    found = spread(graph.conv("r", "y", 16, 4).build("y", inputs=inputs))
    assert (found.count, found.kinds["Resize"], found.kinds["Conv"]) == (2, 2, 3)
    kinds = optimise(found.model, tmp_path)
    assert (kinds["Upsample"], kinds["Resize"]) == (2, 0)


def test_factors_of_maps_of_two_sizes_are_spread_twice():
    graph = gated().add("MaxPool", "p", "q", kernel_shape=[2, 2], strides=[2, 2]).add("Mul", "q f", "y")
    found = spread(graph.build("y", "p"))
    assert (found.count, found.kinds["Resize"]) == (2, 2)


def test_a_batch_size_without_a_name_varies():
    assert spread(gated().build("p", inputs=[("x", [None, 3, SIDE, SIDE])])).count == 1


def test_names_that_the_graph_has_are_not_taken():
    graph = plain().gate("m", "f", 16).add("Erf", "f", "f_spread").add("Mul", "m f", "p")
    graph.constant("f_spread__scales", 1).add("Add", "p f_spread__scales", "s")
    found = spread(graph.build("s", "f_spread"))
    assert [node.output[0] for node in found.model.graph.node if node.op_type == "Resize"] == ["f_spread_"]
    assert {x.name for x in found.model.graph.initializer} >= {"f_spread__scales", "f_spread__scales_"}


KEEPING = {
    "Relu": lambda g: g.add("Relu", "n", "k"),
    "Sigmoid": lambda g: g.add("Sigmoid", "n", "k"),
    "Tanh": lambda g: g.add("Tanh", "n", "k"),
    "HardSigmoid": lambda g: g.add("HardSigmoid", "n", "k"),
    "HardSwish": lambda g: g.add("HardSwish", "n", "k"),
    "Gelu": lambda g: g.add("Gelu", "n", "k"),
    "SiLU": lambda g: g.add("Sigmoid", "n", "o").add("Mul", "n o", "k"),
    "Clip behind a convolution": lambda g: g.constant("low").add("Clip", "m low", "k"),
    "LeakyRelu behind a convolution": lambda g: g.add("LeakyRelu", "m", "k"),
    "MaxPool": lambda g: g.add("MaxPool", "n", "k", kernel_shape=[2, 2]),
    "Add": lambda g: g.add("Add", "n m", "k"),
    "Concat": lambda g: g.add("Concat", "n m", "k", axis=1),
    "a depthwise convolution": lambda g: g.constant("w", 16, 1, 3, 3).add("Conv", "m w", "k", group=16),
}
LEAVING = {
    "Clip behind a product": lambda g: g.constant("low").add("Clip", "n low", "k"),
    "LeakyRelu behind a product": lambda g: g.add("LeakyRelu", "n", "k"),
    "Elu": lambda g: g.add("Elu", "n", "k"),
    "a product with a number": lambda g: g.constant("c").add("Mul", "n c", "k"),
    "a sum with other shapes": lambda g: g.constant("c", 16, 1, 1).add("Add", "n c", "k"),
    "groups of two channels": lambda g: g.constant("w", 16, 2, 1, 1).add("Conv", "m w", "k", group=8),
    "a convolution of 10 channels": lambda g: g.conv("n", "l", 16, 10).conv("l", "k", 10, 16),
    "a convolution with a computed kernel": lambda g: (
        g.constant("c", 16, 16, 1, 1).add("Relu", "c", "w").add("Conv", "n w", "k")
    ),
}


def behind(operation):
    """A graph with a product whose map ``k`` comes from the convolution ``m`` or the product ``n``."""
    graph = operation(plain().conv("x", "u", 3, 16).conv("x", "v", 3, 16).add("Mul", "u v", "n"))
    channels = 32 if graph.nodes[-1].op_type == "Concat" else 16
    return graph.gate("k", "f", channels).add("Mul", "k f", "p").conv("p", "y", channels, 4).build("y")


@pytest.mark.parametrize("name", KEEPING)
def test_a_map_in_the_layout_is_multiplied_there(blocked, tmp_path, name):
    """ONNX Runtime 1.32 has no step then that lays a map out anew, but for the outputs."""
    found = spread(behind(KEEPING[name]))
    assert found.count == 1
    kinds = optimise(found.model, tmp_path)
    assert (kinds["Upsample"], kinds["Resize"], kinds["ReorderInput"], kinds["ReorderOutput"]) == (1, 0, 0, 1)


@pytest.mark.parametrize("name", LEAVING)
def test_a_map_outside_of_the_layout_is_multiplied_as_it_was(name):
    assert spread(behind(LEAVING[name])).count == 0
