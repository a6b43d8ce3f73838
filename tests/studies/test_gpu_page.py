"""`python benchmarks/gpu_page.py`: the GPU part of docs/performance.md, from a JSON file or from none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, PAGE = ROOT / "benchmarks" / "gpu_page.py", ROOT / "docs" / "performance.md"


def time_networks(batch, **milliseconds):
    names = {"eca": "ecanet eca", "plain": "ecanet plain", "timm": "timm eca"}
    ms = {names[key]: {"median": value, "low": value - 1, "high": value + 1} for key, value in milliseconds.items()}
    ratios = {
        f"{a} / {b}": {"median": ms[a]["median"] / ms[b]["median"], "low": 0.5, "high": 1.5}
        for a in ms
        for b in ms
        if a != b
    }
    rates = {name: 1e3 * batch / spread["median"] for name, spread in ms.items()}
    return {"batch": batch, "impl": "fused", "ms": ms, "images_per_second": rates, "ratios": ratios}


def make_record(**changes):
    parts = {
        "ceilings": {"figures": {"copy_gb_per_second": 3000.0}, "seconds": 1},
        "training": {"figures": time_networks(256, eca=40, plain=32, timm=64), "seconds": 1},
        "inference": {"figures": {"bfloat16": time_networks(64, eca=4), "bfloat16, enqueue_ms": {"ecanet eca": 1.0}}},
        "profile": {"skipped": "3 s were left and it needs 20 s"},
        "passes": {"failed": "RuntimeError: out of memory", "traceback": "..."},
    }
    machine = {"command": "python benchmarks/gpu.py a.json", "device": "H100", "date": "2026-12-01T00:00:00+00:00"}
    versions = {"torch": "2.15.0", "triton": "3.9.0", "cuda": "13.2", "cudnn": 9, "commit": "abc"}
    return {"format": 1, "rehearsal": False, **machine, **versions, "parts": parts, **changes}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a copy of the page from a record: exit code, standard error, the text."""
    page, file = tmp_path / "page.md", tmp_path / "gpu.json"
    page.write_text(PAGE.read_text())

    def call(record):
        arguments = [] if record is None else [str(file)]
        file.write_text(record if isinstance(record, str) else json.dumps(record))
        command = [sys.executable, str(SCRIPT), *arguments, "--page", str(page)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr, page.read_text()

    return call


def test_the_committed_page_is_what_the_script_writes(write):
    """No file of a GPU is committed. Whoever commits one gives it to the script, and here."""
    committed = sorted((ROOT / "benchmarks" / "results").glob("gpu*.json"))
    assert committed == []
    assert write(None) == (0, "", PAGE.read_text())


def test_tables_show_wins_and_losses_and_what_is_missing(write):
    code, _, text = write(make_record())
    assert code == 0
    for line in (
        "| training, batch 256 | ms | images/s |",
        "| ecanet plain | 32.00 (31.00 to 33.00) | 8,000 |",
        "| ecanet eca / ecanet plain | 1.250 (0.500 to 1.500) | |",
        "| ecanet eca / timm eca | 0.625 (0.500 to 1.500) | |",
        "| inference, bfloat16, batch 64 | ms | images/s |",
        "profile skipped: 3 s were left and it needs 20 s",
        "passes failed: RuntimeError: out of memory",
    ):
        assert line in text.splitlines()
    assert text.index("| ecanet plain |") < text.index("| ecanet eca |") < text.index("| timm eca |")
    assert "No GPU was available" not in text
    assert "H100 (torch 2.15.0, triton 3.9.0, cuda 13.2, cudnn 9, commit abc) on 2026-12-01" in text
    assert write(None)[2] == PAGE.read_text()  # and back


@pytest.mark.parametrize(
    ("record", "message"),
    [(make_record(rehearsal=True), "rehearsal on a CPU"), ("{", "Expecting"), ({"rehearsal": False}, "torch|device")],
)
def test_other_files_are_refused_and_the_page_stays(write, record, message):
    code, error, text = write(record)
    assert code == 2
    assert text == PAGE.read_text()
    assert any(part in error.splitlines()[-1] for part in message.split("|"))
