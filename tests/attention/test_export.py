"""Exports: the same numbers at other sizes, and gates of seven plain nodes without a shape among them."""

from collections import Counter

import pytest
import torch
import torchvision

import ecanet

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MODELS = {
    "attached": lambda: ecanet.attach(torchvision.models.resnet18()),
    "built": lambda: ecanet.create_model("resnet18"),
    "folded": lambda: ecanet.fold(ecanet.attach(torchvision.models.resnet18())),
}
GATE = {"ReduceMean": 1, "Unsqueeze": 2, "Conv": 1, "Squeeze": 1, "Sigmoid": 1, "Mul": 1}


def lively(model):
    """``model`` in evaluation, its gates far from neutral."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".eca." in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return model.eval()


def exported(model, path, dynamo):
    x = torch.randn(2, 3, 40, 40)
    if dynamo:
        sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=(sizes,), external_data=False, verbose=False)
    else:
        axes = {"x": {0: "n", 2: "h", 3: "w"}}
        torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


# The other exporter is in the default run below, where nodes are counted.
@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("name", ["attached", "built", pytest.param("folded", marks=pytest.mark.slow)])
def test_onnx_runtime_gives_the_same_at_other_sizes(tmp_path, name, dynamo):
    torch.manual_seed(0)
    model = lively(MODELS[name]())
    session = exported(model, tmp_path / "model.onnx", dynamo)
    for shape in ((1, 3, 40, 40), (3, 3, 56, 40)):
        x = torch.randn(shape)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attached", "built"])
def test_a_gate_adds_seven_nodes(tmp_path, name):
    torch.manual_seed(0)
    counts = []
    for model in (torchvision.models.resnet18().eval(), lively(MODELS[name]())):
        exported(model, tmp_path / "model.onnx", True)
        counts.append(Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node))
    added = counts[1] - counts[0]
    if name == "attached":
        assert added.pop("Mul") == 16  # the gain that makes it lossless, which `fold` takes away
        assert added == Counter({key: 8 * n for key, n in GATE.items() if key != "Mul"})
    else:
        assert added == Counter({key: 8 * n for key, n in GATE.items()})
    assert not {"Shape", "Gather", "Expand"} & set(counts[1])
