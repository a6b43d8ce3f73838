"""What people do to a network after attach: each tool keeps exactly one act of every gate, or is refused in one line.

docs/proof.md has a table of these tools; `test_the_table_names_every_tool` holds the two together.
"""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.ao.quantization as quantization
from lightning import LightningModule, Trainer
from torch import fx, nn
from torch.ao.quantization import quantize_fx
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader
from torchvision.models import ResNet, mobilenet_v2, resnet18
from torchvision.models.quantization import resnet18 as quantizable_resnet18
from torchvision.models.resnet import BasicBlock

import ecanet
from ecanet.errors import ConfigError

IMAGE = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
PAGE = Path(__file__).parents[2] / "docs" / "proof.md"

# torch.ao.quantization is about to move to torchao, which every call says.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*quantization.*",
    "ignore:.*torchao.*",
    "ignore:Please use quant_min",
    "ignore:must run observer",
    "ignore:torch.quantize_per",
    "ignore:.*LeafSpec.*",
    "ignore:.*weight_norm.*",
)


def attach(model=None):
    """Return a network with gates that do something, in evaluation mode, and its output."""
    torch.manual_seed(0)
    model = ecanet.attach((model or resnet18(num_classes=10)).eval())
    for site in ecanet.attached(model):
        nn.init.normal_(model.get_submodule(site.name).conv.weight)
    return model, model(IMAGE).detach()  # with gradients, as it is compared: without, sums have another order


def count_acts(model, run=None):
    """Return how often each gate runs in one forward, counted at the gates themselves."""
    acts, handles = {}, []
    for name, gate in model.named_modules():
        if isinstance(gate, ecanet.ECA):
            acts[name] = 0
            note = lambda *_, name=name: acts.update({name: acts[name] + 1})  # noqa: E731
            handles.append(gate.register_forward_hook(note))
    (run or model)(IMAGE)
    for handle in handles:
        handle.remove()
    return list(acts.values())


def count_in_graph(graph):
    """Return the number of sigmoids in a graph: the gates of a ResNet with ECA are its only ones."""
    return sum("sigmoid" in str(node.target) for node in graph.nodes if node.op != "placeholder")


def assert_same(model, expected, bound=1e-5):
    assert count_acts(model) == [1] * 8
    torch.testing.assert_close(model(IMAGE), expected, rtol=bound, atol=bound)


# quantisation


def check_fuse_modules():
    model, expected = attach()
    fused = quantization.fuse_modules(model, [["layer1.0.conv2", "layer1.0.bn2"], ["layer2.0.conv2", "layer2.0.bn2"]])
    assert type(fused.layer1[0].bn2) is nn.Identity
    assert_same(fused, expected)


def check_fuse_model():
    model, expected = attach(quantizable_resnet18(quantize=False, num_classes=10))
    model.fuse_model()
    assert_same(model, expected)


def check_prepare_qat():
    model, _ = attach(quantizable_resnet18(quantize=False, num_classes=10))
    model.train().fuse_model(is_qat=True)
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    prepared = quantization.prepare_qat(model)
    assert type(prepared.layer1[0].conv1) is torch.ao.nn.qat.Conv2d
    assert count_acts(prepared) == [1] * 8
    prepared(IMAGE).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())


def check_prepare_and_convert():
    model, expected = attach(quantizable_resnet18(quantize=False, num_classes=10))
    model.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(model)
    assert_same(prepared, expected)
    converted = quantization.convert(prepared)
    with pytest.raises(ConfigError) as refused:
        converted(IMAGE)
    assert "\n" not in str(refused.value)
    assert "quint8" in str(refused.value)


def check_prepare_fx():
    model, expected = attach()
    prepared = quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping("x86"), (IMAGE,))
    assert count_in_graph(prepared.graph) == 8
    torch.testing.assert_close(prepared(IMAGE), expected)
    converted = quantize_fx.convert_fx(prepared)
    assert count_in_graph(converted.graph) == 8
    assert (converted(IMAGE) - expected).abs().max() < 0.5 * expected.abs().max()


