"""Attach and detach on random networks: bit-equal outputs and gradients, the same keys, and a way back."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ecanet
from ecanet.errors import AttachError
from random_networks import BlockPlan, NetworkPlan, build, plans

pytestmark = pytest.mark.random_cases

MOST_REFUSED = 0.05
"""The largest share of random networks that attach may refuse. It is there so that refusing all does not pass."""

ATTENTIONS = ("eca", "eca-ns", "se", "se-var2", "se-var3", "gc")


def tensors_in(result: object) -> list[Tensor]:
    """Return the tensors of an output: a tensor, a list or a dictionary."""
    if isinstance(result, dict):
        return list(result.values())
    return [result] if isinstance(result, Tensor) else list(result)  # pyright: ignore[reportArgumentType]


def run(network: nn.Module, image: Tensor, *, training: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the outputs, and the gradients of their product with random numbers in every parameter."""
    network.train(training).zero_grad(set_to_none=True)
    torch.manual_seed(0)  # dropout
    outputs = tensors_in(network(image))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(y.shape, generator=generator).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, weights)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return [y.detach() for y in outputs], gradients


def check_attach(plain: nn.Module, image: Tensor, attention: str) -> None:
    """Attach to a copy of ``plain``, compare it with ``plain`` in both modes, detach, and compare again."""
    keys, state = list(plain.state_dict()), copy.deepcopy(plain.state_dict())
    model = ecanet.attach(copy.deepcopy(plain), attention, example=image, **options_for(attention))
    assert ecanet.attached(model), "no gate"
    assert [key for key in model.state_dict() if key in set(keys)] == keys, "attach lost or moved a key"
    expected = {training: run(plain, image, training=training) for training in (False, True)}
    check_same(model, expected, image)
    model.load_state_dict(state, strict=False)  # training has moved the running statistics
    ecanet.detach(model)
    assert list(model.state_dict()) == keys, "detach left or lost a key"
    check_same(model, expected, image)


def check_same(model: nn.Module, found: dict[bool, tuple[list[Tensor], dict[str, Tensor]]], image: Tensor) -> None:
    """Hold outputs and old parameters' gradients of ``model`` to those ``found`` in each mode, bit for bit."""
    for training, (expected, gradients) in found.items():
        mode = "training" if training else "evaluation"
        actual, attached_gradients = run(model, image, training=training)
        assert len(actual) == len(expected)
        assert all(map(torch.equal, actual, expected)), f"{mode}: an output changed"
        for name, gradient in gradients.items():
            assert torch.equal(attached_gradients[name], gradient), f"{mode}: the gradient of {name} changed"


def options_for(attention: str) -> dict[str, object]:
    """Return the options that let ``attention`` fit two channels."""
    return {"reduction": 1} if attention in ("se", "gc") else {}


def test_attach_keeps_outputs_gradients_and_keys():
    counts = Counter[str]()

    @settings(max_examples=max(100, settings.default.max_examples))
    @given(plans(), st.sampled_from(ATTENTIONS))
    def check(plan: NetworkPlan, attention: str) -> None:
        plain, image = build(plan)
        counts["networks"] += 1
        try:
            check_attach(plain, image, attention)
        except AttachError:
            counts["refused"] += 1

    check()
    assert counts["refused"] <= MOST_REFUSED * counts["networks"], dict(counts)


def test_gradients_where_a_block_adds_into_a_view():
    block = BlockPlan(kind="channels_end", addition="y += x", activation="relu_", out_width=4)
    check_attach(*build(NetworkPlan(blocks=(block,), axes=3, size=16)), "eca")
