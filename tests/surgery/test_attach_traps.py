"""What silently drops a gate elsewhere: each is survived, or refused in one line."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_fx
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.quantization import resnet18 as quantizable_resnet18

import ecanet
import sweep_checks as sweep
from ecanet.errors import AttachError
from tensors import noise

TORCHAO = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
"""torch.ao.quantization says in each call that torchao is to take its place."""


COMPILED = (2, 1, 1, 1)
"""The depths of networks that are compiled, which takes some tenths of a second for each block."""


def small(attached=True, trained=True, depths=(2, 2, 2, 2)):
    """A plain ResNet-18, or one of other depths, with attention attached, and gates that do something."""
    torch.manual_seed(0)
    model = models.ResNet(models.resnet.BasicBlock, list(depths), num_classes=4)
    sweep.randomize(model)
    if attached:
        ecanet.attach(model)
        if trained:
            sweep.excite([model.get_submodule(site.name) for site in ecanet.attached(model)])
    return model.eval()


def image():
    return noise(2, 3, 40, 40)


def test_sync_batchnorm_conversion_keeps_the_gates():
    model = small()
    before = model(image())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted.layer1[0].bn2, nn.SyncBatchNorm)
    assert torch.equal(converted(image()), before)
    assert len(ecanet.attached(converted)) == 8


def test_a_network_compiles_right_after_a_conversion():
    model = small(depths=COMPILED).train()
    with torch.no_grad():
        expected = model(image())
        fused = torch.ao.quantization.fuse_modules_qat(model, [["layer1.0.conv2", "layer1.0.bn2"]])
        actual = torch.compile(fused, backend="eager", fullgraph=True)(image())
    assert type(fused.layer1[0].bn2) is nn.Identity
    torch.testing.assert_close(actual, expected)


def test_compile_fullgraph_and_export():
    model = small(depths=COMPILED)
    with torch.no_grad():
        expected = model(image())
        compiled = torch.compile(model, backend="eager", fullgraph=True)(image())
        exported = torch.export.export(model, (image(),))
    bound = 1e3 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (compiled - expected).abs().max() <= bound
    assert (exported.module()(image()) - expected).abs().max() <= bound
    assert "layer1.0.eca.conv.weight" in exported.state_dict


def test_wrapped_and_compiled_models_are_refused():
    with pytest.raises(AttachError, match=r"OptimizedModule: attach before torch\.compile"):
        ecanet.attach(torch.compile(small(False), backend="eager"))
    compiled = small(False)
    compiled.layer1.compile(backend="eager")
    with pytest.raises(AttachError, match=r"layer1 is compiled: attach before"):
        ecanet.attach(compiled)
    with pytest.raises(AttachError, match="DataParallel: "):
        ecanet.attach(nn.DataParallel(small(False)))
    with pytest.raises(AttachError, match="ScriptModule: attach before"):
        ecanet.attach(torch.jit.trace(small(False), image()))
    with pytest.raises(AttachError, match="lazy"):
        ecanet.attach(nn.Sequential(nn.LazyConv2d(4, 3)))


@TORCHAO
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large"])
def test_quantized_networks_are_refused_in_one_line(name):
    model = models.get_model(f"quantized_{name}", quantize=True)
    for example in (None, image()):
        with pytest.raises(AttachError, match=r"^Quantizable\w+ is quantized; attach first, then [^\n]*$"):
            ecanet.attach(model, example=example)


@TORCHAO
@pytest.mark.parametrize("prepare", ["prepare", "prepare_qat", "prepare_fx"])
def test_prepared_networks_are_refused_because_their_observers_would_hold_the_gates(prepare):
    model = small(False).train(prepare == "prepare_qat")
    if prepare == "prepare_fx":
        mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")
        prepared = quantize_fx.prepare_fx(model, mapping, (image(),))
    else:
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        prepared = getattr(torch.ao.quantization, prepare)(model)
    with pytest.raises(AttachError, match=r"^\w+ is prepared for quantization; attach first, then [^\n]*$"):
        ecanet.attach(prepared)


@TORCHAO
def test_what_is_quantized_in_part_is_not_refused():
    model = torch.ao.quantization.quantize_dynamic(small(False), {nn.Linear})
    assert type(model.fc) is torch.ao.nn.quantized.dynamic.Linear
    assert len(ecanet.attached(ecanet.attach(model))) == 8
    assert len(ecanet.attached(ecanet.attach(quantizable_resnet18(quantize=False)))) == 8


def test_ddp_trains_the_gates(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small(trained=False).train()
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(image()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        wrapped(image()).sum().backward()  # a second step fails if parameters were unused in the first
        with pytest.raises(AttachError, match="DistributedDataParallel"):
            ecanet.attach(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_deepcopy_ema_and_pickle():
    model = small()
    expected = model(image())
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.optim.swa_utils.AveragedModel(model).module,
    ):
        assert torch.equal(twin.eval()(image()), expected)
        assert twin.layer1[0].eca is not model.layer1[0].eca
        twin.layer1[0].eca.neutralize()
        assert not torch.equal(twin(image()), expected)
        assert torch.equal(model(image()), expected)
        assert len(ecanet.attached(twin)) == 8


def test_half_and_double_conversion_take_the_gates_along():
    model = small(trained=False).half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    plain = small(False).half()
    assert torch.equal(model(image().half()), plain(image().half()))


def test_a_traced_network_has_the_gates_in_its_graph():
    model = small()
    features = create_feature_extractor(model, ["layer2"])
    gates = [name for name, _ in model.named_parameters() if "eca" in name and name.startswith(("layer1", "layer2"))]
    assert [key for key in features.state_dict() if "eca" in key] == gates
    assert torch.equal(
        features(image())["layer2"],
        model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(image())))))),
    )
    features.train()(image())["layer2"].sum().backward()
    assert all(p.grad is not None for p in features.parameters())


def test_removed_target_is_reported():
    model = small()
    del model.layer1[0]._modules["bn2"]
    with pytest.raises(AttachError, match=r"gate 'layer1\.0\.eca' no longer acts: 'layer1\.0\.bn2' was removed"):
        ecanet.attached(model)


class ConvNormAct(nn.Module):
    """Ultralytics' Conv: `fuse` deletes the norm and puts another forward in."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return nn.functional.silu(self.bn(self.conv(x)))

    def fuse(self):
        self.conv = nn.utils.fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        del self.bn
        self.forward = lambda x: nn.functional.silu(self.conv(x))


