"""A run that is stopped anywhere, also within an epoch, ends exactly as one that was never stopped."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from ecanet.data.scenes import SceneConfig, make_scenes
from ecanet.recipes import CheckpointConfig, DataConfig, ModelConfig, Recipe, find, to_dict, with_settings
from ecanet.report import Report
from ecanet.shards import pack
from ecanet.training import checkpoints
from photographs import make_flat
from tiny_runs import TINY, add_tiny, content, run

TIMED = ("images_per_second", "seconds")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    add_tiny(monkeypatch)


class StopError(BaseException):
    """An interruption that no code of a run handles."""


class StopAt(L.Callback):
    """Interrupts a run after a number of its batches, of training and of validation together."""

    def __init__(self, batches: int):
        self.left = batches

    def count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise StopError

    def on_train_batch_start(self, *_: Any) -> None:
        self.count()

    def on_validation_batch_start(self, *_: Any) -> None:
        self.count()


def stop_in_writing(patch: pytest.MonkeyPatch, after: int) -> None:
    """Interrupt the run when a checkpoint is half written, after a number of whole ones."""
    written = []
    save = torch.save

    def save_half(values: Any, path: Path) -> None:
        save(values, path)
        if len(written) == after:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise StopError
        written.append(path)

    patch.setattr(checkpoints.torch, "save", save_half)


def train_in_pieces(recipe: Recipe, folder: Path, *, seed: int, kills: int) -> Any:
    """Return the report of a run that is interrupted ``kills`` times, at random moments."""
    draw = random.Random(seed)
    for kill in range(kills):
        with pytest.MonkeyPatch.context() as patch:
            stop = StopAt(draw.randrange(1, 6))
            if kill % 4 == 3:
                stop.left = 1000
                stop_in_writing(patch, draw.randrange(3))
            try:
                return run(recipe, folder, resume="auto", callbacks=[stop])  # it came to its end before
            except StopError:
                pass
    return run(recipe, folder, resume="auto")


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in history]


def check_same(a: Any, b: Any, at: str = "checkpoint") -> None:
    """Check that two checkpoints are equal to the last bit, except for durations and folders."""
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            # Lightning writes `current_score` and does not read it.
            passed = (*TIMED, "dirpath", "loops", "best_k_models", "current_score")
            if key not in passed and not str(key).endswith("_path"):
                check_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for number, pair in enumerate(zip(a, b, strict=True)):
            check_same(*pair, f"{at}.{number}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    else:
        assert a == b, at


EVERYTHING = {"ema_decay": 0.8, "mixup": 0.3, "cutmix": 0.5, "accumulate": 2}
SHORT = TINY.but(
    epochs=2,
    data=TINY.data.but(batch_size=8, flip=True, random_augment=3),
    model=ModelConfig(name="resnet8"),
    checkpoint=CheckpointConfig(steps=1),
)


def check_runs(pieces: Any, whole: Any) -> None:
    assert untimed(pieces.history) == untimed(whole.history)
    for a, b in ((pieces.last_checkpoint, whole.last_checkpoint), (pieces.best_checkpoint, whole.best_checkpoint)):
        check_same(content(a), content(b))


@pytest.fixture
def make_recipe(tmp_path):
    """Return a function that gives the recipe of a kind of run, which saves after every step."""

    def make(kind: str) -> Recipe:
        if kind == "folder":
            make_flat(tmp_path / "photos", {"a": 14, "b": 15, "c": 6})
            images = DataConfig(name=f"folder:{tmp_path / 'photos'}", image_size=16, batch_size=4, workers=2)
            return SHORT.but(data=images, ema_decay=0.8)
        if kind == "shards":
            make_flat(tmp_path / "photos", {"a": 14, "b": 15, "c": 6})
            pack(tmp_path / "photos", tmp_path / "packed", workers=1, shard_bytes=2_000)
            images = DataConfig(name=f"shards:{tmp_path / 'packed'}", image_size=16, batch_size=4, workers=2)
            return SHORT.but(data=images)
        if kind == "detection":
            scenes = make_scenes(SceneConfig(train=8, held_out=2, side=64), tmp_path / "scenes")
            changes = {"data.name": f"coco:{scenes}", "data.batch_size": 2, "data.workers": 1, "checkpoint.steps": 1}
            return with_settings(find("scenes"), {**changes, "detector.backbone": "resnet20", "epochs": 2})
        return SHORT.but(**(EVERYTHING if kind == "everything" else {}))

    return make


@pytest.mark.parametrize(
    "kind",
    [
        "everything",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("plain", "folder", "shards", "detection")),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # workers of a stopped run
def test_a_run_in_pieces_ends_as_a_whole_one(tmp_path, make_recipe, kind):
    recipe = make_recipe(kind)
    whole = run(recipe, tmp_path / "whole")
    check_runs(train_in_pieces(recipe, tmp_path / "pieces", seed=1, kills=4 if kind == "everything" else 20), whole)


TRAIN = """
import sys
import pytest
from tiny_runs import add_tiny
from ecanet import training

add_tiny(pytest.MonkeyPatch())
recipe = training.read_recipe(sys.argv[1])
print("started", flush=True)
training.run(recipe, folder=sys.argv[1], resume=True, device="cpu", quiet=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "everything", "folder", "shards", "detection"])
def test_a_run_that_is_killed_again_and_again_ends_as_a_whole_one(tmp_path, make_recipe, kind):
    """SIGKILL at random moments, 20 of them or as many as ``ECANET_KILLS`` says: 200 is the full test."""
    recipe, folder, draw = make_recipe(kind), tmp_path / "killed", random.Random(kind)
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    script = tmp_path / "train.py"
    script.write_text(TRAIN)

    def train(name: Path) -> "subprocess.Popen[str]":
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, script, name], stdout=subprocess.PIPE, text=True, env=environment)

    kills = 0
    for _ in range(int(os.environ.get("ECANET_KILLS", "20"))):
        with train(folder) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                process.wait(timeout=draw.uniform(0.1, 4))
                assert process.returncode == 0
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            process.stdout.close()
        if process.returncode == 0:  # it came to its end: begin the next run
            shutil.copytree(folder, tmp_path / "finished", dirs_exist_ok=True)
            check_runs(Report.read(tmp_path / "finished"), whole_run(recipe, tmp_path / "whole", train))
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    print(f"{kind}: {kills} kills")
    with train(folder) as process:
        process.communicate(timeout=600)
        assert process.returncode == 0
    check_runs(Report.read(folder), whole_run(recipe, tmp_path / "whole", train))


def whole_run(recipe: Recipe, folder: Path, train: Any) -> Report:
    """Return the report of a run that nobody stops, in a process of its own, as the others."""
    if not folder.exists():
        folder.mkdir()
        (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
        with train(folder) as process:
            process.communicate(timeout=600)
            assert process.returncode == 0
    return Report.read(folder)
