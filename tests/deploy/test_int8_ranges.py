"""ExecuTorch: ranges behind ReLU6, biases that keep the means, and training with quantisation through PT2E."""

import importlib

import pytest
import torch
from torch import nn

import ecanet
from ecanet.deploy import quantize_executorch
from ecanet.deploy.programs import trace

pytestmark = [pytest.mark.deploy, pytest.mark.filterwarnings("ignore")]
SCALE = "quantized_decomposed.quantize_per_tensor.default"


def load_tools():
    for package in ("executorch", "torchao"):
        pytest.importorskip(package)
    return importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")


@pytest.mark.parametrize("largest", [6.0, 3.0])
def test_the_range_of_relu6_is_its_own(largest):
    """A convolution that gives values up to 60 before ReLU6: its range in int8 is 0 to 6."""
    tools = load_tools()
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Hardtanh(0, largest), nn.Conv2d(2, 1, 1)).eval()
    nn.init.constant_(net[0].weight, 10.0)
    images = torch.linspace(-6, 6, 64).reshape(1, 1, 8, 8)
    graph = trace(net, images, "nothing").module()
    prepared = tools.prepare_pt2e(graph, quantize_executorch._make_quantizer())
    with torch.no_grad():
        prepared(images)
    nodes = tools.convert_pt2e(prepared).graph.nodes
    (found,) = [node.args for node in nodes if str(node.target) == SCALE and "hardtanh" in node.args[0].name]
    assert found[1] == pytest.approx(largest / 255)
    assert found[2] == -128
    assert not [node for node in nodes if str(node.target) == SCALE and node.args[0].name == "conv2d"]


def test_training_with_quantisation_keeps_every_gate_once():
    tools = load_tools()
    module = importlib.import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    model = ecanet.attach(ecanet.create_model("resnet8", attention="none", num_classes=3)).train()
    gates = {name: p for name, p in model.named_parameters() if ".eca." in name}
    images, labels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    graph = torch.export.export(model, (images,)).module()
    config = module.get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    prepared = tools.prepare_qat_pt2e(graph, module.XNNPACKQuantizer().set_global(config))
    trained = {name: p for name, p in prepared.named_parameters() if ".eca." in name}
    assert trained.keys() == gates.keys()
    before = {name: p.detach().clone() for name, p in trained.items()}
    nn.functional.cross_entropy(prepared(images), labels).backward()
    torch.optim.SGD(prepared.parameters(), 0.1).step()
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    torchao = importlib.import_module("torchao.quantization.pt2e")
    converted = tools.convert_pt2e(prepared)
    torchao.move_exported_model_to_eval(converted)
    sigmoids = [node for node in converted.graph.nodes if node.target == torch.ops.aten.sigmoid.default]
    assert len(sigmoids) == len(gates) == 3
    assert converted(images).isfinite().all()