def check_export():
    model, expected = attach(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10))
    exported = torch.export.export(model, (IMAGE,))  # what PT2E quantisation starts from
    assert count_in_graph(exported.graph) == 4
    torch.testing.assert_close(exported.module()(IMAGE), expected)
    assert {f"{site.name}.conv.weight" for site in ecanet.attached(model)} <= exported.state_dict.keys()


# other modules in the places


def check_sync_batchnorm():
    model, expected = attach()
    assert_same(nn.SyncBatchNorm.convert_sync_batchnorm(model), expected, 0)


class LowRank(nn.Module):
    """An adapter: the frozen layer and two small ones beside it, which start at zero."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = nn.Conv2d(layer.in_channels, 2, 1, layer.stride), nn.Conv2d(2, layer.out_channels, 1)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def check_adapters():
    model, expected = attach()
    for block in (*model.layer1, *model.layer2):
        block.conv2 = LowRank(block.conv2)
    assert_same(model, expected)
    sites = ecanet.attached(model)
    gate = model.get_submodule(sites[0].name)
    gate.conv = nn.utils.parametrizations.weight_norm(gate.conv)  # an adapter of the gate itself
    assert_same(model, expected)


def check_pruning():
    model, _ = attach()
    for site in ecanet.attached(model):
        prune.l1_unstructured(model.get_submodule(site.after.replace("bn", "conv")), "weight", 0.5)
        prune.l1_unstructured(model.get_submodule(site.name).conv, "weight", 1)
    assert count_acts(model) == [1] * 8
    model(IMAGE).sum().backward()
    gate = model.layer1[0].eca.conv
    assert (gate.weight == 0).sum() == 1
    assert gate.weight_orig.grad.any()
    before = model(IMAGE)
    with torch.no_grad():
        gate.weight_orig.add_(1)  # a step of the optimizer
    assert not torch.equal(model(IMAGE), before)
    assert (gate.weight == 0).sum() == 1


def narrow(model):
    """Remove half of the channels of the whole first stage, as tools for structured pruning do."""
    kept = torch.arange(0, 64, 2)
    for layer in (model.conv1, *(m for m in model.layer1.modules() if isinstance(m, nn.Conv2d))):
        layer.weight = nn.Parameter(layer.weight[kept] if layer is model.conv1 else layer.weight[kept][:, kept])
        layer.in_channels, layer.out_channels = layer.weight.shape[1], 32
    for norm in (model.bn1, *(m for m in model.layer1.modules() if isinstance(m, nn.BatchNorm2d))):
        norm.weight, norm.bias = nn.Parameter(norm.weight[kept]), nn.Parameter(norm.bias[kept])
        norm.running_mean, norm.running_var, norm.num_features = norm.running_mean[kept], norm.running_var[kept], 32
    for layer in (model.layer2[0].conv1, model.layer2[0].downsample[0]):
        layer.weight, layer.in_channels = nn.Parameter(layer.weight[:, kept]), 32


def check_structured_pruning():
    model, _ = attach()
    narrow(model)
    assert count_acts(model) == [1] * 8
    assert [site.channels for site in ecanet.attached(model)][:3] == [32, 32, 128]
    squeeze_excite = ecanet.attach(resnet18().eval(), "se", where="layer1")
    narrow(squeeze_excite)
    with pytest.raises(ConfigError, match="if the network was pruned, prune its weights too"):
        squeeze_excite(IMAGE)


def check_weight_norm():
    model, expected = attach()
    parametrizations.weight_norm(model.layer1[0].conv2)
    parametrizations.weight_norm(model.layer1[0].eca.conv)
    nn.utils.weight_norm(model.layer1[1].eca.conv)  # the older form, which works by a hook
    assert_same(model, expected)
    parametrizations.spectral_norm(model.layer1[1].conv2)
    assert count_acts(model) == [1] * 8
    model(IMAGE).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# copies


def check_ema():
    model, expected = attach()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    assert_same(average.module, expected, 0)


def check_deepcopy():
    model, expected = attach()
    other = copy.deepcopy(model)
    assert_same(other, expected, 0)
    nn.init.zeros_(other.layer1[0].eca.conv.weight)
    assert_same(model, expected, 0)


def check_pickle(tmp_path):
    model, expected = attach()
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    torch.save((IMAGE, expected), tmp_path / "expected")
    code = f"""if True:
        import pickle, torch
        model = pickle.load(open({str(tmp_path / "model")!r}, "rb"))
        image, expected = torch.load({str(tmp_path / "expected")!r})
        import ecanet
        print(torch.equal(model(image), expected), sum(site.calls for site in ecanet.attached(model)))"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True", "8"]


