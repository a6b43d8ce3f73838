"""PP-OCR's networks, which come from ONNX as graphs: gates, squeeze-excite replaced by ECA, and back to ONNX."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import ecanet

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
onnx2torch = pytest.importorskip("onnx2torch", reason="onnx2torch turns the networks into graphs (extra sweep)")
if importlib.util.find_spec("rapidocr_onnxruntime") is None:
    pytest.skip("rapidocr-onnxruntime holds the networks (extra sweep)", allow_module_level=True)

NETWORKS = {  # file, image, residual branches, squeeze-excite
    "classifier": ("ch_ppocr_mobile_v2.0_cls_infer.onnx", (1, 3, 48, 192), 11, 9),
    "detector": ("ch_PP-OCRv4_det_infer.onnx", (1, 3, 96, 96), 8, 10),
}


def load(name):
    """Return the graph, an image, and the numbers of residual branches and of squeeze-excite."""
    file, shape, branches, count = NETWORKS[name]
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    model = onnx.load(Path(spec.submodule_search_locations[0]) / "models" / file)
    # onnx2torch reads no numbers from nodes.
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    for node in constants:
        tensor = node.attribute[0].t
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
        model.graph.node.remove(node)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    graph = onnx2torch.convert(model).eval()
    *_, (last, module) = graph.named_modules()
    if isinstance(module, nn.Sigmoid):  # the detector's numbers behind it are 1e-11, and 0 in ONNX Runtime
        graph.set_submodule(last, nn.Identity())
    return graph, image, branches, count


def run(model, image):
    with torch.no_grad():
        return model(image)


def measure_change(y, before):
    """Return the largest difference relative to the largest output."""
    return float((y - before).abs().max() / before.abs().max())


def run_in_onnxruntime(model, image, path):
    # The exporter by tracing: the other one cannot follow the shapes that onnx2torch's modules read from tensors.
    torch.onnx.export(model, (image,), path, dynamo=False, input_names=["x"])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": image.numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_gates_change_nothing_and_survive_onnx(name, tmp_path):
    graph, image, branches, _ = load(name)
    plain, keys = run(graph, image), list(graph.state_dict())
    ecanet.attach(graph, "eca", example=image)
    assert len(ecanet.attached(graph)) == branches
    assert torch.equal(run(graph, image), plain)
    torch.manual_seed(0)
    for site in ecanet.attached(graph):  # a file without neutral gates would not be missed
        nn.init.normal_(graph.get_submodule(site.name).conv.weight)
    trained = run(graph, image)
    assert measure_change(trained, plain) > 1e-3
    given = run_in_onnxruntime(graph, image, tmp_path / "attached.onnx")
    assert measure_change(given, trained) < 1e-5
    assert torch.equal(run(ecanet.detach(graph), image), plain)
    assert list(graph.state_dict()) == keys


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_squeeze_excite_gives_way_and_eca_survives_onnx(name, tmp_path):
    graph, image, _, count = load(name)
    plain, keys, size = run(graph, image), list(graph.state_dict()), sum(p.numel() for p in graph.parameters())
    ecanet.attach(graph, "eca", replace="se", example=image)
    sites = ecanet.attached(graph)
    assert [site.calls for site in sites] == [1] * count
    assert sum(p.numel() for p in graph.parameters()) < size
    changed = run(graph, image)
    assert measure_change(changed, plain) > 1e-3
    given = run_in_onnxruntime(graph, image, tmp_path / "eca.onnx")
    assert measure_change(given, changed) < 1e-5
    assert torch.equal(run(ecanet.detach(graph), image), plain)
    assert list(graph.state_dict()) == keys
