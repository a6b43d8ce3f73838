"""A gate takes over what its module was: frozen, shared, hooked, in training, in a dtype, in a place."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ecanet
from attention_spellings import CHANNELS, ECAS, Inner, Spelling, conv, factor_of, means, planes, product
from replacing import IMAGE, eca, network, se, warnings_of
from se_spellings import excite, linear


@pytest.mark.parametrize(
    "make", [eca, se, *(ECAS[n] for n in ("bias", "Conv2d (1, k)", "weight norm", "factor alone"))]
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
    assert vars(model).pop("_origin")  # the call's arguments, from which `save_pretrained` builds the network again
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


@pytest.mark.parametrize("name", ["mean and view", "factor alone", "factor alone, expanded", "factor alone, flat"])
def test_converted_gates_are_traced(name):
    model = network(ECAS[name]())
    warnings_of(model, "eca")
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(IMAGE), model(IMAGE))
    assert dict(graph.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert torch.allclose(torch.export.export(model, (IMAGE,)).module()(IMAGE), model(IMAGE), rtol=1e-5)


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