def check_functional_call():
    model, expected = attach()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.testing.assert_close(torch.func.functional_call(model, tensors, (IMAGE,)), expected, rtol=0, atol=0)
    assert count_acts(model, lambda x: torch.func.functional_call(model, tensors, (x,))) == [1] * 8


# graphs and compilers


def check_fx():
    model, expected = attach()
    graph = fx.symbolic_trace(model)
    assert count_in_graph(graph.graph) == 8
    torch.testing.assert_close(graph(IMAGE), expected, rtol=0, atol=0)
    assert {name for name, _ in graph.named_parameters()} == {name for name, _ in model.named_parameters()}


def check_compile():
    model, expected = attach(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return graph

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend=keep, fullgraph=True)(IMAGE), expected)
    assert [count_in_graph(graph) for graph in graphs] == [4]


def check_checkpointing():
    model, expected = attach()
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "BasicBlock")
    assert_same(model, expected, 0)
    model(IMAGE).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# training


class Lit(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def check_lightning(tmp_path):
    model, _ = attach(mobilenet_v2(num_classes=3))
    before = [model.get_submodule(site.name).conv.weight.clone() for site in ecanet.attached(model)]
    options = {"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = Trainer(**options, enable_model_summary=False, default_root_dir=tmp_path, enable_checkpointing=False)
    trainer.fit(Lit(model).train(), DataLoader(list(torch.rand(4, 3, 32, 32)), 2))
    after = [model.get_submodule(site.name).conv.weight for site in ecanet.attached(model)]
    assert not any(map(torch.equal, before, after))
    assert count_acts(model) == [1] * 17


def train_in_process(rank, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, _ = attach()
    wrapped = nn.parallel.DistributedDataParallel(model.train())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):  # the second step fails if the first left a parameter unused
        optimizer.zero_grad()
        wrapped(torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(2 * step + rank))).sum().backward()
        optimizer.step()
    gates = torch.cat([model.get_submodule(site.name).conv.weight.flatten() for site in ecanet.attached(model)])
    both = [torch.empty_like(gates) for _ in range(2)]
    torch.distributed.all_gather(both, gates.detach())
    assert torch.equal(*both)
    assert count_acts(model.eval()) == [1] * 8
    torch.distributed.destroy_process_group()


def check_ddp(tmp_path):
    torch.multiprocessing.spawn(train_in_process, (str(tmp_path / "store"),), nprocs=2)


def check_fsdp(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model, expected = attach()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for block in (*model.layer1, *model.layer2, *model.layer3, *model.layer4):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert_same(model, expected)
        model(IMAGE).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def check_torchscript():
    model, _ = attach()
    with pytest.raises(ecanet.errors.AttachError, match=r"^torch\.jit\.script cannot read"):
        torch.jit.script(model)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


TAKE_LONG = ("ddp", "prepare_fx", "pickle")


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, id=name, marks=[pytest.mark.slow] * (name in TAKE_LONG)) for name, check in CHECKS.items()],
)
def test_each_gate_acts_once_after(check, tmp_path):
    check(*([tmp_path] if check.__code__.co_argcount else []))


def test_the_table_names_every_tool():
    rows = re.findall(r"^\| .*`check_(\w+)` \|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(CHECKS)
