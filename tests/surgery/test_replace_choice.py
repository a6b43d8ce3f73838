"""The modules that replace= means, those that are left as they are, and the reasons."""

import pytest
import torch
from torch import nn

import ecanet
from attention_spellings import CHANNELS, Inner, Spelling, conv, planes, product
from ecanet.errors import AttachError, ConfigError
from replacing import IMAGE, eca, network, se, warnings_of
from se_spellings import SES


def test_one_that_cannot_be_converted_is_left_and_named():
    model = network(eca(), Spelling(product, conv=conv(dilation=2, padding=2)))
    assert warnings_of(model, "eca") == "left as it is: '2' (Spelling) has a dilated kernel (dilation 2)"
    assert isinstance(model[1], ecanet.ECA)
    assert isinstance(model[2], Spelling)


@pytest.mark.parametrize("name", ["factor alone", "channel gate beside a spatial one"])
def test_only_eca_can_return_a_factor(name):
    torch.manual_seed(0)
    model = network(SES[name]())
    with pytest.raises(AttachError, match="returns only the factor, which its parent multiplies by; 'eca' can do so"):
        ecanet.attach(model, "se-var2", replace="se", example=IMAGE)


def test_a_module_that_is_kept_in_another_way_too_is_not_replaced():
    model = network(Inner(eca()), nn.ReLU())
    inner = model[1]
    inner.call = lambda gate, x, kept=(inner.gate,): kept[0](x).relu()
    with pytest.raises(AttachError, match=r"the gate in the place of '1.gate' \(Spelling\) ran 0 times, not 1"):
        ecanet.attach(model, replace="eca", example=IMAGE)
    assert type(inner.gate) is Spelling
    inner.call = lambda gate, x: gate(x).relu() * gate.factor
    inner.gate.factor = 2
    with pytest.raises(AttachError, match=r"does not run without '1.gate' \(Spelling\); nothing was changed"):
        ecanet.attach(model, replace="eca", example=IMAGE)
    assert type(inner.gate) is Spelling
    assert not ecanet.attached(model)


@pytest.mark.parametrize("make", [eca, se])
def test_the_innermost_module_is_replaced(make):
    model = network(nn.Sequential(nn.Sequential(make(), nn.Identity()), make()))
    warnings_of(model, "se" if make is se else "eca")
    assert [site.name for site in ecanet.attached(model)] == ["1.0.0", "1.1"]


class Named(Spelling):
    """A class that a user names."""


@pytest.mark.parametrize(
    "replace", [Named, lambda name, module: name == "1", lambda name, module: isinstance(module, Named)]
)
def test_a_class_or_a_function_selects(replace):
    model = network(Named(product, conv=conv()), eca(), se())
    before = model(IMAGE)
    assert warnings_of(model, replace) == ""
    assert [site.name for site in ecanet.attached(model)] == ["1"]
    assert torch.allclose(model(IMAGE), before, rtol=1e-5)
    model = network(Named(product, conv=conv()), eca(), se())
    said = warnings_of(model, replace, kernel_size=5)
    assert "gave way to 'eca': outputs change" in said
    assert model[1].kernel_size == 5
    model = network(Named(product, conv=conv()), eca(), se())
    assert "gave way to 'se'" in warnings_of(model, replace, attention="se", reduction=4)


def test_selected_modules_need_not_be_channel_attention_but_keep_their_shape():
    def spread(m, x):
        return x * planes(x.flatten(2).std(-1).sigmoid(), x)

    model = network(Named(spread))
    assert "1 'Named' modules gave way to 'eca'" in warnings_of(model, Named)
    for module, reason in (
        (
            Named(lambda m, x: m.conv(x), conv=nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)),
            "contains a 3 x 3 convolution",
        ),
        (Named(lambda m, x: x[..., ::2]), "returns no tensor of its input's shape"),
    ):
        with pytest.raises(AttachError, match=rf"cannot replace the 'Named' modules .*'1' \(Named\) {reason}"):
            ecanet.attach(network(module), replace=Named, example=IMAGE)
    with pytest.raises(AttachError, match="replace='Named' selects no module"):
        ecanet.attach(network(eca()), replace=Named, example=IMAGE)
    model = network(eca())
    model.unused = Named(product, conv=conv())
    model.forward = lambda x: model[2](model[1](model[0](x)))
    with pytest.raises(AttachError, match="'unused' .Named. was not run"):
        ecanet.attach(model, replace=Named, example=IMAGE)


def test_mistakes_in_replace():
    for replace in ("cbam", 3, nn.ReLU()):
        if callable(replace):
            continue
        with pytest.raises(ConfigError, match="replace= takes 'se', 'eca', a module class or a function"):
            ecanet.attach(network(eca()), replace=replace, example=IMAGE)
