"""Every channel attention of published networks is found, whatever its class is called, and nothing else is."""

import warnings

import pytest
import torch
from torch import nn
from torchvision import models

import ecanet
from attention_spellings import Spelling, conv, product
from ecanet.errors import AttachError
from se_spellings import excite

TORCHVISION = {"mobilenet_v3_small": 9, "mobilenet_v3_large": 8, "efficientnet_b0": 16, "regnet_y_400mf": 16}
TIMM_SE = {
    "seresnet50": 16,
    "legacy_seresnet18": 8,
    "efficientnet_b0": 16,
    "regnety_008": 14,
    "ese_vovnet19b_dw": 4,
    "ghostnet_100": 7,
    "hgnet_tiny": 5,
    "lcnet_050": 2,
    "rexnet_100": 13,
    "nfnet_l0": 12,
    "fastvit_t8": 1,
    "repghostnet_050": 7,
}
TIMM_ECA = {"ecaresnet26t": 8, "eca_nfnet_l0": 12, "eca_resnet33ts": 10, "ecaresnet50t": 16}
NO_CHANNEL_ATTENTION = ["resnest14d", "skresnet18", "convnext_atto", "repvgg_a0", "poolformer_s12"]
IMAGE = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def replace(model, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ecanet.attach(model.eval(), replace=kind, example=IMAGE)
    return len(ecanet.attached(model))


SLOW = {"nfnet_l0", "seresnet50", "regnety_008", "eca_resnet33ts", "ecaresnet50t", "regnet_y_400mf", "efficientnet_b0"}
"""Large networks, whose modules the others have, too: timm's `SEModule` and `EcaModule`, torchvision's one class."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in TORCHVISION])
def test_squeeze_excite_of_torchvision(name):
    assert replace(getattr(models, name)(), "se") == TORCHVISION[name]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in TIMM_SE])
def test_squeeze_excite_of_timm(name):
    model = pytest.importorskip("timm").create_model(name)
    convolutions = [type(m) for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert replace(model, "se") == TIMM_SE[name]
    assert [type(m) for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)] == convolutions


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in TIMM_ECA])
def test_eca_of_timm(name):
    torch.manual_seed(0)
    model = pytest.importorskip("timm").create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # some norms start at zero, which would hide their branch
            nn.init.uniform_(module.weight, 0.5, 1)
    with torch.no_grad():
        before, keys = model(IMAGE), list(model.state_dict())
        assert replace(model, "eca") == TIMM_ECA[name]
        assert list(model.state_dict()) == keys
        assert (model(IMAGE) - before).abs().max() <= 1e3 * torch.finfo(torch.float32).eps * before.abs().max()


@pytest.mark.parametrize("name", NO_CHANNEL_ATTENTION)
def test_other_attention_is_not_taken(name):
    model = pytest.importorskip("timm").create_model(name).eval()
    for kind in ("se", "eca"):
        with pytest.raises(AttachError, match=f"found no '{kind}' modules"):
            ecanet.attach(model, replace=kind, example=IMAGE)


class Unit(nn.Module):
    """A residual block with its attention inside."""

    def __init__(self, attention, stride=1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(16, 16, 3, stride, 1), nn.BatchNorm2d(16), nn.PReLU(16), nn.Conv2d(16, 16, 3, 1, 1), attention
        )
        self.shortcut = nn.MaxPool2d(1, stride)

    def forward(self, x):
        return self.shortcut(x) + self.layers(x)


def squeeze(channels):
    layers = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid())
    return excite(lambda m, p: m.layers(p), layers=layers)


@pytest.mark.parametrize("name", ["bottleneck_SE", "SEUnit", "se_block", "IRBlockSE", "ECALayer", "SqueezeExcitation"])
@pytest.mark.parametrize("zeroed", [False, True])
def test_a_residual_block_stays_whole_whatever_its_name(name, zeroed):
    block = type(name, (Unit,), {})
    model = nn.Sequential(nn.Conv2d(3, 16, 3), block(squeeze(16)), block(squeeze(16), 2), block(nn.Identity()))
    if zeroed:  # blocks that return their input until they are trained
        for module in model[1:]:
            nn.init.zeros_(module.layers[3].weight)
            nn.init.zeros_(module.layers[3].bias)
    count = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert replace(model, "se") == 2
    assert [site.name for site in ecanet.attached(model)] == ["1.layers.4", "2.layers.4"]
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == count
    assert type(model[1]).__name__ == name


@pytest.mark.parametrize("name", ["ECA_2d", "EcaAttn", "MyGate", "Efficient_Attention", "Sequential", "attn"])
def test_names_do_not_matter(name):
    for make, kind in ((lambda: Spelling(product, conv=conv()), "eca"), (lambda: squeeze(16), "se")):
        module = make()
        module.__class__ = type(name, (type(module),), {})
        assert replace(nn.Sequential(nn.Conv2d(3, 16, 3), module), kind) == 1


def test_attention_without_a_module_of_its_own_is_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.down, self.up = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

        def forward(self, x):
            y = self.mix(x)
            return y * self.up(self.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()

    with pytest.raises(
        AttachError, match=r"'1' \(Block\) scales channels in its own forward and contains a 3 x 3"
    ) as caught:
        ecanet.attach(nn.Sequential(nn.Conv2d(3, 16, 3), Block()), replace="se")
    assert "adds gates" not in str(caught.value)


def test_a_network_that_is_one_module_of_attention_is_named():
    for module, kind in ((squeeze(16), "se"), (Spelling(product, conv=conv()), "eca")):
        with pytest.raises(AttachError, match=f"found no '{kind}' modules .*: the network itself scales channels"):
            ecanet.attach(module, replace=kind, example=torch.rand(2, 16, 6, 6))


def test_built_in_and_attached_gates_are_told_apart():
    built, plain = (ecanet.create_model("resnet20", attention=a) for a in ("eca", "none"))
    with pytest.raises(AttachError, match="was built with attention 'eca', which detach.. leaves alone"):
        ecanet.attach(built)
    with pytest.raises(AttachError, match="its 9 ECA modules were built in and stay"):
        ecanet.detach(built)
    with pytest.raises(AttachError, match="this library's own ECA already"):
        ecanet.attach(built, replace="eca")
    attached = ecanet.attach(plain)
    with pytest.raises(AttachError, match="already has attention 'eca'; detach first"):
        ecanet.attach(attached)
    with pytest.raises(AttachError, match=r"its 9 gates were put in by attach\(\); detach\(\) takes them out"):
        ecanet.attach(attached, replace="eca")
    ecanet.detach(attached)


def test_squeeze_excite_of_this_library_gives_way():
    model = ecanet.create_model("resnet20", attention="se")
    assert replace(model, "se") == 9
    assert not any(isinstance(m, ecanet.SE) for m in model.modules())


def test_gates_replace_modules_on_planes_of_one_pixel():
    every_pixel = Spelling(lambda m, x: x * m.mix(x).sigmoid(), mix=nn.Conv2d(16, 16, 1))
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 64), squeeze(16), every_pixel)
    assert replace(model, "se") == 1
    assert [site.name for site in ecanet.attached(model)] == ["1"]


def test_shapes_are_enough():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 16, 3), squeeze(16), Spelling(product, conv=conv()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ecanet.attach(model, replace="se")
        ecanet.attach(model, replace="eca")
    assert [type(m) for m in model[1:]] == [ecanet.ECA, ecanet.ECA]
    assert all(p.is_meta for p in model.parameters())
