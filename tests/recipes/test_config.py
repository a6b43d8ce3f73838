"""Settings check themselves, suggest the right name, and survive JSON."""

import dataclasses
import json
import math

import numpy as np
import pytest

from ecanet.errors import ConfigError
from ecanet.recipes import (
    RECIPES,
    DataConfig,
    DetectorConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    find,
    from_dict,
    parse_kernel_sizes,
    to_dict,
    with_settings,
)

# Settings of every kind, all different from the defaults.
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
    # Recipes are not all equal.
    assert from_dict(Recipe, json.loads(text)) != recipe.but(epochs=recipe.epochs + 1)


def test_lists_become_tuples_and_integers_become_floats():
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
        ({"epochs": 2.5}, "epochs must be an integer, got 2.5"),
        ({"epochs": True}, "epochs must be an integer, got True"),
        ({"epochs": "3"}, "epochs must be an integer, got '3'"),
        ({"data": {"batch_size": 0}}, "data.batch_size must be at least 1, got 0"),
        ({"data": {"workers": -2}}, "data.workers must be at least 0, got -2"),
        ({"data": {"eval_crop": 1.5}}, "data.eval_crop must be at most 1, got 1.5"),
        ({"data": {"on_corrupt": "x"}}, "data.on_corrupt must be 'error' or 'skip', got 'x'"),
        (
            {"model": {"kernel_sizes": [3, "x"]}},
            "model.kernel_sizes must be a string or an integer or a list of integers",
        ),
        ({"optimizer": {"name": "lamb"}}, "optimizer.name must be 'sgd' or 'adamw', got 'lamb'"),
        ({"optimizer": {"learning_rate": -0.1}}, "optimizer.learning_rate must be at least 0, got -0.1"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate must be a finite number, got nan"),
        ({"optimizer": {"nesterov": True, "momentum": 0}}, "needs optimizer.momentum above 0"),
        ({"schedule": {"warmup_epochs": 3}, "epochs": 3}, "schedule.warmup_epochs (3) must be less than epochs (3)"),
        ({"precision": "64"}, "precision must be '32' or 'bf16-mixed' or '16-mixed', got '64'"),
        ({"mixup": 1e-320}, "mixup must be 0 or from 0.001 to 1000, got 9.99989e-321"),
        ({"cutmix": 1e308}, "cutmix must be at most 1000, got 1e+308"),
        ({"ema_decay": 1.01}, "ema_decay must be at most 1, got 1.01"),
        ({"channels_last": 1}, "channels_last must be true or false, got 1"),
    ],
)
def test_a_wrong_setting_is_named_with_the_remedy(values, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(Recipe, values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(epoch=3), "epoch is not a setting of Recipe; did you mean 'epochs'?"),  # pyright: ignore[reportCallIssue]
        (lambda: find("quickstart").but(epoch=1), "epoch is not a setting of Recipe; did you mean 'epochs'?"),
        (lambda: DataConfig(batchsize=4), "batchsize is not a setting of DataConfig; did you mean 'batch_size'?"),  # pyright: ignore[reportCallIssue]
        (lambda: DataConfig().but(xyz=4), "xyz is not a setting of DataConfig; choose one of name, root, image_size"),
        (lambda: ModelConfig("resnet50"), "ModelConfig takes settings by name, such as name=..., got 'resnet50'"),  # pyright: ignore[reportCallIssue]
        (lambda: Recipe(data={"name": "digits"}), "data must be a DataConfig, got {'name': 'digits'}"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_a_misspelt_keyword_is_an_error_with_a_suggestion(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", [Recipe, DataConfig, ModelConfig, DetectorConfig, OptimizerConfig, ScheduleConfig])
def test_every_group_of_settings_refuses_an_unknown_keyword(cls):
    with pytest.raises(ConfigError, match=f"nonsense is not a setting of {cls.__name__}; choose one of"):
        cls(nonsense=1)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, np.float32("nan"), 10**400])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (OptimizerConfig, "learning_rate"),
        (OptimizerConfig, "weight_decay"),
        (ScheduleConfig, "warmup_epochs"),
        (DataConfig, "eval_crop"),
        (Recipe, "mixup"),
        (Recipe, "ema_decay"),
    ],
)
def test_numbers_are_finite(cls, name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a finite number"):
        cls(**{name: value})


@pytest.mark.parametrize("name", ["epochs", "accumulate", "seed"])
def test_an_integer_is_not_infinite(name):
    with pytest.raises(ConfigError, match=f"{name} must be an integer, got inf"):
        Recipe(**{name: math.inf})


def test_numbers_of_an_attention_are_finite_too():
    with pytest.raises(ConfigError, match=r"options.inner.ratio must be a finite number, got nan"):
        ModelConfig(options={"inner": {"ratio": math.nan}})


def test_numpys_numbers_are_numbers():
    recipe = Recipe(
        epochs=np.int64(3),  # pyright: ignore[reportArgumentType]
        seed=np.uint8(7),  # pyright: ignore[reportArgumentType]
        mixup=np.float32(0.5),  # pyright: ignore[reportArgumentType]
        cutmix=np.int32(1),  # pyright: ignore[reportArgumentType]
        optimizer=OptimizerConfig(learning_rate=np.float64(0.1)),
        model=ModelConfig(
            kernel_sizes=(np.int64(3), np.int64(5)), options={"reduction": np.int64(8), "x": [np.float32(0.5)]}
        ),
    )
    same = Recipe(
        epochs=3,
        seed=7,
        mixup=0.5,
        cutmix=1.0,
        optimizer=OptimizerConfig(learning_rate=0.1),
        model=ModelConfig(kernel_sizes=(3, 5), options={"reduction": 8, "x": [0.5]}),
    )
    assert recipe == same
    # The json module accepts Python's numbers only.
    assert json.loads(json.dumps(to_dict(recipe))) == json.loads(json.dumps(to_dict(same)))
    assert type(ModelConfig(kernel_sizes=np.int64(3)).kernel_sizes) is int  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="epochs must be an integer"):
        Recipe(epochs=np.float64(3))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="epochs must be at least 1, got 0"):
        Recipe(epochs=np.int64(0))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("change", [Recipe.but, lambda recipe, **changes: with_settings(recipe, changes)])
