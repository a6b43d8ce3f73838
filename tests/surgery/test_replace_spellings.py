"""Channel attention is recognised by what it computes, however it is written and called."""

import copy
import warnings

import pytest
import torch
from torch import nn

import ecanet
from attention_spellings import CHANNELS, ECAS, NOT_ECA
from ecanet import ECA
from ecanet.errors import AttachError
from se_spellings import NO_ATTENTION, NOT_SE, SES


def axes_of(name):
    return int(name[-3]) if name.endswith("-D") else 2


def network(module, axes=2):
    """A network around one attention module, and an input with planes of 6 x 6."""
    torch.manual_seed(3)
    convolution = getattr(nn, f"Conv{axes}d")
    model = nn.Sequential(convolution(2, CHANNELS, 3, padding=1), module, convolution(CHANNELS, 4, 1)).eval()
    return model, torch.randn(2, 2, *(6,) * axes)


def build(make, axes=2):
    torch.manual_seed(1)
    return network(make(), axes)


def replace(model, x, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ecanet.attach(model, "eca", replace=kind, example=x)


@pytest.mark.parametrize("name", ECAS)
def test_eca_is_converted_exactly(name):
    model, x = build(ECAS[name], axes_of(name))
    with torch.no_grad():
        before = model(x)
    old = copy.deepcopy(dict(model.named_parameters()))
    replace(model, x, "eca")
    gates = [m for m in model.modules() if isinstance(m, ECA)]
    assert len(gates) == 1
    assert (model(x) - before).abs().max() <= 4 * torch.finfo(x.dtype).eps * before.abs().max()
    if not {"norm", "buffer"} & set(name.split()):  # their kernels are no parameters
        kernels = [p.flatten() for p in old.values() if p.numel() == gates[0].kernel_size]
        kernel = gates[0].conv.weight.detach().flatten()
        assert any(torch.equal(kernel, k) or torch.equal(kernel, k.flip(0)) for k in kernels)
    assert sum(p.numel() for p in model[1].parameters()) == gates[0].kernel_size + (gates[0].conv.bias is not None)


@pytest.mark.parametrize("name", [n for n in ECAS if "factor" not in n])
def test_what_is_eca_is_not_taken_for_squeeze_excite(name):
    model, x = build(ECAS[name], axes_of(name))
    with pytest.raises(AttachError, match=r"found no 'se' modules .*replace='eca' takes it"):
        ecanet.attach(model, replace="se", example=x)


@pytest.mark.parametrize("reason", NOT_ECA)
def test_what_resembles_eca_is_refused_with_the_reason(reason):
    model, x = build(NOT_ECA[reason])
    keys = list(model.state_dict())
    with pytest.raises(AttachError) as caught:
        ecanet.attach(model, replace="eca", example=x)
    assert reason in str(caught.value)
    assert "adds gates" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", SES)
def test_squeeze_excite_gives_way(name):
    model, x = build(SES[name], axes_of(name))
    replace(model, x, "se")
    (site,) = ecanet.attached(model)
    assert site.channels == CHANNELS
    assert sum(isinstance(m, ECA) for m in model.modules()) == 1
    assert model(x).isfinite().all()
    with pytest.raises(AttachError, match="found no 'eca' modules"):
        ecanet.attach(build(SES[name], axes_of(name))[0], replace="eca", example=x)


@pytest.mark.parametrize("reason", NOT_SE)
def test_what_resembles_squeeze_excite_is_refused_with_the_reason(reason):
    model, x = build(NOT_SE[reason])
    with pytest.raises(AttachError) as caught:
        ecanet.attach(model, replace="se", example=x)
    assert reason in str(caught.value)
    assert "adds gates" not in str(caught.value)


@pytest.mark.parametrize("kind", ["se", "eca"])
@pytest.mark.parametrize("name", NO_ATTENTION)
def test_what_is_no_channel_attention_is_not_touched(name, kind):
    model, x = build(NO_ATTENTION[name])
    with pytest.raises(AttachError, match=f"found no '{kind}' modules"):
        ecanet.attach(model, replace=kind, example=x)


def test_enough_spellings():
    assert len(ECAS) >= 30
    assert len(SES) >= 20
