"""What a checkpoint or recipe.json says about its run is data with bounds, in every command that reads it."""

import importlib
import json
import shutil
import sys
from typing import Any

import pytest
import torch
from PIL import Image

import ecanet as library
from bounds import bounded
from ecanet import training
from ecanet.recipes import DataConfig, ModelConfig, Recipe, to_dict

RECIPE = Recipe(
    name="made", data=DataConfig(name="digits", batch_size=64, workers=0), model=ModelConfig(name="resnet8")
)
SPEC = {"class_names": [str(i) for i in range(10)], "channels": 1, "size": 8, "mean": [0.3], "std": [0.3]}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Import first what the commands import, so that it is not measured."""
    for room in ("training", "studies.gates"):
        importlib.import_module(f"ecanet.{room}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run that has written its checkpoints, as far as the commands look at it, and an image."""
    torch.manual_seed(0)
    state = library.create_model("resnet8", num_classes=10, in_channels=1).state_dict()
    folder = tmp_path_factory.mktemp("made")
    content = {
        "epoch": 0,
        "state_dict": {f"model.{name}": value for name, value in state.items()},
        "ecanet": {"recipe": to_dict(RECIPE), "spec": SPEC, "split": None, "batch": 64},
    }
    (folder / "run" / "checkpoints").mkdir(parents=True)
    torch.save(content, folder / "run" / "checkpoints" / "best.ckpt")
    (folder / "run" / "recipe.json").write_text(json.dumps(to_dict(RECIPE)))
    report = {"metrics": {}, "history": [], "seconds": 1, "parameters": 1, "environment": {}}
    (folder / "run" / "metrics.json").write_text(json.dumps({"recipe": to_dict(RECIPE), **report}))
    Image.new("L", (8, 8)).save(folder / "picture.png")
    return folder


def change(values: dict[str, Any], path: str, value: object) -> None:
    *groups, last = path.split(".")
    for group in groups:
        values = values[group]
    values[last] = value


def nest(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


RECIPES = {
    "data.workers": (100_000, "data.workers must be at most 512, got 100000"),
    "data.image_size": (10**7, "data.image_size must be at most 4096"),
    "data.crop_padding": (10**9, "data.crop_padding must be at most 256"),
    "data.batch_size": (2**40, "data.batch_size must be at most 65536"),
    "epochs": (2**62, "epochs must be at most 1000000"),
    "accumulate": (2**80, "accumulate must be at most 9007199254740992"),
    "seed": (10**500, "seed must be at most 4294967295, got an integer of 1,661 bits"),
    "model.options": ({"num_classes": 3}, "options are the attention's own, such as reduction; 'num_classes' is none"),
    "model.options.reduction": (10**30, "model.options.reduction must be at most"),
    "model.options.deep": (nest(300), "is nested more than 8 times"),
    "model.kernel_sizes": (10**9, "model.kernel_sizes must be at most 1023"),
    "model.kernel_sizes ": ([3, 10**9, 3], "model.kernel_sizes must be at most 1023"),
    "detector.scales": ([10**6], "detector.scales must be at most 4096"),
    "detector.frozen_stages": (10**9, "detector.frozen_stages must be at most 5"),
    "name": ("n" * 300, "name has 300 characters, at most 200 are allowed"),
    "name ": ("../../home", "name must be the name of a folder, without slashes"),
    "name  ": ("a\0b", r"name holds control characters: 'a\x00b'"),
    "model.name": ("resnet\ud8008", r"model.name holds half of a character"),
    "data.name": ("\x1b]0;owned\x07digits", "data.name holds control characters"),
    "data.root": ("r" * 10**6, "data.root has 1,000,000 characters, at most 4,096 are allowed"),
    "schedule.milestones": ([1] * (2**17 + 1), "schedule.milestones has 131,073 values; at most 131,072 are allowed"),
    "optimizer.learning_rate": (nest(300), "optimizer.learning_rate must be a finite number"),
    "data": (nest(300), "data must be a group of settings"),
    "\u2028" * 10**6: (1, "is not a setting"),
}
"""A setting, with a value beyond the limits and what is said about it."""

SPECS = {
    "class_names": ([], "class_names=()"),
    "class_names ": (["x" * 2000], "class_names=('xxx"),
    "class_names  ": (["\ud800"] * 10, r"class_names=('\ud800'"),
    "class_names   ": ([f"{i}" for i in range(2**17 + 1)], "class_names=('0', '1'"),
    "channels": (10**9, "channels=1000000000"),
    "channels ": (3, "3 channels, but 1 means"),
    "size": (10**9, "size=1000000000"),
    "mean": ("no", "mean='no'"),
    "mean ": ([float("nan")], "mean=(nan,)"),
    "std": ([0], "std=(0,)"),
    "crop": (float("inf"), "crop=inf"),
    "interpolation": ([[]], "interpolation=([],)"),
    "more": (1, "unknown field 'more'"),
}
SPLITS = [3, {}, {"train": 3, "held_out": []}, {"train": ["a/b"], "held_out": ["a/../../etc/passwd"]}]

CHANGES = [
    *((f"recipe.{path}", value, says) for path, (value, says) in RECIPES.items()),
    *((f"spec.{path}", value, says) for path, (value, says) in SPECS.items()),
    *(("split", value, "the list of a run's images is broken") for value in SPLITS),
    ("recipe", 3, "says about itself is broken"),
    ("spec", None, "says about itself is broken"),
]
COMMANDS = ["eval FILE", "predict FILE picture.png", "detect FILE picture.png", "inspect FILE", "weights RUN out.pth"]


@pytest.mark.parametrize(("path", "value", "says"), CHANGES, ids=[path.strip()[:40] for path, *_ in CHANGES])
def test_a_description_out_of_bounds_is_one_line(made, ecanet, tmp_path, path, value, says):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    shutil.copy(made / "picture.png", tmp_path)
    file = run / "checkpoints" / "best.ckpt"
    content = torch.load(file, weights_only=True)
    change(content["ecanet"], path.rstrip(" ") if path.isascii() else path, value)
    torch.save(content, file)
    line = COMMANDS[CHANGES.index((path, value, says)) % len(COMMANDS)]  # they share the reader
    with bounded(2, 2 * file.stat().st_size + 2**25):
        code, out, err = ecanet(*line.replace("FILE", str(file)).replace("RUN", str(run)).split())
    assert (code, out) == (2, ""), err
    assert says in err
    assert (err.count("\n"), len(err) < 800) == (1, True)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in ("name  ", "model.name")])
