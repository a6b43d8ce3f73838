"""Layers of a gate whose weights a hook computes: pruned ones, and the older form of weight norm."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ecanet

X = torch.randn(2, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
GATES = {
    "eca": lambda: (ecanet.ECA(8, 3), "conv"),
    "eca, circular": lambda: (ecanet.ECA(8, 3, padding_mode="circular"), "conv"),
    "eca, bias": lambda: (ecanet.ECA(8, 3, bias=True), "conv"),
    "se, first layer": lambda: (ecanet.SE(8, reduction=2), "fc1"),
    "se, second layer": lambda: (ecanet.SE(8, reduction=2), "fc2"),
    "se-var3": lambda: (ecanet.SEVar3(8), "fc"),
}


def weight_norm(layer):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)


HOOKS = {"pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.4), "weight norm": weight_norm}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("make", GATES.values(), ids=GATES)
def test_a_hooked_layer_is_called(make, hook):
    gate, name = make()
    gate.double()
    before = gate(X)
    layer = gate.get_submodule(name)
    hook(layer)
    if hook is HOOKS["weight norm"]:
        torch.testing.assert_close(gate(X), before)
    optimizer = torch.optim.SGD(gate.parameters(), 1.0)
    for _ in range(2):  # a weight computed once would fail in the second backward pass
        optimizer.zero_grad()
        (gate(X) * X).sum().backward()
        optimizer.step()
    trained = gate(X)
    plain, _ = make()
    plain.double().load_state_dict({**plain.state_dict(), **select(gate.state_dict(), plain.state_dict())})
    with torch.no_grad():
        plain.get_submodule(name).weight.copy_(layer.weight)
    torch.testing.assert_close(plain(X), trained)
    assert (trained - before).abs().max() > 1e-3


def select(state, names):
    return {name: tensor for name, tensor in state.items() if name in names}