def test_a_warmup_that_is_too_long_shrinks_with_the_epochs(change):
    recipe = find("quickstart")
    assert (recipe.epochs, recipe.schedule.warmup_epochs) == (12, 2)
    for epochs, warmup in [(1, 1 / 6), (2, 1 / 3), (np.int64(2), 1 / 3), (3, 2), (24, 2)]:
        changed = change(recipe, epochs=epochs)
        assert (changed.epochs, changed.schedule.warmup_epochs) == (epochs, pytest.approx(warmup))
        assert changed.schedule.but(warmup_epochs=2) == recipe.schedule
    with pytest.raises(ConfigError, match="epochs must be at least 1, got 0"):
        change(recipe, epochs=0)


def test_a_warmup_that_is_set_does_not_shrink():
    recipe = find("quickstart")
    with pytest.raises(ConfigError, match=r"warmup_epochs \(3\) must be less than epochs \(1\)"):
        recipe.but(epochs=1, schedule=ScheduleConfig(warmup_epochs=3))
    with pytest.raises(ConfigError, match=r"warmup_epochs \(3\) must be less than epochs \(1\)"):
        with_settings(recipe, {"epochs": 1, "schedule.warmup_epochs": 3})


def test_an_attention_is_any_string():
    assert ModelConfig(attention="mypackage.gates.MyGate").attention == "mypackage.gates.MyGate"


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
def test_wrong_kernel_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="kernel sizes"):
        parse_kernel_sizes(text)
