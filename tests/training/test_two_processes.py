"""Two processes equal one; a run changes their number, survives a lost one, and obeys a signal to all of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from ecanet import training
from ecanet.errors import ConfigError
from ecanet.recipes import CheckpointConfig, ModelConfig, Recipe, to_dict
from ecanet.training.hardware import _check_cpu
from tiny_runs import TINY, add_tiny, check_close, check_states, content, read_column, read_weights

SCRIPT = Path(__file__).with_name("worker_script.py")
RECIPE = TINY.but(epochs=3, checkpoint=CheckpointConfig(steps=1))


def start(folder: Path, *arguments: object, processes: int = 1, restarts: int = 0) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    launcher = [*launcher, "--max-restarts", restarts] if processes > 1 else []
    command = [sys.executable, *launcher, SCRIPT, folder, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(part) for part in command], env=environment, **pipes)


def train(folder: Path, *arguments: object, ends_with: int = 0, **options: int) -> str:
    """Start the processes, wait for them, and return what they printed."""
    with start(folder, *arguments, **options) as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == ends_with, err
    return out


def prepare(folder: Path, recipe: Recipe, *, processes: int = 1) -> Path:
    """Make a run directory with a recipe of which each process takes its share."""
    folder.mkdir()
    share = recipe.but(data=recipe.data.but(batch_size=recipe.data.batch_size // processes))
    (folder / "recipe.json").write_text(json.dumps(to_dict(share)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("images", [48, 13], ids=["whole batches", "fewer images than a batch"])
@pytest.mark.parametrize(("alone", "together"), [("own", "synchronised"), ("halves", "own")])
def test_two_processes_equal_one(tmp_path, images, alone, together):
    """With synchronised norms they equal one process; else one whose batch is normalized by halves."""
    recipe = RECIPE.but(sync_batchnorm=together == "synchronised")
    one, two = prepare(tmp_path / "one", recipe), prepare(tmp_path / "two", recipe, processes=2)
    train(one, images, alone)
    train(two, images, together, processes=2)
    check_close(two, one)


@pytest.mark.slow
@pytest.mark.parametrize(("alone", "together"), [("halves", "own"), ("own", "synchronised")])
def test_two_sharded_processes_equal_one(tmp_path, monkeypatch, alone, together):
    """They are killed in the first epoch; what they write in the end is one plain file."""
    add_tiny(monkeypatch)
    network = ModelConfig(name="resnet8")  # a deeper one magnifies rounding; test_sharding.py compares in float64
    recipe = RECIPE.but(model=network, strategy="fsdp", sync_batchnorm=together == "synchronised")
    one = prepare(tmp_path / "one", recipe.but(strategy="ddp", sync_batchnorm=False))
    two = prepare(tmp_path / "two", recipe, processes=2)
    train(one, 48, alone)
    train(two, 48, together, 2, processes=2, ends_with=1)
    train(two, 48, together, processes=2)
    check_close(two, one)
    check_states(two / "checkpoints" / "last.ckpt", one / "checkpoints" / "last.ckpt")
    values = content(two / "checkpoints" / "last.ckpt")["state_dict"].values()
    assert {type(value) for value in values} == {torch.Tensor}
    training.write_weights(two, tmp_path / "weights.pth", which="last")
    best, weights = (training.evaluate(path) for path in (two, tmp_path / "weights.pth"))
    assert best["top1"] == max(read_column(two, "top1"))
    assert weights["top1"] == read_column(two, "top1")[-1]


def read_drawn(folder: Path) -> dict[int, list[list[int]]]:
    """Return the images of all processes by epoch: a list for each batch."""
    steps: dict[tuple[int, int], list[int]] = {}
    for path in sorted(folder.glob("drawn-*.txt")):
        seen: dict[tuple[int, int], list[int]] = {}
        for line in path.read_text().splitlines():
            epoch, batch, *images = map(int, line.split())
            seen[epoch, batch] = images  # a step that was repeated counts once
        for place, images in seen.items():
            steps.setdefault(place, []).extend(images)
    epochs: dict[int, list[list[int]]] = {}
    for (epoch, _), images in sorted(steps.items()):
        epochs.setdefault(epoch, []).append(images)
    return epochs


@pytest.mark.slow
def test_one_two_and_one_process_share_a_run_within_its_epochs(tmp_path):
    """The first process ends in the first epoch, the next two in the second one."""
    whole, shared = prepare(tmp_path / "whole", RECIPE), prepare(tmp_path / "shared", RECIPE)
    train(whole, 48)
    train(shared, 48, "own", 2, ends_with=5)
    assert "batch 16 = 8 images × 2 devices" in train(shared, 48, "own", 3, processes=2, ends_with=1)
    train(shared, 48)
    assert read_column(shared, "learning_rate") == read_column(whole, "learning_rate")
    expected, found = read_drawn(whole), read_drawn(shared)
    for epoch in range(3):
        # 16 of each step's images, in the same steps; each image once in an epoch
        assert [sorted(set(batch)) for batch in found[epoch]] == [sorted(batch) for batch in expected[epoch]]
        assert Counter(image for batch in expected[epoch] for image in batch) == dict.fromkeys(range(48), 1)


@pytest.mark.slow
def test_an_elastic_run_survives_the_loss_of_a_process(tmp_path):
    recipe = RECIPE.but(epochs=6)
    whole, killed = (prepare(tmp_path / name, recipe, processes=2) for name in ("whole", "killed"))
    train(whole, 48, processes=2)
    with start(killed, 48, processes=2, restarts=2) as process:
        wait_for(killed / "drawn-1.txt", lines=4)
        children = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True).split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    state, expected = read_weights(killed), read_weights(whole)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert read_column(killed, "train_loss") == pytest.approx(read_column(whole, "train_loss"), rel=1e-12)
    assert read_drawn(killed) == read_drawn(whole)


def wait_for(path: Path, *, lines: int) -> None:
    """Wait until ``path`` has so many lines."""
    until = time.monotonic() + 300
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_sigterm_to_torchrun_ends_all_processes_with_a_checkpoint(tmp_path):
    folder = prepare(tmp_path / "run", RECIPE.but(epochs=400, checkpoint=CheckpointConfig()), processes=2)
    with start(folder, 48, processes=2) as process:
        wait_for(folder / "drawn-1.txt", lines=4)
        workers = [
            int(pid) for pid in subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)]).split()
        ]
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        _, err = process.communicate(timeout=60)
    # Three seconds on a quiet machine; torchrun would kill the processes after 30.
    assert time.monotonic() - started < 25
    lines = [line for line in err.splitlines() if line.startswith("stopped by")]
    assert len(lines) == 1
    assert lines[0].endswith(f"continue with: ecanet train --resume {folder}")
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    drawn = read_drawn(folder)
    assert saved["global_step"] == sum(len(batches) for batches in drawn.values())
    assert f"in epoch {max(drawn) + 1} after batch {len(drawn[max(drawn)])};" in lines[0]


def test_synchronised_norms_need_gpus():
    _check_cpu(RECIPE.but(sync_batchnorm=True), 1)
    with pytest.raises(ConfigError, match="sync_batchnorm needs GPUs"):
        _check_cpu(RECIPE.but(sync_batchnorm=True), 2)
