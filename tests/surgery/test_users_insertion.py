"""Mistakes that users met when attention is put into a network (rows 22 to 33 of the study of users' needs)."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

import ecanet
import sweep_checks as sweep
from ecanet.errors import AttachError
from tensors import noise


def plain(**options):
    torch.manual_seed(0)
    model = models.resnet18(num_classes=5, **options)
    sweep.randomize(model)
    return model.eval()


def image():
    return noise(2, 3, 40, 40)


def vgg(batch_norm=False):
    """The convolutions of VGG-11 without its layers of a hundred million weights."""
    convolutions = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm)
    return nn.Sequential(convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5))


def test_22_every_block_gets_a_gate_that_is_called_inside_its_branch():
    assert len(ecanet.attached(ecanet.attach(models.resnet50()))) == 16
    model = ecanet.attach(plain())
    before = model(image())
    for site in ecanet.attached(model):
        gate = model.get_submodule(site.name)
        sweep.excite([gate])
        assert not torch.equal(model(image()), before), f"{site.name} does nothing"
        gate.neutralize()
    assert torch.equal(model(image()), before)


def test_23_nothing_inserted_is_an_error_not_silence():
    timm = pytest.importorskip("timm")
    assert len(ecanet.attached(ecanet.attach(timm.create_model("mobilenetv2_100")))) == 17
    with pytest.raises(AttachError, match="selects no module"):
        ecanet.attach(plain(), where="blocks.*")
    with pytest.raises(AttachError, match="found no residual branch"):
        ecanet.attach(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1)))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        pytest.param("efficientnet_b0", marks=pytest.mark.slow),
        "mobilenet_v2",
        "mobilenet_v3_small",
        pytest.param("regnet_x_400mf", marks=pytest.mark.slow),
    ],
)
def test_24_one_call_for_every_family(name):
    model = ecanet.attach(models.get_model(name))
    model.train()(image()).sum().backward()
    state = model.state_dict()
    again = ecanet.attach(models.get_model(name))
    again.load_state_dict(state)
    assert torch.equal(again.eval()(image()), model.eval()(image()))


def test_25_two_modules_at_one_place_compose():
    model = ecanet.attach(ecanet.attach(plain(), "eca", where="layer4.1"), "se", where="layer4.1")
    first, second = ecanet.attached(model)
    for site in (first, second):
        sweep.excite([model.get_submodule(site.name)])
    seen = {}
    for site in (first, second):
        gate = model.get_submodule(site.name)
        note = lambda m, args, out, name=site.attention: seen.update({name: (args[0].clone(), out.clone())})  # noqa: E731
        gate.register_forward_hook(note, prepend=True)
    model(image())
    assert torch.equal(seen["se"][0], seen["eca"][1]), "the second works on what the first gives"


def test_26_basic_blocks_too():
    assert len(ecanet.attached(ecanet.attach(models.resnet34()))) == 16


def test_27_after_the_last_norm_and_after_the_projection():
    resnet = ecanet.attached(ecanet.attach(models.resnet50()))
    assert {site.after.rpartition(".")[2] for site in resnet} == {"bn3"}
    model = ecanet.attach(models.mobilenet_v2())
    for site in ecanet.attached(model):
        norm = model.get_submodule(site.after)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.num_features == site.channels  # the projection's narrow output, not the expansion
    only = ecanet.attached(ecanet.attach(models.resnet50(), where="layer2.*.conv2"))
    assert [site.after for site in only] == [f"layer2.{i}.conv2" for i in range(4)]


def test_28_old_keys_keep_name_and_value():
    model = plain()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after = ecanet.attach(model).state_dict()
    assert [k for k in after if k in before] == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())


def frozen():
    return plain(norm_layer=FrozenBatchNorm2d)


@pytest.mark.parametrize("build", [plain, frozen, vgg], ids=["norm", "frozen-norm", "no-norm"])
def test_29_outputs_are_equal_before_and_after(build):
    model = build().eval()
    before = model(image())
    assert torch.equal(ecanet.attach(model)(image()), before)


def test_30_every_gate_gets_a_gradient():
    for make in (models.resnet18, models.mobilenet_v2, lambda: vgg(batch_norm=True)):
        model = ecanet.attach(make())
        model.train()(image()).sum().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("attention", ["eca", "eca-ns", "se", "se-var2", "se-var3", "cbam"])
@pytest.mark.parametrize("channels", [1, 3, 8, 15])
def test_31_few_channels(attention, channels):
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU())
    before = model(image())
    ecanet.attach(model, attention, where="1")
    assert torch.equal(model(image()), before)


@pytest.mark.slow
def test_32_a_checkpoint_loads_in_a_fresh_process(tmp_path):
    model = ecanet.attach(plain())
    sweep.excite([model.get_submodule(site.name) for site in ecanet.attached(model)])
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save(model(image()), tmp_path / "output.pt")
    code = f"""
import torch, ecanet
from torchvision.models import resnet18
folder = {str(tmp_path)!r}
model = ecanet.attach(resnet18(num_classes=5)).eval()
model.load_state_dict(torch.load(folder + "/weights.pt", weights_only=True))
x = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
print(torch.equal(model(x), torch.load(folder + "/output.pt", weights_only=True)))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True"]


def test_33_deepcopy_then_detach():
    model = plain()
    before, keys = model(image()), list(model.state_dict())
    twin = ecanet.detach(copy.deepcopy(ecanet.attach(model)))
    assert list(twin.state_dict()) == keys
    assert torch.equal(twin(image()), before)
    assert len(ecanet.attached(model)) == 8, "detaching a copy leaves the original alone"
