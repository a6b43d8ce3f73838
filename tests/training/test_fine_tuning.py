"""Photographs of one's own are fine-tuned, what was loaded is said, and other people's weights need no data."""

import json
import math
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torchvision import models

from ecanet import recipes, training
from ecanet.errors import ConfigError
from ecanet.networks import find
from ecanet.recipes import DataConfig, ModelConfig, Recipe, named
from ecanet.training import evaluate
from ecanet.training.preparation import build_data, lengthen
from ecanet.training.tasks import Classification
from photographs import make_flat, paint


@pytest.mark.parametrize("counts", [{"ant": 14, "bee": 14, "cat": 14}, {"ant": 2, "bee": 2}, {"ant": 300, "bee": 40}])
def test_a_small_folder_is_fine_tuned_for_enough_steps(tmp_path, counts):
    folder = f"folder:{make_flat(tmp_path / 'photos', counts)}"
    recipe = recipes.find(folder)
    assert (recipe.name, recipe.model.weights, recipe.data.name) == ("finetune", "default", folder)
    assert recipe.optimizer.learning_rate <= 1e-3
    images = build_data(recipe.but(data=recipe.data.but(image_size=16)))
    assert images.train is not None
    epochs = lengthen(recipe, images).epochs
    steps = math.ceil(len(images.train) // recipe.data.batch_size or 1)
    assert epochs * steps >= 60
    # No more epochs than the recipe's where these are enough.
    assert epochs == max(recipe.epochs, math.ceil(60 / steps))
    scratch = recipes.find(folder, scratch=True)
    assert (scratch.name, scratch.model.weights) == ("imagenet", None)


def test_a_large_folder_and_one_that_is_not_there_are_trained_from_scratch(tmp_path, monkeypatch):
    folder = make_flat(tmp_path / "photos", {"ant": 5, "bee": 5})
    monkeypatch.setattr(named, "SMALL_FOLDER", 10)
    assert recipes.find(f"folder:{folder}").name == "imagenet"
    monkeypatch.setattr(named, "SMALL_FOLDER", 11)
    assert recipes.find(f"folder:{folder}").name == "finetune"
    assert recipes.find("folder:nowhere").name == "imagenet"


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        ([], "finetune", "folder:photos is small: fine-tuning from pretrained weights; --weights none trains from"),
        (["--weights", "none"], "imagenet", ""),
        (["--weights", "mine.pth"], "finetune", "folder:photos is small: fine-tuning"),
    ],
)
def test_the_command_says_that_it_fine_tunes(ecanet, tmp_path, monkeypatch, options, name, said):
    make_flat(tmp_path / "photos", {"ant": 3, "bee": 3})
    given: list[Recipe] = []
    monkeypatch.setattr(training, "run", lambda recipe, **_: given.append(recipe))
    code, out, err = ecanet("train", "folder:photos", *options)
    assert (code, err, given[0].name) == (0, "", name)
    assert out.startswith(said)
    assert bool(out) == bool(said)


@pytest.mark.parametrize("classes", [10, 7])
def test_a_run_says_what_it_loaded_and_keeps_it(tmp_path, monkeypatch, capsys, classes):
    state = find("resnet8", num_classes=classes, in_channels=1, attention="none").state_dict()
    torch.save({**state, "stranger": torch.ones(1)}, tmp_path / "w.pth")
    model = ModelConfig(name="resnet8", weights=str(tmp_path / "w.pth"))
    monkeypatch.setattr(Classification, "on_train_epoch_start", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.run(Recipe(model=model), folder=tmp_path / "run", device="cpu", loggers="none")
    out = capsys.readouterr().out
    other = classes != 10
    assert f"w.pth: {len(state) - 2 * other} tensors matched" in out
    assert "unexpected: 1 (stranger)" in out
    assert "neutral: 3" in out
    assert ("new head, all zero: fc.weight, fc.bias (the weights are for other classes)" in out) == other
    kept = json.loads((tmp_path / "run" / "network.json").read_text())
    assert kept["weights"]["unexpected"] == ["stranger"]
    assert len(kept["weights"]["matched"]) == len(state) - 2 * other
    assert kept["exchanged"] == (["fc.weight", "fc.bias"] if other else [])


@pytest.mark.parametrize("name", ["squeezenet1_1", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_other_peoples_weights_predict_without_data(ecanet, tmp_path, name):
    torch.manual_seed(0)
    network = find(f"torchvision:{name}").eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    paint(tmp_path / "cat.png", 200)
    options = ["--model", f"torchvision:{name}", "--weights", "w.pth", "--device", "cpu", "--json"]
    code, out, err = ecanet("predict", *options, "cat.png", "--top", 3)
    assert (code, err) == (0, "")
    entry = models.get_model_weights(name).DEFAULT
    image = entry.transforms()(Image.open(tmp_path / "cat.png"))
    with torch.inference_mode():
        best = network(image[None]).softmax(1)[0].topk(3)
    answers = json.loads(out)[0]["classes"]
    assert [answer["name"] for answer in answers] == [entry.meta["categories"][at] for at in best.indices.tolist()]
    assert [answer["probability"] for answer in answers] == pytest.approx(best.values.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("device", "expected"),
    [("auto", ("cuda", 1)), ("cuda", ("cuda", 1)), ("cuda:0", ("cuda", [0])), ("cuda:2", ("cuda", [2]))],
)
def test_evaluation_takes_the_names_of_gpus(tmp_path, monkeypatch, device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    torch.save(find("resnet8", num_classes=10, in_channels=1).state_dict(), tmp_path / "w.pth")
    chosen: list[tuple[object, object]] = []

    def trainer(**options: Any) -> None:
        chosen.append((options["accelerator"], options["devices"]))
        raise ConfigError("enough")

    monkeypatch.setattr(L, "Trainer", trainer)
    with pytest.raises(ConfigError, match="enough"):
        evaluate(tmp_path / "w.pth", model=ModelConfig(name="resnet8"), data_name="digits", device=device)
    assert chosen == [expected]


def test_a_folder_of_42_photographs_takes_a_model_of_another_library(tmp_path):
    folder = make_flat(tmp_path / "photos", {"ant": 14, "bee": 14, "cat": 14})
    recipe = recipes.with_settings(recipes.find(f"folder:{folder}"), {"model.name": "torchvision:resnet18"})
    assert training.complete(recipe, trusted=True).data == DataConfig(
        name=f"folder:{folder}", batch_size=16, image_size=224, interpolation="bilinear"
    )
