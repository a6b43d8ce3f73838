"""Signals and schedulers: nothing is read from the current folder, and signals stop a run in order."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

import tiny_runs
from ecanet.recipes import CheckpointConfig, DataConfig, ModelConfig, Recipe
from ecanet.training import run, steps
from ecanet.training.stopping import StopRequest, find_scheduler, stop_on_signals
from photographs import make_flat
from tiny_runs import add_tiny

TINY = Recipe(data=DataConfig(name="digits", batch_size=600), model=ModelConfig(name="resnet8"), epochs=1)


@pytest.fixture
def slurm(monkeypatch):
    """Make this process look like one that SLURM has started."""
    for name, value in {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_a_new_run_under_slurm_takes_nothing_from_the_current_folder(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"another run's checkpoint")
    report = run(TINY, folder=tmp_path / "run", device="cpu", quiet=True)
    assert [row["epoch"] for row in report.history] == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hpc_ckpt_1.ckpt", "run"]


def test_a_run_after_one_that_slurm_has_stopped_is_its_own(slurm, tmp_path, monkeypatch, capsys):
    """SIGUSR1 comes to the first; the second one begins in the same current folder, with another seed."""
    monkeypatch.chdir(tmp_path)
    add_tiny(monkeypatch)
    recipe = tiny_runs.TINY.but(model=TINY.model, epochs=2)
    with pytest.raises(SystemExit) as stop:
        run(recipe, folder="first", device="cpu", quiet=True, callbacks=[Send(signal.SIGUSR1, "training", 1)])
    assert stop.value.code == 143
    assert "stopped by SIGUSR1 in epoch 2" in capsys.readouterr().err
    other = run(recipe.but(seed=1), folder="second", device="cpu")
    assert "resumed" not in capsys.readouterr().out
    assert [row["epoch"] for row in other.history] == [1, 2]
    assert other.recipe.seed == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    alone = run(recipe.but(seed=1), folder="alone", device="cpu", quiet=True)
    assert [row["train_loss"] for row in other.history] == [row["train_loss"] for row in alone.history]


def test_slurm_does_not_requeue_and_torchrun_goes_before_it(slurm, monkeypatch):
    (plugin,) = find_scheduler()
    assert not plugin.auto_requeue
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert find_scheduler() == []


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_are_noted_while_a_run_trains_and_end_it_at_once_before(sent):
    before, request = signal.getsignal(sent), StopRequest()
    with stop_on_signals(request):
        with pytest.raises(SIGTERMException):
            os.kill(os.getpid(), sent)
        assert request.name == sent.name
        request.training = True
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.name == sent.name
    assert signal.getsignal(sent) == before


class PressesControlC:
    """Presses Ctrl-C when it is freed, where Python drops the exception."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def control_c():
    """Let Ctrl-C raise KeyboardInterrupt, which a shell's background process ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("moment", ["on_train_batch_start", "on_validation_batch_start"])
def test_a_control_c_that_python_drops_ends_the_run_all_the_same(control_c, monkeypatch, tmp_path, moment):
    pressed = []

    def press(*_):
        pressed.append(PressesControlC())
        pressed.clear()

    monkeypatch.setattr(steps.StepWatch, moment, press)
    with pytest.raises(KeyboardInterrupt):
        run(TINY, folder=tmp_path, device="cpu", quiet=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_control_c_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals(StopRequest()):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_a_thread_keeps_its_signals():
    before, found = signal.getsignal(signal.SIGUSR1), []

    def enter():
        with stop_on_signals(StopRequest()):
            found.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_reading_worker_outlives_the_first_signal():
    """A scheduler sends its signal to all processes, and the run still needs images for its last step."""
    (theirs, to), (back, ours) = os.pipe(), os.pipe()
    with stop_on_signals(StopRequest()):
        worker = os.fork()
        if not worker:
            while True:
                os.write(ours, os.read(theirs, 1))
    os.close(theirs)
    os.close(ours)

    def answers() -> bool:
        """Return whether the worker lives: once it has answered twice, it has handled the signal."""
        try:
            return all(os.write(to, b"?") and os.read(back, 1) for _ in range(2))
        except BrokenPipeError:
            return False

    try:
        assert answers()  # Python forgets a signal that comes while it forks
        for outlives in (True, False):
            os.kill(worker, signal.SIGTERM)
            assert answers() == outlives
    finally:
        os.kill(worker, signal.SIGKILL)  # if it has ended, this changes nothing
        _, status = os.waitpid(worker, 0)
        os.close(to)
        os.close(back)
    assert os.waitstatus_to_exitcode(status) == 143


class Send(L.Callback):
    """Sends a signal to the run itself, in training or in validation."""

    def __init__(self, sent, stage, batch):
        self.sent, self.place = sent, (stage, 1, batch)

    def send(self, trainer, stage, batch):
        if (stage, trainer.current_epoch, batch) == self.place:
            os.kill(os.getpid(), self.sent)

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.send(trainer, "training", batch_idx)

    def on_validation_batch_start(self, trainer, task, batch, batch_idx, dataloader_idx=0):
        self.send(trainer, "validation", batch_idx)


@pytest.mark.parametrize(
    ("stage", "batch", "accumulate", "place"),
    [
        pytest.param("training", 1, 1, "epoch 2 after batch 2", marks=pytest.mark.slow),
        ("training", 0, 2, "epoch 2 after batch 2"),  # half a step is not saved
        ("validation", 1, 1, "epoch 2 after batch 3"),
    ],
)
@pytest.mark.parametrize("ema_decay", [pytest.param(None, marks=pytest.mark.slow), 0.7])
def test_a_signal_lets_the_step_end_and_loses_nothing(
    tmp_path, capsys, monkeypatch, stage, batch, accumulate, place, ema_decay
):
    add_tiny(monkeypatch)
    recipe = tiny_runs.TINY.but(model=TINY.model, epochs=3, ema_decay=ema_decay, accumulate=accumulate)
    whole = run(recipe, folder=tmp_path / "whole", device="cpu", quiet=True)
    with pytest.raises(SystemExit) as stop:
        run(recipe, folder=tmp_path / "run", device="cpu", quiet=True, callbacks=[Send(signal.SIGUSR1, stage, batch)])
    assert stop.value.code == 143
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"stopped by SIGUSR1 in {place}; continue with: ecanet train --resume {tmp_path / 'run'}"
    resumed = run(recipe, folder=tmp_path / "run", resume=True, device="cpu")
    assert f"resumed in {place}" in capsys.readouterr().out
    saved, expected = (torch.load(report.last_checkpoint, weights_only=True) for report in (resumed, whole))
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in expected["state_dict"].items())
    assert [row["val_loss"] for row in resumed.history] == [row["val_loss"] for row in whole.history]
    assert [row["train_loss"] for row in resumed.history] == [row["train_loss"] for row in whole.history]


class SendToAll(Send):
    """Sends a signal to the run and to the processes that read its images, as a scheduler does."""

    def send(self, trainer, stage, batch):
        if (stage, trainer.current_epoch, batch) == self.place:
            self.workers = multiprocessing.active_children()
            for worker in self.workers:
                # With a process between them: from its own parent, PyTorch obeys the signal.
                subprocess.run(["kill", f"-{int(self.sent)}", str(worker.pid)], check=True)
            time.sleep(0.2)
            os.kill(os.getpid(), self.sent)


@pytest.mark.parametrize("stage", ["training", pytest.param("validation", marks=pytest.mark.slow)])
def test_sigterm_to_all_processes_lets_the_step_end(tmp_path, capsys, stage):
    make_flat(tmp_path / "photos", {"a": 20, "b": 20})
    images = DataConfig(name=f"folder:{tmp_path / 'photos'}", image_size=8, batch_size=4, workers=1)
    recipe, send = tiny_runs.TINY.but(data=images, epochs=2), SendToAll(signal.SIGTERM, stage, 1)
    with pytest.raises(SystemExit) as stop:
        run(recipe, folder=tmp_path / "run", device="cpu", quiet=True, callbacks=[send])
    assert stop.value.code == 143
    place = "epoch 2 after batch 2" if stage == "training" else "epoch 2 after batch 8"
    assert f"stopped by SIGTERM in {place}; " in capsys.readouterr().err
    assert send.workers


def test_an_evaluation_that_is_stopped_twice_is_repeated(tmp_path, capsys, monkeypatch):
    add_tiny(monkeypatch)
    recipe, folder = tiny_runs.TINY.but(model=TINY.model, epochs=2), tmp_path / "run"
    whole = run(recipe, folder=tmp_path / "whole", device="cpu", quiet=True)
    for batch in (1, 0):
        send = Send(signal.SIGTERM, "validation", batch)
        with pytest.raises(SystemExit):
            run(recipe, folder=folder, resume="auto", device="cpu", quiet=True, callbacks=[send])
        assert "stopped by SIGTERM in epoch 2 after batch 3" in capsys.readouterr().err
    resumed = run(recipe, folder=folder, resume=True, device="cpu", quiet=True)
    for name in ("epoch", "val_loss", "train_loss", "top1"):
        assert [row[name] for row in resumed.history] == [row[name] for row in whole.history]


def test_checkpoints_are_written_after_steps_and_minutes(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        L.Trainer, "save_checkpoint", lambda self, path, *_: written.append((self.global_step, Path(path).name))
    )
    clock = iter(range(0, 10**9, 60))  # a minute passes between two looks at the clock
    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def train(name, **settings):
        written.clear()
        recipe = TINY.but(data=TINY.data.but(batch_size=100), checkpoint=CheckpointConfig(**settings))
        run(recipe, folder=tmp_path / name, device="cpu", quiet=True)
        return [step for step, name in written if name == "last.ckpt" and step < 14]

    assert train("never", minutes=0) == []
    assert train("steps", minutes=0, steps=5) == [5, 10]
    assert train("minutes", minutes=4) == [4, 8, 12]