class Residual(nn.Module):
    """A block whose branch ends in such a module."""

    def __init__(self, channels):
        super().__init__()
        self.cv1, self.cv2 = ConvNormAct(channels), ConvNormAct(channels)

    def forward(self, x):
        return x + self.cv2(self.cv1(x))


def test_the_gate_survives_fusing_the_norm():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Residual(8)).eval()
    ecanet.attach(model)
    assert ecanet.attached(model)[0].after == "1.cv2"
    sweep.excite([model[1].eca])
    before = model(image())
    model[1].cv1.fuse()
    model[1].cv2.fuse()
    after = model(image())
    assert (after - before).abs().max() <= 1e3 * torch.finfo(torch.float32).eps * before.abs().max()
    sweep.excite([model[1].eca], seed=5)
    assert not torch.equal(model(image()), after)
    assert len(ecanet.attached(model)) == 1


@pytest.mark.slow
def test_pickle_into_a_fresh_process_does_not_lose_hooks(tmp_path):
    torch.save(small(), tmp_path / "model.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
import ecanet
calls = []
handles = [m.register_forward_hook(lambda *a: calls.append(1)) for m in model.modules()]
assert len(ecanet.attached(model)) == 8
x = torch.rand((2, 3, 40, 40), generator=torch.Generator().manual_seed(0))
before = model(x)
model.layer1[0].eca.neutralize()
assert not torch.equal(model(x), before)
print(len(calls) > 0)
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True"]


def test_detach_halves_only_what_is_doubled_now():
    """Loading a file from before `fold` undoes the doubling; `detach` must not halve then."""
    torch.manual_seed(0)
    model, x = models.resnet18(num_classes=4).eval(), image()
    sweep.randomize(model)
    plain, before = copy.deepcopy(model.state_dict()), model(x)
    ecanet.attach(model)
    unfolded = copy.deepcopy(model.state_dict())
    ecanet.fold(model)
    model.load_state_dict(unfolded)
    ecanet.detach(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(tensor, plain[key]) for key, tensor in model.state_dict().items())


class SharedActivation(nn.Module):
    """A residual block whose one activation ends the branch and also stands inside it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        return x + self.act(self.conv2(self.act(self.conv1(x))))


def test_a_gate_is_not_put_on_a_module_that_also_runs_elsewhere():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SharedActivation())
    with pytest.raises(AttachError, match=r"'1.act' ends 1 residual branch\(es\) but runs 2 times"):
        ecanet.attach(model)
    ecanet.attach(model, where="*.conv2")
    assert [site.after for site in ecanet.attached(model)] == ["1.conv2"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("resnet50", "eca", None), "attach takes a network"),
        ((nn.Conv2d(3, 8, 3), "none", None), "nothing to attach"),
        ((nn.Conv2d(3, 8, 3), "eca", 5), "where= takes a glob"),
    ],
)
def test_mistakes_are_named(arguments, says):
    model, attention, where = arguments
    with pytest.raises(AttachError, match=says):
        ecanet.attach(model, attention, where=where)
