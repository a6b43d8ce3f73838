"""`ecanet.export`: the file gives PyTorch's numbers, a bad one is not kept, and mistakes are one line."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import ecanet
from ecanet import deploy, networks
from ecanet.deploy import TARGETS, checking, exporting, onnx_files, programs
from ecanet.deploy.checking import count_missing, time_in_turns
from ecanet.errors import ConfigError, ExportError

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 0)


def small(attention="eca"):
    torch.manual_seed(0)
    return ecanet.create_model("resnet8", attention=attention, num_classes=5).eval()


def test_a_trace_is_checked_beside_pytorch_and_beside_plain(tmp_path):
    model, path = small(), tmp_path / "new" / "model.pt"
    images = networks.Preprocessing(size=32, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0))
    report = ecanet.export(model, path, target="torchscript", example=X, classes=tuple("abcde"), preprocessing=images)
    assert [c.shape for c in report.comparisons] == [(1, 3, 32, 32), (2, 3, 32, 32), (1, 3, 64, 96), (2, 3, 64, 96)]
    assert all(c.passed and c.allowed < 1e-4 for c in report.comparisons)
    assert (report.gates, report.partitions, report.checked) == ({"conv2d": 3}, 1, True)
    assert report.timing is not None
    assert report.timing.rounds == 5
    assert 0 < report.added < 8
    assert json.loads(json.dumps(report.to_dict()))["bytes"] == path.stat().st_size
    extra = {"ecanet.json": ""}
    loaded = torch.jit.load(str(path), _extra_files=extra)
    about = json.loads(extra["ecanet.json"])
    assert (about["classes"], about["mean"], about["colour_order"]) == (list("abcde"), [0.1, 0.2, 0.3], "RGB")
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-5)
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"], "nothing is left beside the file"


class Stubborn(nn.Module):
    """A trace of it is wrong at other sizes: the example's width is written into it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) * float(x.shape[-1])


