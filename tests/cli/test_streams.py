"""Ctrl-C before anything has begun, and an output that nobody reads any more."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ecanet import __main__ as entry
from ecanet import errors


def start(*arguments: str, path: Path | None = None, **options) -> subprocess.Popen[str]:
    paths = [str(path)] * (path is not None) + [os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "ecanet", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_control_c_during_the_imports_is_one_line(tmp_path):
    """In place of PyTorch there is a package whose import is interrupted."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    process = start("eval", "run", path=tmp_path, stdout=subprocess.DEVNULL)
    _, err = process.communicate(timeout=60)
    assert err == "ecanet: stopped by Ctrl-C\n"
    assert process.returncode in (130, -signal.SIGINT)


@pytest.mark.parametrize(
    ("arguments", "original", "changed"),
    [
        (["/usr/bin/ecanet", "eval"], ["python", "/usr/bin/ecanet", "eval"], True),
        (["-m", "eval"], ["python", "-m", "ecanet", "eval"], True),
        (["-m", "ecanet"], ["python", "-m", "pytest", "ecanet"], False),
        (["mine.py", "-m", "ecanet"], ["python", "mine.py", "-m", "ecanet"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_only_the_command_line_changes_what_control_c_prints(monkeypatch, arguments, original, changed):
    before = sys.excepthook
    monkeypatch.setattr(sys, "excepthook", before)
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "orig_argv", original)
    errors.shorten_interrupts()
    assert (sys.excepthook is not before) is changed


def test_other_exceptions_of_the_imports_keep_their_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise ZeroDivisionError")
    _, err = start("eval", "run", path=tmp_path, stdout=subprocess.DEVNULL).communicate(timeout=60)
    assert "Traceback" in err
    assert "ZeroDivisionError" in err


@pytest.mark.parametrize(
    "line",
    [
        "completion bash",
        *(pytest.param(line, marks=pytest.mark.slow) for line in ("models resnet8 --json", "models resnet8")),
    ],
)
def test_a_closed_output_is_said(line):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*line.split(), stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=120)
    assert err == "ecanet: standard output is closed; the rest of the output is lost\n"
    assert process.returncode == 0


@pytest.mark.parametrize("ends", [False, True], ids=["raised", "turned into an exit by click"])
def test_another_broken_pipe_is_a_failure(monkeypatch, tmp_path, ends):
    """The output is a file, which cannot break; a worker's pipe has."""

    def run():
        try:
            raise BrokenPipeError("a worker has ended")
        except BrokenPipeError:
            if ends:
                sys.exit(1)
            raise

    monkeypatch.setattr(entry, "_run", run)
    before = os.dup(1)
    with (tmp_path / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        try:
            with pytest.raises(BrokenPipeError, match="a worker has ended"):
                entry.main()
        finally:
            os.dup2(before, 1)
            os.close(before)
