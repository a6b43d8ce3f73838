"""A loss that is not finite: the run stops at its step and names the images, or passes the batch over."""

import json
import math
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from ecanet.data.samplers import EpochSampler
from ecanet.errors import ConfigError
from ecanet.recipes import CheckpointConfig, DataConfig
from ecanet.training import steps
from ecanet.training.stopping import StopRequest
from photographs import make_flat
from tiny_runs import TINY, add_tiny, content, run

RECIPE = TINY.but(epochs=3, checkpoint=CheckpointConfig(steps=1))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    add_tiny(monkeypatch)


class Poison(L.Callback):
    """Makes an image of one batch infinite."""

    def __init__(self, epoch: int, batch: int):
        self.place = epoch, batch

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.place:
            batch[0][1] = math.inf


class LateVotes(steps.Votes):
    """Votes whose answers come with the next call, as on a GPU."""

    late: list[bool] | None = None

    def put(self, answers):
        before, self.late = self.flush(), super().put(answers)
        return before

    def flush(self):
        before, self.late = self.late or [False] * self.questions, None
        return before


@pytest.mark.parametrize("late", [False, True])
def test_the_batch_is_named_and_no_checkpoint_is_written_after_it(tmp_path, monkeypatch, late):
    recipe = RECIPE
    if late:
        monkeypatch.setattr(steps, "Votes", LateVotes)
        recipe = RECIPE.but(checkpoint=CheckpointConfig())
    with pytest.raises(ConfigError) as caught:
        run(recipe, tmp_path / "run", callbacks=[Poison(1, 1)])
    sampler = EpochSampler(48, batch_size=16, seed=RECIPE.seed, rank=0, world=1)
    sampler.set_epoch(1)
    images = [draw.image for draw in sampler][16:32]
    named = ", ".join(f"training image {at}" for at in images[:3])
    assert f": {named} and 13 more; go on from the last checkpoint with a lower rate" in str(caught.value)
    assert "in epoch 2, batch 2: " in str(caught.value)
    assert "\n" not in str(caught.value)
    saved = content(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == (3 if late else 4)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_of_several_processes_the_first_broken_batch_is_named(tmp_path, monkeypatch):
    """On GPUs the next batch is done when the answer comes: its loss is not finite in this process either."""
    watch = steps.StepWatch(tmp_path / "run" / "checkpoints" / "last.ckpt", CheckpointConfig(), StopRequest())
    watch.batches = 8
    watch.seen = [(7, [1, 2], False), (8, [3, 4], True)]

    def gather(parts, mine):
        parts[:] = [mine, [(7, ["image 5", "image 6"]), (8, ["image 9"])]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    images = SimpleNamespace(name_images=lambda drawn: [f"image {at}" for at in drawn])
    trainer: Any = SimpleNamespace(datamodule=images, world_size=2, current_epoch=0)
    with pytest.raises(ConfigError, match=r"in epoch 1, batch 7: image 5, image 6; go on"):
        watch._check_loss(trainer, broken=True)


def test_the_last_batch_is_looked_at_before_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "Votes", LateVotes)
    with pytest.raises(ConfigError, match="the loss is not finite in epoch 1, batch 3: "):
        run(RECIPE.but(checkpoint=CheckpointConfig()), tmp_path / "run", callbacks=[Poison(0, 2)])
    assert not list((tmp_path / "run").glob("checkpoints/*.ckpt"))


def test_a_stopped_run_goes_on_with_a_lower_rate(tmp_path, ecanet, capsys):
    with pytest.raises(ConfigError):
        run(RECIPE.but(ema_decay=0.5), tmp_path / "run", callbacks=[Poison(1, 1)])
    code, out, err = ecanet("train", "--resume", tmp_path / "run", "--learning-rate", 0.005, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "learning rate 0.005 (0.005 for 16; it was 0.02 until now)" in out
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["optimizer"]["learning_rate"] == 0.005
    # The cosine from 0.005 on, at the first step of the last epoch's last batch: step 8 of 9, warm-up in 1.5 of them
    last = content(tmp_path / "run" / "checkpoints" / "last.ckpt")
    rates = [float(line.split(",")[-3]) for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    expected = [0.005 * (1 + math.cos(math.pi * (step / 3 - 0.5) / 2.5)) / 2 for step in (5, 8)]
    assert rates[1:] == pytest.approx(expected)
    assert last["lr_schedulers"][0]["base_lrs"] == pytest.approx([0.005])


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Break(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                task.model.conv1.weight.data[0] = math.nan

    with pytest.raises(ConfigError, match="the weights are not finite after batch 1 of epoch 2"):
        run(RECIPE, tmp_path / "run", callbacks=[Break()])
    assert content(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_a_batch_can_be_passed_over(tmp_path, capsys):
    make_flat(tmp_path / "photos", {"a": 10, "b": 10})
    images = DataConfig(name=f"folder:{tmp_path / 'photos'}", image_size=16, batch_size=4, workers=0)
    recipe = RECIPE.but(data=images, epochs=2, on_nan="skip")
    report = run(recipe, tmp_path / "run", callbacks=[Poison(0, 2)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("skipped a batch whose loss is not finite, in epoch 1: ")
    assert len(line.partition(": ")[2].split(", ")) == 4
    assert str(tmp_path / "photos" / "a") in line
    saved = content(report.last_checkpoint)
    # Norms keep statistics of the images, which one that is infinite would spoil for ever.
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())
    assert all(math.isfinite(row["train_loss"]) for row in report.history)
    assert saved["state_dict"]["model.bn1.num_batches_tracked"] == 7