def test_a_file_that_fails_its_check_is_not_kept(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(ExportError, match=r"outputs at 1x3x64x96 are off by 6\.\de-01, allowed .*not kept") as caught:
        ecanet.export(Stubborn(), path, target="torchscript", example=X)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    path.write_text("an older file")
    with pytest.raises(ExportError):
        ecanet.export(Stubborn(), path, target="torchscript", example=X)
    assert path.read_text() == "an older file"
    report = ecanet.export(Stubborn(), path, target="torchscript", example=X, check=False)
    assert (report.checked, report.notes) == (False, ("not checked",))


def test_a_process_killed_between_two_files_leaves_no_pair_that_does_not_fit(tmp_path, monkeypatch):
    place = tmp_path / "model.xml"
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_text("old")

    def replace_one(part, goal, move=Path.replace):
        monkeypatch.setattr(Path, "replace", kill)
        return move(part, goal)

    def kill(part, goal):
        raise KeyboardInterrupt

    def write():
        with exporting.write_beside(place) as file:
            file.write_text("new")
            file.with_suffix(".bin").write_text("new")

    monkeypatch.setattr(Path, "replace", replace_one)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert {part.name: part.read_text() for part in tmp_path.iterdir()} == {"model.bin": "new"}


class OneSize(nn.Module):
    """A network that takes images of 32 pixels alone."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 5)

    def forward(self, x):
        return self.head(x.flatten(1))


def test_sizes_that_the_network_does_not_take_are_named(tmp_path):
    report = ecanet.export(OneSize(), tmp_path / "model.pt", target="torchscript", example=X)
    assert [c.shape for c in report.comparisons] == [(1, 3, 32, 32), (2, 3, 32, 32)]
    assert report.notes == tuple(f"the network does not take {n}x3x64x96, so it was not checked" for n in (1, 2))


class PoolsLargeMaps(nn.Module):
    """Other steps for large images than for small ones."""

    def __init__(self, limit):
        super().__init__()
        self.conv, self.limit = nn.Conv2d(3, 4, 3), limit

    def forward(self, x):
        x = self.conv(x)
        return (nn.functional.max_pool2d(x, 2) if x.shape[-1] > self.limit else x).mean((2, 3))


@pytest.mark.slow
def test_a_size_on_which_the_steps_depend_stays_fixed():
    for limit, varies in ((50, False), (1, True)):
        program = programs.trace(PoolsLargeMaps(limit), X)
        assert programs.list_varying_axes(program) == (True, varies)


def test_nan_is_never_within_its_bound():
    assert not deploy.Comparison(shape=(1,), error=float("nan"), allowed=1.0).passed
    assert not deploy.Comparison(shape=(1,), error=2.0, allowed=1.0).passed
    assert deploy.Comparison(shape=(1,), error=1.0, allowed=1.0).passed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "tflite"}, r"unknown target 'tflite'; choose onnx, "),
        ({"path": "model.onnx"}, r"model\.onnx must end in \.pt; write .*model\.pt"),
        ({"example": "image"}, r"example must be a batch of images \(N, C, H, W\) in float32, got 'image'"),
        ({"example": X.double()}, r"example must be .* in float32, got a torch\.float64 tensor"),
        ({"example": [X, X]}, r"example must be a batch of images"),
        ({"classes": "cat"}, r"classes must be a sequence of names, got 'cat'"),
        ({"model": 3}, r"export takes a network \(a torch\.nn\.Module\), got 3"),
    ],
)
def test_mistakes_are_one_line(tmp_path, changes, message):
    arguments = {"model": nn.Conv2d(3, 3, 1), "path": "model.pt", "target": "torchscript", "example": X} | changes
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(ConfigError, match=message) as caught:
        ecanet.export(**arguments)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.packages])
def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, tmp_path, name):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    target = TARGETS[name]
    with pytest.raises(ConfigError, match=rf"{name} needs .*: pip install 'ecanet\[{target.extra}\]'"):
        ecanet.export(nn.Conv2d(3, 3, 1), tmp_path / f"m{target.suffix}", target=name, example=X)


def test_detections_are_compared_as_sets():
    exact = torch.tensor([[0, 0, 9, 9.0], [5, 5, 20, 20]]), torch.tensor([1, 2]), torch.tensor([0.9, 0.8])
    swapped = tuple(x.flip(0) for x in exact)
    assert count_missing(exact, swapped) == 0
    moved = exact[0] + torch.tensor([[0.0], [1.0]]), exact[1], exact[2]
    assert count_missing(exact, moved) == 0.5
    assert count_missing(exact, (exact[0], exact[1].flip(0), exact[2])) == 1
    assert count_missing(exact, (exact[0], exact[1], exact[2] - 0.1)) == 1
    assert count_missing(exact, tuple(x[:0] for x in exact)) == 1


def test_a_detector_goes_to_onnx_alone(tmp_path):
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    with pytest.raises(ExportError, match="torchscript takes no detector, .* vary in length; export it to onnx"):
        ecanet.export(detector, tmp_path / "m.pt", target="torchscript", example=[torch.rand(3, 64, 64)])


def test_all_steps_take_turns():
    order = []
    times = time_in_turns({name: lambda name=name: order.append(name) for name in "ab"}, seconds=0)
    assert order == list("ab" + "abba" * 2 + "ab")
    assert [len(values) for values in times.values()] == [5, 5]


@pytest.mark.slow
def test_onnx_runtime_gives_the_same_and_the_metadata_is_there(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    report = ecanet.export(small(), path, target="onnx", example=X, classes=("a", "b", "c", "d", "e"))
    assert len(report.comparisons) == 4
    assert report.added == 6
    model = onnx.load(path)
    (about,) = [json.loads(prop.value) for prop in model.metadata_props if prop.key == "ecanet"]
    assert about["classes"] == ["a", "b", "c", "d", "e"]
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"Shape", "Gather", "Expand", "BatchNormalization", "ReduceMean"}
    assert report.facts["opset"] == model.opset_import[0].version


@pytest.mark.slow
def test_cbam_is_seven_onnx_operations_for_each_of_its_two_gates(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    kinds = {}
    for attention in ("none", "cbam"):
        ecanet.export(small(attention), tmp_path / f"{attention}.onnx", target="onnx", example=X)
        graph = onnx.load(tmp_path / f"{attention}.onnx").graph
        kinds[attention] = Counter(node.op_type for node in graph.node)
    kinds["cbam"].subtract(kinds["none"])
    gates = 3
    channel = {"GlobalAveragePool": 1, "GlobalMaxPool": 1, "Concat": 1, "Conv": 2, "Relu": 1, "Sigmoid": 1, "Mul": 1}
    spatial = {"ReduceMean": 1, "ReduceMax": 1, "Concat": 1, "Conv": 1, "Sigmoid": 1, "Mul": 1}
    both = Counter(channel) + Counter(spatial)
    assert both.total() == 14
    assert +kinds["cbam"] == Counter({kind: gates * count for kind, count in both.items()})


@pytest.mark.parametrize("attribute", ["value", "value_ints"])
def test_a_mean_whose_axes_are_a_node_becomes_a_pool_or_stays_as_it_is(attribute):
    """The older exporter writes the axes as a tensor; another form of constant has no tensor to take."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    value = [2, 3] if attribute == "value_ints" else onnx.numpy_helper.from_array(torch.tensor([2, 3]).numpy())
    nodes = [
        onnx.helper.make_node("Constant", [], ["axes"], **{attribute: value}),
        onnx.helper.make_node("ReduceMean", ["x", "axes"], ["y"]),
    ]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy")
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "graph", [x], [y]),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx_files.use_global_pools(onnx, model.graph)
    assert [node.op_type for node in model.graph.node] == (
        ["GlobalAveragePool"] if attribute == "value" else ["Constant", "ReduceMean"]
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = torch.rand(2, 3, 4, 5)
    (found,) = session.run(None, {"x": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), image.mean((2, 3), keepdim=True))
