"""Settings check themselves, suggest the right name, and survive JSON."""

import dataclasses
import json

import pytest

from ecanet.errors import ConfigError
from ecanet.recipes import RECIPES
from ecanet.recipes.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    from_dict,
    parse_kernel_sizes,
    to_dict,
    with_settings,
)

# every one of them changed
OTHER = Recipe(
    name="other",
    data=DataConfig(name="folder:x", root="y", image_size=64, batch_size=2, workers=3, on_corrupt="skip"),
    model=ModelConfig(
        name="resnet50", attention="se", kernel_sizes=(3, 5, 5, 7), weights="w", options={"reduction": 4}
    ),
    optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, weight_decay=0.05, decay_norms=False),
    schedule=ScheduleConfig(name="step", warmup_epochs=0.5, step_epochs=2, factor=0.3),
    epochs=7,
    ema_decay=0.99,
    precision="bf16-mixed",
)


@pytest.mark.parametrize("recipe", [OTHER, *(make() for make in RECIPES.values())], ids=lambda r: r.name)
def test_through_json_and_back(recipe):
    text = json.dumps(to_dict(recipe))
    assert from_dict(Recipe, json.loads(text)) == recipe
    # and not because all recipes are equal
    assert from_dict(Recipe, json.loads(text)) != recipe.but(epochs=recipe.epochs + 1)


def test_lists_become_tuples_and_whole_numbers_become_rates():
    model = from_dict(ModelConfig, {"kernel_sizes": [3, 5]})
    assert model.kernel_sizes == (3, 5)
    rate = from_dict(OptimizerConfig, {"learning_rate": 1}).learning_rate
    assert rate == 1
    assert isinstance(rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "epoch is not a setting; did you mean 'epochs'?"),
        ({"data": {"batchsize": 4}}, "data.batchsize is not a setting; did you mean 'batch_size'?"),
        ({"optimizer": {"xyz": 4}}, "optimizer.xyz is not a setting; choose one of name, learning_rate"),
        ({"data": 3}, "data must be a group of settings, got 3"),
        ({"epochs": -1}, "epochs must be at least 1, got -1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"epochs": "3"}, "epochs must be a whole number, got '3'"),
        ({"data": {"batch_size": 0}}, "data.batch_size must be at least 1, got 0"),
        ({"data": {"workers": -2}}, "data.workers must be at least 0, got -2"),
        ({"data": {"eval_crop": 1.5}}, "data.eval_crop must be at most 1, got 1.5"),
        ({"data": {"on_corrupt": "x"}}, "data.on_corrupt must be 'error' or 'skip', got 'x'"),
        (
            {"model": {"kernel_sizes": [3, "x"]}},
            "model.kernel_sizes must be a text or a whole number or a list of whole numbers",
        ),
        ({"optimizer": {"name": "lamb"}}, "optimizer.name must be 'sgd' or 'adamw', got 'lamb'"),
        ({"optimizer": {"learning_rate": -0.1}}, "optimizer.learning_rate must be at least 0, got -0.1"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate must be at least 0, got nan"),
        ({"optimizer": {"nesterov": True, "momentum": 0}}, "needs optimizer.momentum above 0"),
        ({"schedule": {"warmup_epochs": 3}, "epochs": 3}, "schedule.warmup_epochs (3) must be less than epochs (3)"),
        ({"precision": "64"}, "precision must be '32' or 'bf16-mixed' or '16-mixed', got '64'"),
        ({"ema_decay": 1.01}, "ema_decay must be at most 1, got 1.01"),
        ({"channels_last": 1}, "channels_last must be true or false, got 1"),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(values, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(Recipe, values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_changes_are_checked_too():
    with pytest.raises(ConfigError, match="epochs must be at least 1"):
        Recipe().but(epochs=0)
    with pytest.raises(ConfigError, match="epochs must be at least 1"):
        dataclasses.replace(Recipe(), epochs=0)


def test_recipes_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().epochs = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_dotted_settings():
    changed = with_settings(OTHER, {"data.workers": 1, "model.options.reduction": 8, "seed": 5})
    assert (changed.data.workers, changed.model.options, changed.seed) == (1, {"reduction": 8}, 5)
    assert changed.but(data=OTHER.data, model=OTHER.model, seed=0) == OTHER
    assert OTHER.model.options == {"reduction": 4}
    with pytest.raises(ConfigError, match=r"optimiser.momentum is not a setting; did you mean 'optimizer'\?"):
        with_settings(OTHER, {"optimiser.momentum": 0.5})
    with pytest.raises(ConfigError, match=r"data.worker is not a setting; did you mean 'workers'\?"):
        with_settings(OTHER, {"data.worker": 3})


@pytest.mark.parametrize("text", ["best", "3,x", "3,,5", "-3"])
def test_kernel_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="kernel sizes"):
        parse_kernel_sizes(text)
