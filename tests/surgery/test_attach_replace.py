"""Gates in the place of a network's own."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torchvision import models

import ecanet
from ecanet.errors import AttachError, ConfigError
from tensors import noise


class eca_layer(nn.Module):  # noqa: N801
    """As pasted in many repositories: pool, one convolution over channels, sigmoid."""

    def __init__(self, k):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, kernel_size=k, padding=(k - 1) // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        y = self.avg_pool(x).squeeze(-1).transpose(-1, -2)
        return x * self.sigmoid(self.conv(y).transpose(-1, -2).unsqueeze(-1))


def image():
    return noise(2, 3, 40, 40)


def pasted(k=5):
    return nn.Sequential(nn.Conv2d(3, 12, 3), eca_layer(k), nn.ReLU())


def test_squeeze_excite_gives_way_and_comes_back():
    model = models.mobilenet_v3_small().eval()
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="9 'se' modules gave way to 'eca': outputs change"):
        ecanet.attach(model, "eca", replace="se")
    sites = ecanet.attached(model)
    assert len(sites) == 9
    assert {site.note for site in sites} == {"in place of SqueezeExcitation; outputs changed when attached"}
    assert not [m for m in model.modules() if type(m).__name__ == "SqueezeExcitation"]
    assert model(image()).isfinite().all()
    with pytest.warns(UserWarning, match="detached 9 gates"):
        ecanet.detach(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(image()), plain(image()))


@pytest.mark.parametrize(("name", "count"), [("efficientnet_b0", 16)])
def test_new_gates_train(name, count):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ecanet.attach(model, "eca", replace="se", kernel_size=3)
    assert len(ecanet.attached(model)) == count
    model.train()(image()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_preserve_cannot_be_kept():
    with pytest.raises(AttachError, match="preserve=True cannot be kept"):
        ecanet.attach(models.mobilenet_v3_small(), replace="se", preserve=True)


@pytest.mark.parametrize("k", [3, 5])
def test_pasted_modules_become_ours_with_their_weights(k):
    model = pasted(k)
    before, keys = model(image()), list(model.state_dict())
    weight = model[1].conv.weight.detach().clone()
    ecanet.attach(model, replace="eca")
    assert isinstance(model[1], ecanet.ECA)
    assert model[1].kernel_size == k
    assert torch.equal(model[1].conv.weight, weight)
    assert list(model.state_dict()) == keys
    assert (model(image()) - before).abs().max() <= 32 * torch.finfo(torch.float32).eps * before.abs().max()


def test_timm_eca_becomes_ours():
    timm = pytest.importorskip("timm")
    # with last norms that are not zero, or no gate would matter
    model = timm.create_model("ecaresnet26t", zero_init_last=False).eval()
    before, keys = model(image()), list(model.state_dict())
    ecanet.attach(model, replace="eca")
    assert len(ecanet.attached(model)) == 8
    assert list(model.state_dict()) == keys
    assert (model(image()) - before).abs().max() <= 1e4 * torch.finfo(torch.float32).eps * before.abs().max()


def test_circular_eca_of_timm_stays_circular():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 12, 3), layers.CecaModule(12, kernel_size=3))
    before = model(image())
    ecanet.attach(model, replace="eca")
    assert model[1].padding_mode == "circular"
    assert torch.allclose(model(image()), before, atol=1e-6)


def test_a_bias_is_taken_over():
    model = pasted()
    model[1].conv.bias = nn.Parameter(torch.full([1], 0.7))
    before = model(image())
    ecanet.attach(model, replace="eca")
    assert repr(model[1]).startswith("ECA(\n  12, kernel_size=5, bias=True")
    assert torch.allclose(model(image()), before, rtol=1e-5)


def test_mistakes():
    with pytest.raises(AttachError, match="found no 'se' modules"):
        ecanet.attach(models.resnet18(), replace="se")
    with pytest.raises(ConfigError, match="replace= takes"):
        ecanet.attach(models.resnet18(), replace="cbam")
    with pytest.raises(ConfigError, match="give no options"):
        ecanet.attach(pasted(), replace="eca", kernel_size=3)
