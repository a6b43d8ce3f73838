"""The interface that tools written for timm expect, held to timm's own networks where these exist."""

import copy

import pytest
import timm
import torch
from torch import nn

import ecanet
from ecanet.errors import ConfigError

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
THEIRS = {"resnet18": "resnet18", "resnet50": "resnet50", "mobilenet_v2": "mobilenetv2_100"}


def network(name="resnet18", **options):
    torch.manual_seed(0)
    return ecanet.create_model(name, **options).eval()


@pytest.mark.parametrize("name", THEIRS)
def test_levels_are_timms(name):
    ours, theirs = network(name, features_only=True), timm.create_model(THEIRS[name], features_only=True)
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    with torch.no_grad():
        assert [x.shape for x in ours(IMAGES)] == [x.shape for x in theirs.eval()(IMAGES)]


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "mobilenet_v2"])
def test_a_level_is_what_its_module_returns(name):
    model, features = network(name), network(name, features_only=True)
    features.load_state_dict(model.state_dict(), strict=False)
    for index, level in enumerate(model.feature_info):
        seen = []
        handle = model.get_submodule(level["module"]).register_forward_hook(lambda m, a, y, seen=seen: seen.append(y))
        with torch.no_grad():
            model(IMAGES)
            expected = features(IMAGES)[index]
        handle.remove()
        torch.testing.assert_close(expected, seen[0], rtol=1e-4, atol=1e-5)
        assert expected.shape[1] == level["num_chs"]
        assert expected.shape[2] == 64 // level["reduction"]


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "mobilenet_v2"])
@pytest.mark.parametrize("out_indices", [(0,), (1, 2), (-1,), [2, 0]], ids=str)
def test_only_chosen_levels_are_computed_and_kept(name, out_indices):
    every, some = network(name, features_only=True), network(name, features_only=True, out_indices=out_indices)
    count = len(every.feature_info)
    chosen = sorted(index % count for index in out_indices)
    assert some.feature_info == [every.feature_info[index] for index in chosen]
    with torch.no_grad():
        for found, index in zip(some(IMAGES), chosen, strict=True):
            torch.testing.assert_close(found, every(IMAGES)[index])
    some.train()
    sum(x.sum() for x in some(IMAGES)).backward()
    assert all(p.grad is not None for p in some.parameters()), "DDP stops on unused parameters"


@pytest.mark.parametrize("out_indices", [(5,), (-6,), ()], ids=str)
def test_levels_that_do_not_exist(out_indices):
    with pytest.raises(ConfigError, match=r"out_indices must be indices of the 5 levels, from 0 to 4"):
        network(features_only=True, out_indices=out_indices)


def test_out_indices_need_features_only():
    with pytest.raises(ConfigError, match="out_indices needs features_only=True"):
        network(out_indices=(1,))


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "mobilenet_v2"])
def test_without_a_classifier_the_pooled_features_come_out(name):
    whole, headless = network(name), network(name, num_classes=0)
    headless.load_state_dict(whole.state_dict(), strict=False)
    with torch.no_grad():
        features = headless(IMAGES)
        assert features.shape == (2, whole.num_features)
        torch.testing.assert_close(features, whole.forward_head(whole.forward_features(IMAGES), pre_logits=True))
        torch.testing.assert_close(whole.forward_features(IMAGES).mean((2, 3)), features)
    assert isinstance(headless.get_classifier(), nn.Identity)
    assert not any(isinstance(m, nn.Linear) for m in headless.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_classifier_is_replaced(name):
    model = network(name, num_classes=7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.reset_classifier(3)
    assert (model.num_classes, model.get_classifier().out_features) == (3, 3)
    assert model(IMAGES).shape == (2, 3)
    head = "fc." if name == "resnet18" else "classifier."
    for key, value in model.state_dict().items():
        assert key.startswith(head) or torch.equal(value, before[key])
    model.reset_classifier(0)
    assert model(IMAGES).shape == (2, model.num_features)
    with pytest.raises(ConfigError, match="num_classes must be an integer of at least 0, got -1"):
        model.reset_classifier(-1)


def test_weights_of_a_whole_network_in_one_for_features(tmp_path):
    whole = network("resnet18")
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    features = network("resnet18", features_only=True, weights=tmp_path / "whole.pth")
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in features.state_dict().items())
    assert copy.deepcopy(features).feature_info == features.feature_info


def test_names_by_a_pattern():
    assert ecanet.list_models("resnet1*") == ["resnet18", "resnet101", "resnet152", "resnet14"]
    assert ecanet.list_models() == ecanet.list_models("*")
    assert ecanet.list_models("vgg*") == []


def test_gates_can_be_attached_to_a_network_of_features():
    model = network("resnet18", attention="none", features_only=True)
    with torch.no_grad():
        before = model(IMAGES)
        ecanet.attach(model, "eca", example=IMAGES)
        assert all(torch.equal(a, b) for a, b in zip(model(IMAGES), before, strict=True))
    assert len(ecanet.attached(model)) == 8


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_network_of_features_has_no_classifier(name):
    model = network(name, features_only=True)
    for call in (lambda: model.reset_classifier(3), model.get_classifier, lambda: model.forward_head(IMAGES)):
        with pytest.raises(ConfigError, match="has no classifier; build it without features_only=True"):
            call()
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