def test_a_recipe_that_was_edited_by_hand_is_one_line(made, ecanet, tmp_path, path):
    value, says = RECIPES[path]
    recipe = to_dict(RECIPE)
    change(recipe, path.rstrip(" ") if path.isascii() else path, value)
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    with bounded(2, 2**25):
        code, out, err = ecanet("train", "--resume", "run")
    assert (code, out) == (2, "")
    assert says in err or "recipe.json: not JSON (it has more than 1,048,576 bytes)" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, f'{{"seed": 1{"0" * 5000}}}', '{"a":' * 10**5, "3", "null", '"\\ud800"', "{", "\xff\xfe", "{}" * 9],
)
def test_a_recipe_that_is_no_recipe_is_one_line(made, ecanet, tmp_path, text):
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / "recipe.json").write_bytes(text.encode("latin-1"))
    for line in ("train --resume run", "weights run out.pth"):
        code, out, err = ecanet(*line.split())
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "recipe.json: " in err


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe.model.name": "torchvision:vit_h_14", "recipe.model.attention": "none"},
        {"spec.class_names": [str(i) for i in range(2**17)], "recipe.model.name": "resnet50"},
    ],
)
def test_a_network_far_larger_than_its_file_is_not_built(made, ecanet, tmp_path, changes):
    file = tmp_path / "small.pth"
    content = torch.load(made / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    for path, value in changes.items():
        change(content["ecanet"], path, value)
    torch.save(content, file)
    shutil.copy(made / "picture.png", tmp_path)
    with bounded(4, 2**28):
        code, out, err = ecanet("predict", file, "picture.png")
    assert (code, out) == (2, "")
    assert "the file cannot hold them; take another checkpoint" in err


def test_a_recipe_of_a_larger_machine_is_evaluated_with_the_processes_of_this_one(made, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    content = torch.load(made / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    content["ecanet"]["recipe"]["data"]["workers"] = 64
    torch.save(content, tmp_path / "file.ckpt")
    assert training.restore(tmp_path / "file.ckpt").recipe.data.workers == 2


def test_an_attention_that_only_a_checkpoint_names_is_not_imported(made, ecanet, tmp_path, monkeypatch):
    """To import a module runs it, and a module may lie in the folder beside the checkpoint."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strange.py").write_text(
        "from pathlib import Path\nfrom ecanet import SE\nPath('ran').touch()\nclass Gate(SE):\n    pass\n"
    )
    torch.manual_seed(0)
    content = torch.load(made / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    content["ecanet"]["recipe"]["model"]["attention"] = "strange.Gate"
    torch.save(content, tmp_path / "file.ckpt")
    shutil.copy(made / "picture.png", tmp_path)
    for line in ("eval file.ckpt", "predict file.ckpt picture.png", "inspect file.ckpt"):
        code, out, err = ecanet(*line.split())
        assert (code, out) == (2, "")
        assert "attention 'strange.Gate' is code that nobody has named on this machine, and it would run" in err
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(content["ecanet"]["recipe"]))
    assert "'strange.Gate' is code that nobody has named" in ecanet("train", "--resume", "run")[2]
    assert not (tmp_path / "ran").exists()
    ecanet("eval", "file.ckpt", "--model", "resnet8", "--attention", "strange.Gate")
    assert (tmp_path / "ran").exists()
    monkeypatch.delitem(sys.modules, "strange")
    assert "nobody has named" not in ecanet("eval", "file.ckpt")[2]  # now it is known here
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "strange.py").rename(tmp_path / "elsewhere" / "strange.py")
    monkeypatch.delitem(sys.modules, "strange")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    assert "nobody has named" in ecanet("eval", "file.ckpt")[2]  # the same name, but another module
