"""The weights of a run alone: a file that `restore` takes as it takes a checkpoint, bit for bit, split and all."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ecanet.data import Split, read_split
from ecanet.errors import CheckpointError, ConfigError, DataError, EcanetError
from ecanet.networks import build
from ecanet.recipes import DataConfig, ModelConfig, Recipe
from ecanet.training import evaluate, restore, run, write_weights
from ecanet.training.preparation import build_data, find_seen
from ecanet.training.tasks import Classification
from photographs import make_flat, paint

MODEL = ModelConfig(name="resnet8", attention="eca", kernel_sizes=(3, 5, 3))


def recipe_for(photos: Path, **changes: Any) -> Recipe:
    data = DataConfig(name=f"folder:{photos}", image_size=16, batch_size=4, workers=0)
    return Recipe(data=data, model=MODEL, epochs=2, ema_decay=0.5).but(**changes)


@dataclass
class Made:
    folder: Path
    photos: Path

    def checkpoint(self, which: str) -> dict[str, Any]:
        return torch.load(self.folder / "checkpoints" / f"{which}.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two epochs on a flat folder, with averaged weights."""
    root = tmp_path_factory.mktemp("made")
    photos = make_flat(root / "photos", {"ant": 10, "bee": 10})
    run(recipe_for(photos), folder=root / "run", device="cpu", quiet=True, loggers="none")
    return Made(root / "run", photos)


