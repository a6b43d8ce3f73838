"""A run on a flat folder keeps its held-out images: when it resumes, when it is evaluated, and when files change."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ecanet.data import Split
from ecanet.errors import DataError
from ecanet.recipes import DataConfig, ModelConfig, Recipe
from ecanet.report import Report
from ecanet.training import evaluate, read_recipe, restore, trainer
from ecanet.training.tasks import Classification
from photographs import make_flat, paint

COUNTS = {"ant": 9, "bee": 6, "Élan": 5}


def recipe_for(photos: Path, **changes: Any) -> Recipe:
    settings = {"name": f"folder:{photos}", "image_size": 16, "batch_size": 4, "workers": 0}
    return Recipe(data=DataConfig(**settings), model=ModelConfig(name="resnet8"), epochs=3).but(**changes)


def run(recipe: Recipe, folder: Path, **options: Any) -> Report:
    return trainer.run(recipe, folder=folder, device="cpu", **{"quiet": True, **options})


def weights(report: Report) -> dict[str, Tensor]:
    return torch.load(report.last_checkpoint, weights_only=True)["state_dict"]


def equal(a: Report, b: Report) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def run_until(epoch: int, recipe: Recipe, folder: Path) -> None:
    """Train until ``epoch``, counted from 0, begins, and stop there."""
    before = Classification.on_train_epoch_start

    def start(self: Classification) -> None:
        if self.current_epoch == epoch:
            raise RuntimeError("cut off")
        before(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "on_train_epoch_start", start)
        with pytest.raises(RuntimeError, match="cut off"):
            run(recipe, folder)


def trained_on(patch: pytest.MonkeyPatch) -> set[str]:
    """Return the set that every image file read from now on is added to."""
    from ecanet.data import folders

    seen: set[str] = set()
    read = folders.read_image

    def note(path: str, channels: int) -> Tensor:
        seen.add(path)
        return read(path, channels)

    patch.setattr(folders, "read_image", note)
    return seen


def test_a_run_resumes_bit_equal_on_a_folder_that_has_changed(tmp_path, capsys):
    photos = make_flat(tmp_path / "photos", COUNTS)
    recipe = recipe_for(photos)
    whole = run(recipe, tmp_path / "whole")
    run_until(2, recipe, tmp_path / "cut")
    split = json.loads((tmp_path / "cut" / "split.json").read_text())
    assert len(split["train"]) == 16
    assert len(split["held_out"]) == 4
    # With these files a new split would hold out others.
    for at in range(40):
        paint(photos / "ant" / f"new {at}.png")
    paint(photos / "wasp" / "0.png")
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        seen = trained_on(patch)
        resumed = run(recipe, tmp_path / "cut", resume=True, quiet=False)
    assert capsys.readouterr().err.startswith(f"not used: 41 images of {photos} that the run's split does not have")
    assert seen == {str(photos / path) for part in split.values() for path in part}
    assert equal(whole, resumed)
    assert [row["top1"] for row in whole.history] == [row["top1"] for row in resumed.history]


def test_a_run_stopped_before_its_first_checkpoint_keeps_its_split(tmp_path, capsys):
    photos = make_flat(tmp_path / "photos", COUNTS)
    run_until(0, recipe_for(photos), tmp_path / "run")
    before = (tmp_path / "run" / "split.json").read_text()
    make_flat(photos, {"ant": 60})
    capsys.readouterr()
    run(recipe_for(photos, epochs=3), tmp_path / "run", resume=True)
    assert capsys.readouterr().err == ""  # quiet
    assert (tmp_path / "run" / "split.json").read_text() == before


def test_an_ablation_names_ignored_files_once(tmp_path):
    from ecanet.studies.ablate.variants import plan

    photos = make_flat(tmp_path / "photos", COUNTS)
    (photos / "notes.txt").touch()
    said: list[str] = []
    plan(recipe_for(photos), ["se"], said.append)
    assert said == [f"ignored 1 file that is no image: notes.txt (in {photos})"]


def test_evaluation_takes_the_images_that_the_run_held_out(tmp_path, capsys):
    photos = make_flat(tmp_path / "photos", COUNTS)
    report = run(recipe_for(photos, epochs=1), tmp_path / "run")
    held_out = json.loads((tmp_path / "run" / "split.json").read_text())["held_out"]
    make_flat(photos, {"bee": 30, "new": 2})
    (tmp_path / "run" / "split.json").unlink()  # the checkpoint has it too
    with pytest.MonkeyPatch.context() as patch:
        seen = trained_on(patch)
        found = evaluate(tmp_path / "run")
    assert seen == {str(photos / path) for path in held_out}
    assert found["top1"] == report.metrics["top1"]
    assert "not used: 26 images" in capsys.readouterr().err
    victim = photos / held_out[-1]
    victim.unlink()
    with pytest.raises(DataError, match=f"{victim}: in the run's split, but gone"):
        evaluate(tmp_path / "run")
    evaluate(tmp_path / "run", on_corrupt="skip")
    assert f"skipped: {victim}: no such file" in capsys.readouterr().err


def test_inspection_reads_the_images_that_the_run_held_out(tmp_path):
    from ecanet.studies.gates import pages

    photos = make_flat(tmp_path / "photos", COUNTS)
    run(recipe_for(photos, epochs=1), tmp_path / "run")
    held_out = json.loads((tmp_path / "run" / "split.json").read_text())["held_out"]
    with pytest.MonkeyPatch.context() as patch:
        seen = trained_on(patch)
        pages.run(tmp_path / "run", tmp_path / "page")
    assert seen == {str(photos / path) for path in held_out}


def test_the_runs_folder_in_another_place_is_evaluated_without_training_images(tmp_path, capsys):
    photos = make_flat(tmp_path / "photos", COUNTS)
    report = run(recipe_for(photos, epochs=1), tmp_path / "run")
    photos.rename(tmp_path / "moved")
    found = evaluate(tmp_path / "run", data_name=f"folder:{tmp_path / 'moved'}")
    assert found["top1"] == report.metrics["top1"]
    assert "not evaluated: 16 images" in capsys.readouterr().err
    task = restore(tmp_path / "run")
    assert isinstance(task.split, Split)
    assert len(task.split.held_out) == 4


def test_a_split_that_is_not_the_checkpoints_is_refused(tmp_path):
    photos = make_flat(tmp_path / "photos", COUNTS)
    recipe = recipe_for(photos)
    run_until(1, recipe, tmp_path / "run")
    path = tmp_path / "run" / "split.json"
    good = path.read_text()
    split = json.loads(good)
    split["train"][0], split["held_out"][0] = split["held_out"][0], split["train"][0]
    for content in (json.dumps(split), None):
        path.unlink()
        if content is None:
            make_flat(photos, {"ant": 30})  # so that a new split is another one
        else:
            path.write_text(content)
        with pytest.raises(DataError, match=r"are not those of the checkpoint; restore the run's split\.json"):
            run(recipe, tmp_path / "run", resume=True)
        path.write_text(good)
    for name in COUNTS:
        for part in ("train", "val"):
            shutil.copytree(photos / name, tmp_path / "parts" / part / name)
    shutil.rmtree(photos)
    (tmp_path / "parts").rename(photos)
    with pytest.raises(DataError, match="now has train/ and val/, but the run has split"):
        run(recipe, tmp_path / "run", resume=True)


def test_the_command_line_splits_and_says_so(ecanet, tmp_path):
    photos = make_flat(tmp_path / "photos", {"cat": 6, "dog": 6})
    (photos / "cat" / "notes.txt").touch()
    options = [
        "--model",
        "resnet8",
        "--weights",
        "none",
        "--epochs",
        1,
        "--device",
        "cpu",
        "--set",
        "data.image_size=16",
    ]
    options += ["--set", "data.workers=0"]
    code, out, err = ecanet("train", "folder:photos", *options, "--out", "run", "--val-share", "0.5")
    assert (code, err) == (0, "ignored 1 file that is no image: cat/notes.txt (in photos)\n")
    assert "6 training and 6 held-out images (split.json)" in out
    code, out, err = ecanet("eval", "run", "--device", "cpu")
    assert (code, out.split()[0]) == (0, "val_loss")
    shutil.copytree(photos, tmp_path / "parts" / "train")
    shutil.copytree(photos, tmp_path / "parts" / "val")
    for wrong, message in (("0.2", "is for a folder without held-out images"), ("2", "must be between 0 and 1")):
        code, _, err = ecanet("train", "folder:parts", *options, "--val-share", wrong)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


@pytest.mark.slow
def test_a_killed_run_on_a_flat_folder_resumes_bit_equal(tmp_path):
    photos = make_flat(tmp_path / "photos", {"ant": 60, "bee": 30, "cat": 90})
    recipe = recipe_for(photos, epochs=6)
    command = [sys.executable, "-m", "ecanet", "train", f"folder:{photos}", "--model", "resnet8", "--epochs", "6"]
    command += ["--weights", "none"]
    command += ["--device", "cpu", "--batch-size", "4", "--set", "data.image_size=16", "--set", "data.workers=0"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            if line.startswith("epoch 3/6"):
                os.kill(process.pid, signal.SIGKILL)
                break
    make_flat(photos, {"ant": 100})
    recipe = read_recipe(tmp_path / "run")
    resumed = run(recipe, tmp_path / "run", resume=True)
    for at in range(60, 100):
        (photos / "ant" / f"{at}.png").unlink()
    assert equal(resumed, run(recipe, tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_share_one_split(tmp_path):
    photos = make_flat(tmp_path / "photos", {"ant": 20, "bee": 10})
    (photos / "ant" / "x.txt").touch()
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613", "-m", "ecanet"]
    options = ["train", f"folder:{photos}", "--model", "resnet8", "--epochs", "2", "--device", "cpu", "--out"]
    options += [str(tmp_path / "run"), "--set", "data.image_size=16", "--set", "data.workers=0"]
    options += ["--batch-size", "4", "--set", "data.sampler=balanced"]
    done = subprocess.run([sys.executable, *command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ignored 1 file") == 1
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert {name: len(part) for name, part in split.items()} == {"train": 24, "held_out": 6}
