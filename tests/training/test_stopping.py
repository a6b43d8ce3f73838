"""Signals and schedulers: nothing is read from the current folder, and signals stop a run in order."""

import os
import signal
import threading

import pytest

from ecanet.recipes import DataConfig, ModelConfig, Recipe
from ecanet.training import run
from ecanet.training.stopping import find_scheduler, stop_on_signals

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


def test_slurm_does_not_requeue_and_torchrun_goes_before_it(slurm, monkeypatch):
    (plugin,) = find_scheduler()
    assert not plugin.auto_requeue
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert find_scheduler() == []


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGHUP])
def test_other_signals_act_as_sigterm_and_are_named(sent):
    terminated, before = [], signal.getsignal(sent)
    old = signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    try:
        with stop_on_signals() as received:
            os.kill(os.getpid(), sent)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert (received, terminated) == ([sent.name], [True])
    assert signal.getsignal(sent) == before


def test_a_run_in_a_thread_keeps_its_signals():
    before, found = signal.getsignal(signal.SIGUSR1), []

    def enter():
        with stop_on_signals():
            found.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]