@pytest.fixture(scope="module", params=["out.safetensors", pytest.param("out.pth", marks=pytest.mark.slow)])
def exported(made, request):
    """The weights of the run's last epoch in a file of their own."""
    path = made.folder.parent / request.param
    write_weights(made.folder, path, which="last")
    return path


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("name", ["a.safetensors", "b.pth"])
def test_the_file_has_the_networks_tensors_and_says_which(made, tmp_path, which, name):
    line = str(write_weights(made.folder, tmp_path / name, which=which))
    checkpoint = made.checkpoint(which)
    epoch = checkpoint["epoch"] + 1
    assert f"resnet8 with eca, averaged weights (EMA) of the {which} epoch ({epoch} of 2)" in line
    path = tmp_path / name
    found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]
    assert {f"model.{key}" for key in found} == {key for key in checkpoint["state_dict"] if key.startswith("model.")}
    assert all(torch.equal(value, checkpoint["state_dict"][f"model.{key}"]) for key, value in found.items())
    # The average differs from the weights that the optimizer changes.
    assert any(not torch.equal(v, checkpoint["current_model_state"][f"model.{k}"]) for k, v in found.items())
    assert path.stat().st_size < 0.5 * (made.folder / "checkpoints" / f"{which}.ckpt").stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_file_is_taken_as_the_checkpoint_is(made, exported, ecanet):
    last = made.folder / "checkpoints" / "last.ckpt"
    expected = evaluate(last, device="cpu")
    assert evaluate(exported, device="cpu") == expected
    task, before = restore(exported), restore(last)
    assert (task.spec, task.split, task.recipe) == (before.spec, before.split, before.recipe)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in task.state_dict().items())
    options = ["--weights", exported, "--device", "cpu", "--json"]
    named = ["--model", "resnet8", "--kernel-sizes", "3,5,3"]
    for more in ([], named):
        code, out, err = ecanet("eval", *options, *more)
        assert (code, json.loads(out)) == (0, expected), err
    answers = [
        ecanet("predict", *source, made.photos / "ant", "--device", "cpu", "--json")
        for source in ([last], [exported], ["--weights", exported], ["--weights", exported, *named])
    ]
    assert answers[0][0] == 0
    assert answers.count(answers[0]) == 4
    # A new run begins with these weights.
    state = build(MODEL.but(weights=str(exported)), num_classes=2, image=(3, 16, 16)).model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("no run", ConfigError, "run: no run here (recipe.json is missing); give the directory of a run"),
        ("not ended", ConfigError, "run is not finished; finish it (ecanet train --resume "),
        ("lengthened", ConfigError, "run is not finished; finish it (ecanet train --resume "),
        ("no checkpoint", CheckpointError, "no checkpoint at "),
        ("another file", CheckpointError, "best.ckpt: not the checkpoint of a run ('ecanet' is missing)"),
        ("suffix", ConfigError, "out.ckpt: name the file out.safetensors or out.pth"),
        ("which", ConfigError, "which weights must be best or last, got 'middle'"),
        ("file", ConfigError, "best.ckpt is a file; give the run's directory"),
        ("folder", ConfigError, "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_one_line(made, tmp_path, change, error, message):
    source, out, which = tmp_path / "run", tmp_path / "out.pth", "best"
    shutil.copytree(made.folder, source)
    best = source / "checkpoints" / "best.ckpt"
    match change:
        case "no run":
            (source / "recipe.json").unlink()
        case "not ended":
            (source / "metrics.json").unlink()
        case "lengthened":
            text = (source / "recipe.json").read_text()
            (source / "recipe.json").write_text(text.replace('"epochs": 2', '"epochs": 3'))
        case "no checkpoint":
            best.unlink()
        case "another file":
            torch.save({"state_dict": {"model.a": torch.ones(1)}}, best)
        case "suffix":
            out = tmp_path / "out.ckpt"
        case "which":
            which = "middle"
        case "file":
            source = best
        case "folder":
            (tmp_path / "taken").touch()
            out = tmp_path / "taken" / "out.pth"
    with pytest.raises(error) as caught:
        write_weights(source, out, which=which)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_the_command_writes_the_best_epoch(made, ecanet, tmp_path):
    code, out, err = ecanet("weights", made.folder, "mine.safetensors")
    assert (code, err) == (0, "")
    assert out.startswith("mine.safetensors: resnet8 with eca, averaged weights (EMA) of the best epoch")
    code, out, err = ecanet("weights", made.folder, "mine.safetensors", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    numbers = sum(value.numel() for value in load_file("mine.safetensors").values())
    assert answer == {
        "path": "mine.safetensors", "network": "resnet8", "attention": "eca", "which": "best",
        "epoch": made.checkpoint("best")["epoch"] + 1, "epochs": 2, "averaged": True, "numbers": numbers,
    }  # fmt: skip
    code, out, err = ecanet("weights", made.folder, "mine.pt")
    assert (code, out, err) == (2, "", "ecanet: mine.pt: name the file mine.safetensors or mine.pth\n")
    code, out, err = ecanet("eval", "--weights", "default", "--device", "cpu")
    assert (code, out) == (2, "")
    assert "need --model" in err


@pytest.mark.parametrize("about", [3, {"recipe": {}}, {"recipe": [], "spec": {}}, {"spec": {}}])
def test_a_file_that_says_nonsense_about_its_run_is_one_line(tmp_path, about):
    torch.save({"state_dict": {"a": torch.ones(1)}, "ecanet": about}, tmp_path / "w.pth")
    with pytest.raises(EcanetError, match=r"w\.pth: what its run says about itself is broken"):
        restore(tmp_path / "w.pth")


# what the weights have seen


def split_of(made: Made) -> Split:
    split = read_split(made.folder / "split.json")
    assert split is not None
    return split


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_images_that_the_weights_were_trained_on_are_never_held_out(made, exported, seed, share):
    recipe = recipe_for(made.photos, seed=seed)
    recipe = recipe.but(data=recipe.data.but(val_share=share))
    seen = set(split_of(made).train)
    free = build_data(recipe).split
    assert free is not None
    if seed:  # with another seed, the other run's images would be held out
        assert seen & set(free.held_out)
    for weights in (exported, made.folder / "checkpoints" / "best.ckpt"):
        begun = recipe.but(model=recipe.model.but(weights=str(weights)))
        images = build_data(begun, split=find_seen(begun))
        assert images.split is not None
        assert images.split.held_out
        assert not seen & set(images.split.held_out)
        assert {*images.split.train, *images.split.held_out} == {*free.train, *free.held_out}
        assert "none of the 16 images that the weights were trained on is held out" in images.notices


def test_a_run_begins_with_weights_of_another_one_on_a_folder_that_has_grown(made, exported, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    shutil.copytree(made.photos, photos)  # the same pictures in another place
    for at in range(30):
        paint(photos / "ant" / f"new {at}.png")
    recipe = recipe_for(photos, seed=5, model=MODEL.but(weights=str(exported)))
    monkeypatch.setattr(Classification, "on_train_epoch_start", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(recipe, folder=tmp_path / "run", device="cpu", quiet=True, loggers="none")
    split = read_split(tmp_path / "run" / "split.json")
    assert split is not None
    assert not set(split_of(made).train) & set(split.held_out)
    assert sum("new" in path for path in split.held_out) >= 4


def test_a_class_that_the_weights_have_seen_as_a_whole_is_one_line(made, exported, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(made.photos, photos)
    for path in split_of(made).held_out:
        if path.startswith("bee/"):
            (photos / path).unlink()
    recipe = recipe_for(photos, model=MODEL.but(weights=str(exported)))
    with pytest.raises(DataError, match=r"bee: every image has the path of one that the weights were trained on, so"):
        build_data(recipe, split=find_seen(recipe))


def test_other_weights_and_other_data_have_seen_nothing(made, exported, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "plain.pth")
    for weights in (None, "default", str(tmp_path / "plain.pth")):
        assert find_seen(recipe_for(made.photos, model=MODEL.but(weights=weights))) is None
    digits = Recipe(data=DataConfig(name="digits"), model=MODEL.but(weights=str(exported)))
    assert find_seen(digits) is None
