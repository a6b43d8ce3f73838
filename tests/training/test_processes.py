"""A run that goes on with another number of processes keeps its batch, its learning rates and its images."""

import csv
import json
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from ecanet import data
from ecanet.errors import CheckpointError, ConfigError
from ecanet.recipes import DataConfig, ModelConfig, Recipe, ScheduleConfig, to_dict
from ecanet.training import run, tasks
from ecanet.training.checkpoints import share_batch
from ecanet.training.processes import join_restarted

RECIPE = Recipe(
    data=DataConfig(name="digits", batch_size=64),
    model=ModelConfig(name="resnet8"),
    schedule=ScheduleConfig(name="cosine", warmup_epochs=2),
    epochs=6,
)

TRAIN_UNTIL = """
import sys
import lightning as L
from ecanet.training import read_recipe, run

class Stop(L.Callback):
    def on_train_epoch_start(self, trainer, task):
        if trainer.current_epoch == int(sys.argv[2]):
            raise SystemExit(5)

run(read_recipe(sys.argv[1]), folder=sys.argv[1], resume=True, device="cpu", callbacks=[Stop()])
"""


def make_checkpoint(folder, batch):
    path = folder / "checkpoints" / "last.ckpt"
    return path, {"ecanet": {"batch": batch}}


@pytest.mark.parametrize(("batch", "processes", "share"), [(64, 1, 64), (64, 2, 32), (128, 1, 128), (192, 3, 64)])
def test_processes_share_the_batch_of_before(tmp_path, batch, processes, share):
    images = data.build(RECIPE.data)
    share_batch(*make_checkpoint(tmp_path, batch), images, processes)
    assert images.config == RECIPE.data.but(batch_size=share)
    assert images.train_dataloader().batch_size == share


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    expected = "had 64 images in a batch of 1 processes, which 3 cannot share evenly; start as many as before"
    with pytest.raises(ConfigError, match=expected):
        share_batch(*make_checkpoint(tmp_path, 64), data.build(RECIPE.data), 3)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_keeps_its_accumulated_batches(tmp_path, monkeypatch, processes):
    """With another number of processes a step has the images of before; another ``accumulate`` is refused."""
    recipe, images = RECIPE.but(accumulate=4), data.build(RECIPE.data)
    task = tasks.build(recipe, images.spec)
    share_batch(*make_checkpoint(tmp_path, 64), images, processes)
    task._trainer = SimpleNamespace(datamodule=images, world_size=processes)
    assert task.effective_batch == 256
    assert task.learning_rate == 0.1
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with pytest.raises(ConfigError, match=r"accumulate is 4 there and 2 here; go on with .*--resume") as caught:
        run(recipe.but(accumulate=2), folder=tmp_path, resume=True, device="cpu", quiet=True)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    path, _ = make_checkpoint(tmp_path, 64)
    with pytest.raises(CheckpointError, match="does not say how many images a step had") as caught:
        share_batch(path, {"ecanet": {}}, data.build(RECIPE.data), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [0, -64, 32, 100, 64.0, True, "64", [64]])
def test_a_batch_that_no_processes_had_is_refused(tmp_path, batch):
    with pytest.raises(CheckpointError, match=r"last.ckpt: .* 'ecanet.batch' is .* and not 64 images for each process"):
        share_batch(*make_checkpoint(tmp_path, batch), data.build(RECIPE.data), 1)


def test_detectors_go_on_with_as_many_processes(tmp_path):
    images = Mock(spec=data.DetectionData, config=DataConfig(name="scenes", batch_size=8))
    with pytest.raises(ConfigError, match="which 2 cannot take over; start as many as before"):
        share_batch(*make_checkpoint(tmp_path, 8), images, 2)


@pytest.mark.parametrize("steps", [20, 25, 31])
def test_the_learning_rate_depends_on_the_epoch_and_not_on_the_steps_before(steps):
    """Two epochs of 20 steps each were trained; then an epoch has other steps."""

    def make_schedule(steps, resumed):
        spec = data.build(RECIPE.data, train=False).spec
        task = tasks.build(RECIPE, spec)
        images = SimpleNamespace(train=range(1437), config=RECIPE.data, train_dataloader=lambda: range(steps))
        task._trainer = SimpleNamespace(datamodule=images, world_size=1)
        task.resumed = resumed
        return task.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]

    whole, resumed = make_schedule(steps, (0, 0, 0)), make_schedule(steps, (2, 0, 40))
    assert [resumed(40 + step) for step in range(4 * steps)] == [whole(2 * steps + step) for step in range(4 * steps)]


def read_rates(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["learning_rate"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_one_two_and_one_process_follow_one_schedule(tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    run(RECIPE, folder=whole, device="cpu", quiet=True)
    shared.mkdir()
    (shared / "recipe.json").write_text((whole / "recipe.json").read_text())
    script = tmp_path / "train_until.py"
    script.write_text(TRAIN_UNTIL)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    for until, launcher in ((2, []), (4, torchrun), (99, [])):
        command = [sys.executable, *launcher, str(script), str(shared), str(until)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == (until == 99), done.stderr
        if launcher:
            assert "batch 64 = 32 images × 2 devices" in done.stdout
    assert read_rates(shared) == read_rates(whole)


def test_each_attempt_of_a_launcher_has_its_own_names(monkeypatch):
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    launcher = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "RANK": "1"}
    made = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, store, **__: made.append(store))
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    for attempt, kept, count in (("0", "True", 0), ("2", "False", 0), ("2", "True", 1), ("3", "True", 2)):
        settings = {"TORCHELASTIC_RESTART_COUNT": attempt, "TORCHELASTIC_USE_AGENT_STORE": kept}
        for name, value in {**launcher, **settings}.items():
            monkeypatch.setenv(name, value)
        join_restarted(trainer)
        assert len(made) == count
    for attempt, names in zip((2, 3), made, strict=True):
        names.set("address", str(attempt))
        assert store.get(f"attempt-{attempt}/address") == str(attempt).encode()
