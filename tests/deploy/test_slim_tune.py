"""`ecanet.slim` tunes constants and norms on the images to fit with, and keeps nothing that does not help."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import ecanet
from ecanet.deploy import slim_tune
from ecanet.deploy.slim_fit import Frozen, fit
from ecanet.deploy.slim_judge import answer, mean_divergence
from ecanet.deploy.slim_tune import tune
from slim_networks import IMAGES, make_model


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr("ecanet.deploy.slim_tune.STEPS", 4)


AFFINE = ("weight", "bias")


def tune_one(monkeypatch, **settings):
    """Tune the constants of two gates of a network; return the divergence before and after it, and what it needs."""
    for name, value in settings.items():
        monkeypatch.setattr(f"ecanet.deploy.slim_tune.{name}", value)
    model, images = make_model(), [IMAGES[:40], IMAGES[40:]]
    said = answer(model, images, None)
    names = ["layer2.0.eca", "layer3.0.eca"]
    gates = {model.get_submodule(name): name != names[0] for name in names}
    constants = fit(model, gates, images)
    frozen = {}
    for name, constant in zip(names, constants.values(), strict=True):
        gate = Frozen(constant, torch.zeros(1))
        frozen[gate] = constant
        model.get_submodule(name.rpartition(".")[0]).eca = gate
    before = mean_divergence(said, answer(model, images, None))
    state = copy.deepcopy(model.state_dict())
    model.conv1.requires_grad_(False)
    tuned = tune(model, frozen, images, said)
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, state[key])}
    affines = {f"{name}.{key}" for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) for key in AFFINE}
    assert moved == (set() if all(tuned[gate] is one for gate, one in frozen.items()) else affines)
    assert all(p.grad is None and p.requires_grad == (key != "conv1.weight") for key, p in model.named_parameters())
    return before, mean_divergence(said, answer(model, images, None)), frozen, tuned


def test_tuning_makes_the_divergence_small_and_moves_scales_and_biases_alone(monkeypatch):
    before, after, frozen, tuned = tune_one(monkeypatch, STEPS=40)
    assert after < 0.9 * before
    first, second = tuned.values()
    assert not first.bias.any(), "the layer behind the first gate takes no bias"
    assert second.bias.any()
    for gate, constant in tuned.items():  # what was measured is what will be folded
        assert torch.equal(gate.scale, constant.scale.float())
        assert torch.equal(gate.bias, constant.bias.float())
        assert not torch.equal(constant.scale, frozen[gate].scale)


def test_steps_see_every_image_before_one_comes_again_and_in_no_order(monkeypatch):
    monkeypatch.setattr(slim_tune, "BATCH", 4)
    sizes = [(6, 8), (5, 8), (3, 6)]
    batches = [torch.full((count, 3, side, side), 0.0) for count, side in sizes]
    for number, batch in enumerate(batches):
        batch += 10 * number + torch.arange(len(batch))[:, None, None, None]
    said = answer(torch.nn.Flatten(), [batch[:, :, 0, 0] for batch in batches], None)
    for number, (one, batch) in enumerate(zip(said, batches, strict=True)):
        said[number] = replace(one, log_probabilities=batch[:, :, 0, 0])
    parts = slim_tune.draw_parts(batches, said)
    seen = []
    for _ in range(4):  # 11 images of one size in three parts, 3 of the other in one
        images, logs = next(parts)
        assert torch.equal(images[:, :, 0, 0], logs)
        seen.append(images[:, 0, 0, 0].tolist())
    numbers = [number for part in seen for number in part]
    assert sorted(numbers) == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 20, 21, 22]
    assert numbers != sorted(numbers)
    assert any(min(part) < 10 <= max(part) < 20 for part in seen), "images of one batch stay together"


def test_tuning_that_fails_changes_nothing(monkeypatch):
    before, after, frozen, tuned = tune_one(monkeypatch, RATE=50.0)
    assert after == before
    assert tuned == frozen


@pytest.mark.parametrize("budget", [0.1, 0.11])
def test_a_gate_that_is_kept_leaves_nothing_of_its_tuning(monkeypatch, budget):
    seen = []

    def change(model, gates, batches, before):
        model.bn1.weight.data.mul_(1 + 1e-4 * (1 + len(seen)))
        seen.append(model.bn1.weight.detach().clone())
        return {gate: replace(constant, bias=constant.bias + 1e-6) for gate, constant in gates.items()}

    module = sys.modules["ecanet.deploy.slim"]
    monkeypatch.setattr(module, "tune", change)
    monkeypatch.setattr(module, "UNTUNED", -1)
    model = make_model()
    result, report = ecanet.slim(model, IMAGES, budget=budget)
    assert len(seen) == len(report.folded) + 1 < 4
    assert torch.equal(result.bn1.weight, [model.bn1.weight, *seen][-2])


def test_judging_images_have_no_part_in_the_constants():
    results = []
    for other in (IMAGES, -IMAGES, IMAGES.flip(3)):
        images = IMAGES.clone()
        images[1::2] = other[1::2]
        results.append(ecanet.slim(make_model(), images, budget=0.99))
    assert [gate.name for gate in results[0][1].folded] == [gate.name for gate in results[1][1].folded]
    states = [model.state_dict() for model, _ in results]
    assert all(torch.equal(states[0][key], state[key]) for state in states[1:] for key in states[0])
    assert results[0][1].changed != results[1][1].changed


def test_images_that_all_judge_have_no_part_in_the_constants():
    results = [ecanet.slim(make_model(), x, budget=0.99, fit_images=-IMAGES) for x in (IMAGES, 2 * IMAGES[:40])]
    states = [model.state_dict() for model, _ in results]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert results[0][1].changed != results[1][1].changed
