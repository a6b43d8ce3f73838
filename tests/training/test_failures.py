"""What the machine refuses in the middle of a run is one line, and nothing is lost."""

import errno
import gc
import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import lightning as L
import pytest
import torch

from ecanet.errors import ConfigError, EcanetError
from ecanet.recipes import CheckpointConfig, DataConfig, Recipe
from ecanet.report import Report
from ecanet.training.failures import explain_failure
from ecanet.training.progress import OptionalConsole
from photographs import make_flat
from tiny_runs import TINY, add_tiny, run

CPU_FULL = (
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
RUN = Path("runs/mine")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines"),
        RuntimeError(CPU_FULL),
        MemoryError(),
    ],
)
@pytest.mark.parametrize(
    ("batch", "accumulate", "remedy"),
    [
        (64, 1, "--batch-size 32 --set accumulate=2: that is the same effective batch in half the memory"),
        (33, 2, "--batch-size 17 --set accumulate=4: that is the same effective batch in about half the memory"),
        (1, 8, "smaller images"),
    ],
)
def test_out_of_memory_names_the_same_batch_in_less(error, batch, accumulate, remedy):
    problem = explain_failure(error, Recipe(data=DataConfig(batch_size=batch), accumulate=accumulate), RUN)
    assert str(problem).startswith("memory ran out; ")
    assert remedy in str(problem)
    assert "\n" not in str(problem)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "DataLoader worker (pid 71) is killed by signal: Killed. ",
            "process 71, which reads images, was killed: most often",
        ),
        (
            "DataLoader worker (pid(s) 7, 9) exited unexpectedly",
            "process 7, 9, which reads images, was killed: most often",
        ),
        ("DataLoader worker (pid 71) is killed by signal: Bus error.", "was ended by the signal Bus"),
        ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n 4096"),
    ],
)
def test_lost_workers_and_few_handles_are_explained(text, expected):
    problem = str(explain_failure(RuntimeError(text), Recipe(), RUN))
    assert expected in problem
    assert "ecanet train --resume runs/mine" in problem
    assert "a process that reads images was killed" in str(explain_failure(ConnectionResetError(), Recipe(), RUN))
    assert "ulimit -n" in str(explain_failure(OSError(errno.EMFILE, "Too many"), Recipe(), RUN))
    assert explain_failure(RuntimeError("a fault of the program"), Recipe(), RUN) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_worker_is_killed_says_so_and_goes_on_later(tmp_path):
    class Kill(L.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, signal.SIGKILL)

    make_flat(tmp_path / "photos", {"a": 20, "b": 20})
    images = DataConfig(name=f"folder:{tmp_path / 'photos'}", image_size=8, batch_size=4, workers=1)
    recipe = TINY.but(data=images, epochs=2, checkpoint=CheckpointConfig(steps=4))
    with pytest.raises(ConfigError, match="reads images,? was killed: most often memory ran out"):
        run(recipe, tmp_path / "run", callbacks=[Kill()])
    report = run(recipe, tmp_path / "run", resume=True)
    assert torch.load(report.last_checkpoint, weights_only=True)["global_step"] == 16


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a loader that is half made
def test_a_run_with_too_few_file_handles_is_one_line(tmp_path):
    make_flat(tmp_path / "photos", {"a": 20, "b": 20})
    images = DataConfig(name=f"folder:{tmp_path / 'photos'}", image_size=8, batch_size=4, workers=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))  # noqa: PTH208
        with pytest.raises(EcanetError) as caught:
            run(TINY.but(data=images, epochs=1), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    message = str(caught.value)
    assert "more files are open than the system allows; raise the limit (ulimit -n 4096)" in message
    assert "\n" not in message
    del caught
    gc.collect()


def test_a_run_goes_on_where_nobody_reads_its_output(tmp_path, monkeypatch, capsys):
    add_tiny(monkeypatch)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        console = OptionalConsole(file=output, soft_wrap=True)
        console.print("nobody reads this")
        console.print("nor this")
    assert capsys.readouterr().err == "standard output is closed; the run goes on without it, see metrics.csv\n"


def test_a_report_can_be_made_again(tmp_path, monkeypatch, ecanet):
    add_tiny(monkeypatch)

    def fail(self):
        raise ZeroDivisionError("no\nfont")

    recipe, folder = TINY.but(epochs=2), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Report, "write", fail)
        with pytest.raises(
            ConfigError, match=f"but its report failed .*make it again: ecanet report {folder}"
        ) as caught:
            run(recipe, folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()
    code, out, err = ecanet("report", folder, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "report.html" in out
    assert (folder / "report.html").exists()
    assert len(Report.read(folder).history) == 2
    code, out, err = ecanet("report", folder, "--device", "cpu", "--json")
    assert (code, json.loads(out)["folder"]) == (0, str(folder))
    assert json.loads(out)["metrics"] == Report.read(folder).metrics
    assert "report.html" in err
    table = folder / "metrics.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:2]))
    assert ecanet("report", folder)[::2] == (
        2,
        f"ecanet: {folder} has finished 1 of 2 epochs, and a report is for a "
        f"finished run; first finish it: ecanet train --resume {folder}\n",
    )
