"""A gate takes over what its module was: frozen, shared, hooked, in training, in a dtype, in a place."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ecanet
from attention_spellings import CHANNELS, Inner, Spelling, conv, factor_of, means, planes, product
from ecanet.errors import AttachError, ConfigError
from se_spellings import SES, excite, linear

IMAGE = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def network(*modules):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, CHANNELS, 3, padding=1), *modules, nn.Conv2d(CHANNELS, 4, 1)).eval()


def eca():
    return Spelling(product, conv=conv())


def se():
    return excite(lambda m, p: m.fc(p).sigmoid(), fc=linear())


def warnings_of(model, replace, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ecanet.attach(model, replace=replace, example=IMAGE, **options)
    assert len(caught) <= 1
    return "".join(str(one.message) for one in caught)


@pytest.mark.parametrize(
    "make", [eca, lambda: Spelling(product, conv=conv(bias=True)), se, lambda: factor_of(conv=conv())]
)
def test_frozen_stays_frozen(make):
    for frozen in (True, False):
        model = network(Inner(make())).requires_grad_(not frozen)
        said = warnings_of(model, "se" if make is se else "eca")
        gate = model.get_submodule(ecanet.attached(model)[0].name)
        assert {p.requires_grad for p in gate.parameters()} == {not frozen}
        assert ("'1.gate' is frozen" in said) == (frozen and make is se)


def test_partly_frozen_kernel_and_bias_keep_their_own_flags():
    model = network(Spelling(product, conv=conv(bias=True)))
    model[1].conv.weight.requires_grad_(False)
    warnings_of(model, "eca")
    assert (model[1].conv.weight.requires_grad, model[1].conv.bias.requires_grad) == (False, True)


@pytest.mark.parametrize("make", [eca, se])
def test_one_module_used_twice_is_one_gate_used_twice(make):
    shared = make()
    model = network(nn.Sequential(shared, nn.ReLU()), nn.ModuleDict({"again": shared})["again"])
    plain, before = copy.deepcopy(model), model(IMAGE)
    warnings_of(model, "se" if make is se else "eca")
    assert model[1][0] is model[2]
    assert len(ecanet.attached(model)) == 1
    assert make is se or torch.allclose(model(IMAGE), before, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ecanet.detach(model)
    assert model[1][0] is model[2] is shared
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(IMAGE), before)


@pytest.mark.parametrize("layer", [conv(), conv(3, 2), conv(bias=True)])
def test_tied_kernels_stay_tied(layer):
    def forward(m, x):
        y = m.conv(means(x)[:, None] if m.conv.weight.dim() == 3 else means(x)[:, None, :, None])
        return x * planes(y.flatten(1).sigmoid(), x)

    model = network(Spelling(forward, conv=layer), nn.ReLU(), Spelling(forward, conv=layer))
    warnings_of(model, "eca")
    assert model[1].conv.weight is model[3].conv.weight
    assert model[1].conv.bias is model[3].conv.bias


def test_an_optimizer_made_before_still_trains_the_kernel():
    model = network(eca())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    warnings_of(model, "eca")
    kernel = model[1].conv.weight.detach().clone()
    model(IMAGE).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].conv.weight, kernel)


def test_hooks_move_and_handles_still_remove_them():
    model, seen = network(eca()), []
    handles = [
        model[1].register_forward_hook(lambda m, args, y: seen.append("after")),
        model[1].register_forward_pre_hook(lambda m, args, kwargs: seen.append("before"), with_kwargs=True),
        model[1].register_full_backward_hook(lambda m, a, b: seen.append("backward")),
    ]
    assert warnings_of(model, "eca") == ""
    seen.clear()
    model(IMAGE).sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(IMAGE).sum().backward()
    assert seen == []


def test_hooks_run_with_the_network_and_not_for_probes():
    model, seen = network(eca()), []
    model[1].register_forward_hook(lambda m, args, y: seen.append(y))
    model[1].conv.register_forward_hook(lambda m, args, y: seen.append(y))
    said = warnings_of(model, "eca")
    assert len(seen) == 3 + 2  # the gate has the outer hook in the run that proves it
    assert said == "hooks on '1.conv' are gone"


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: excite(lambda m, p: m.fc(p).sigmoid(), fc=nn.Sequential(linear(), nn.Dropout(0.1))), True),
        (lambda: excite(lambda m, p: F.dropout(m.fc(p), 0.2, m.training).sigmoid(), fc=linear()), True),
        (lambda: excite(lambda m, p: m.fc(p).sigmoid(), fc=nn.Sequential(linear(), nn.Dropout(0.0))), False),
        (se, False),
    ],
)
def test_an_inner_dropout_is_named(module, said):
    assert ("the dropout in '1' is gone" in warnings_of(network(module()), "se")) == said


def test_a_kernel_that_was_computed_is_named():
    model = network(Spelling(product, conv=nn.utils.parametrizations.weight_norm(conv())))
    assert "the kernel of '1' is a parameter now" in warnings_of(model, "eca")


@pytest.mark.parametrize("make", [eca, se])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mode_and_dtype_follow_the_module(make, dtype):
    model = network(make()).to(dtype).train()
    model[1].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ecanet.attach(model, replace="se" if make is se else "eca", example=IMAGE.to(dtype))
    assert not model[1].training
    assert model.training
    assert {p.dtype for p in model[1].parameters()} == {dtype}


def test_the_network_is_as_before_but_for_its_gates():
    model = network(eca(), nn.BatchNorm2d(CHANNELS)).train()
    own = {name: copy.copy(vars(m)) for name, m in model.named_modules() if name != "1"}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    warnings_of(model, "eca")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: vars(m).keys() for name, m in model.named_modules() if name != "1"} == {
        name: attributes.keys() for name, attributes in own.items() if not name.startswith("1.")
    } | {"1.conv": vars(model[1].conv).keys()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(m) for m in model.modules())


def test_own_forwards_of_modules_survive_the_run():
    model = network(eca())
    vars(model[1])["forward"] = lambda x: x * 0.5 * planes(means(x).sigmoid(), x)
    warnings_of(model, "se")
    assert isinstance(model[1], ecanet.ECA)
    old = model[1].attachment.replaced
    assert torch.equal(old(IMAGE), IMAGE * 0.5 * planes(means(IMAGE).sigmoid(), IMAGE))


@pytest.mark.parametrize("kind", ["product", "factor"])
def test_copies_pickles_and_gradients(kind):
    model = network(Inner(eca() if kind == "product" else factor_of(conv=conv())))
    before = model(IMAGE)
    warnings_of(model, "eca")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model[1].gate)) and model):
        y = other(IMAGE)
        assert torch.allclose(y, before, rtol=1e-5)
        y.sum().backward()
        assert other[1].gate.conv.weight.grad is not None
    assert list(model.state_dict()) == list(network(Inner(eca())).state_dict())


def test_detach_of_converted_modules_says_nothing_unless_outputs_change():
    model = network(
        eca(), Spelling(lambda m, x: x * m.conv(means(x)[:, None, :, None]).transpose(1, 2).sigmoid(), conv=conv(3, 2))
    )
    before = model(IMAGE)
    warnings_of(model, "eca")
    ecanet.detach(model)
    assert torch.equal(model(IMAGE), before)
    warnings_of(model, "eca")
    with torch.no_grad():
        model[2].conv.weight.add_(1)
    with pytest.warns(UserWarning, match="outputs change"):
        ecanet.detach(model)


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
