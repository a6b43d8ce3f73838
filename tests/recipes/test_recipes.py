"""Recipes have the settings of their papers, and are found by name."""

import pytest
import torch

from ecanet.errors import ConfigError
from ecanet.recipes import RECIPES, find
from ecanet.recipes.groups import ScheduleConfig
from ecanet.recipes.named import RECIPE_FOR_DATA
from ecanet.training.tasks import learning_rate_factor


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_found_by_its_name(name):
    assert find(name).name == name
    assert RECIPES[name].__doc__


@pytest.mark.parametrize("name", RECIPE_FOR_DATA)
def test_a_data_set_has_a_recipe(name):
    assert find(name).data.name == name


def test_folders_get_the_papers_recipe():
    assert find("folder:/photos").data.name == "folder:/photos"
    assert find("folder:/photos").epochs == 100


@pytest.mark.parametrize(
    ("wrong", "right"), [("quickstat", "quickstart"), ("imagenet_a4", "imagenet_a3"), ("digit", "digits")]
)
def test_a_misspelt_name_gets_a_suggestion(wrong, right):
    with pytest.raises(ConfigError, match=f"{wrong}.*did you mean '{right}'"):
        find(wrong)


def test_the_papers_resnet_recipe():
    recipe = find("imagenet")
    assert (recipe.epochs, recipe.data.batch_size, recipe.data.image_size, recipe.data.eval_crop) == (
        100,
        256,
        224,
        0.875,
    )
    o = recipe.optimizer
    assert (o.name, o.learning_rate, o.base_batch, o.momentum, o.weight_decay) == ("sgd", 0.1, 256, 0.9, 1e-4)
    assert (o.nesterov, o.decay_norms) == (False, True)
    assert (recipe.label_smoothing, recipe.mixup, recipe.cutmix, recipe.ema_decay) == (0, 0, 0, None)
    # An epoch has 5,005 steps. The learning rate is constant within it, and is divided by 10 after epochs 30, 60, 90.
    expected = {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 1e-3, 90: 1e-4, 99: 1e-4}
    for epoch, rate in expected.items():
        for step in (0, 2500, 5004):
            at = (epoch * 5005 + step) / 5005
            assert 0.1 * learning_rate_factor(recipe.schedule, at, 100) == pytest.approx(rate, rel=1e-12)


def test_the_papers_mobilenet_recipe():
    recipe = find("imagenet_mobilenet")
    assert (recipe.model.name, recipe.epochs, recipe.data.batch_size) == ("mobilenet_v2", 400, 96)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == (0.045, 4e-5)
    rate = 1.0
    for epoch in range(400):
        assert learning_rate_factor(recipe.schedule, epoch + 0.7, 400) == pytest.approx(rate, rel=1e-10)
        rate *= 0.98


@pytest.mark.parametrize("warmup", [0, 2])
def test_the_cosine_schedule_equals_torchs(warmup):
    # torch has an independent implementation of the same curve.
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10 - warmup)
    schedule = ScheduleConfig(name="cosine", warmup_epochs=warmup)
    for epoch in range(warmup, 11):
        assert learning_rate_factor(schedule, epoch, 10) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_warmup_is_linear():
    schedule = ScheduleConfig(name="constant", warmup_epochs=4)
    assert [learning_rate_factor(schedule, epoch, 9) for epoch in (0, 1, 2, 3.5, 4, 8.9)] == [0, 0.25, 0.5, 0.875, 1, 1]
