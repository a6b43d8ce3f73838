"""`python benchmarks/gpu.py`: its rehearsal on a CPU, its time limit, and machines on which something is missing."""

import importlib
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
PARTS = [
    "ceilings",
    "proof",
    "first-steps",
    "training",
    "training-small-batch",
    "training-graph",
    "inference",
    "profile",
    "passes",
    "training-compiled",
]
NETWORKS = {"ecanet eca", "ecanet plain", "timm eca", "torchvision plain"}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(GPU), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def list_numbers(tree: object) -> list[float]:
    if isinstance(tree, dict | list):
        return [x for branch in (tree.values() if isinstance(tree, dict) else tree) for x in list_numbers(branch)]
    return [tree] if isinstance(tree, int | float) else []


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Path:
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("gpu") / "out.json"
    done = run(out, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def record(rehearsal) -> dict:
    return json.loads(rehearsal.read_text())


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(record):
    assert list(record["parts"]) == PARTS
    for name, part in record["parts"].items():
        assert set(part) == {"figures", "seconds"}, name
        assert name == "proof" or list_numbers(part["figures"]), name
        assert all(math.isfinite(x) for x in list_numbers(part["figures"])), name
    assert record["rehearsal"] is True
    for name in ("command", "python", "torch", "triton", "device", "date"):
        assert record[name], name


@pytest.mark.slow
def test_the_rehearsal_checks_the_kernels(record):
    assert record["parts"]["proof"]["figures"] == {"float32": {"tails": "right", "expansion": "right"}}
    steps = record["parts"]["first-steps"]["figures"]
    assert set(steps["losses"]) == {"fused", "lean", "float64"}
    assert 0 < max(steps["largest_difference"].values()) < 1e-5


@pytest.mark.slow
def test_the_rehearsal_times_every_network(record):
    figures = {name: part["figures"] for name, part in record["parts"].items()}
    assert set(figures["training"]["ms"]) == NETWORKS | {"ecanet eca lean"}
    assert set(figures["training"]["single_step"]["timm eca"]) == {"peak_mb", "enqueue_ms"}
    assert set(figures["training-small-batch"]["ms"]) == set(figures["training-graph"]["ms"]) == NETWORKS
    assert set(figures["training-compiled"]["ms"]) == {"torchvision plain", "ecanet eca"}
    for form in ("autocast", "bfloat16", "bfloat16, CUDA graph"):
        assert set(figures["inference"][form]["ms"]) == NETWORKS | {"optimized eca", "optimized plain"}
    for timed in (figures["training"], figures["inference"]["autocast"]):
        assert "ecanet eca / timm eca" in timed["ratios"]
        rate, spread = timed["images_per_second"]["timm eca"], timed["ms"]["timm eca"]
        assert rate == pytest.approx(1e3 * timed["batch"] / spread["median"])


@pytest.mark.slow
def test_the_rehearsal_times_every_kernel(rehearsal, record):
    for shape, rows in record["parts"]["passes"]["figures"].items():
        assert list(rows) == [
            "moments",
            "apply",
            "apply, shortcut",
            "reduce",
            "reduce, two gradients",
            "grads",
            "grads, sign again",
            "expansion",
            "convolution alone",
            *["3x3 convolution, then ReLU"] * (shape == "8x4x4"),
        ]
    profile = record["parts"]["profile"]["figures"]
    assert profile["launches"] > len(profile["longest"]) == 40
    assert (rehearsal.parent / "out.trace.json.gz").stat().st_size > 1000


@pytest.mark.slow
def test_libraries_that_are_missing_are_named_and_left_out(tmp_path):
    for name in ("timm", "torchvision"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run(tmp_path / "out.json", "--rehearse", "--parts", "training-small-batch", PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[:2] == [
        "timm is not installed: its networks are left out",
        "torchvision is not installed: its networks are left out",
    ]
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["missing"] == done.stdout.splitlines()[:2]
    assert set(record["parts"]["training-small-batch"]["figures"]["ms"]) == {"ecanet eca", "ecanet plain"}


@pytest.fixture
def in_this_process(monkeypatch):
    """Forget what the script imports from its folders."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(GPU.parent)):
            del sys.modules[name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused_in_one_line(monkeypatch, capsys, tmp_path, in_this_process):
    monkeypatch.setattr(sys, "argv", [str(GPU), str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(GPU), run_name="__main__")
    assert stop.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("no CUDA device is available; --rehearse runs small forms of all parts on the CPU")
    )
    assert not (tmp_path / "out.json").exists()


@pytest.fixture
def record_module(monkeypatch):
    monkeypatch.syspath_prepend(GPU.with_name("gpu_parts"))
    yield importlib.import_module("record")
    for name in ("record", "setting"):
        sys.modules.pop(name)


def test_a_part_that_fails_is_saved_and_the_next_one_runs(record_module, tmp_path):
    def fail() -> None:
        raise RuntimeError("out of memory")

    record = record_module.Record(tmp_path / "new" / "out.json", 60, {"device": "none"})
    record.run("first", 0, fail)
    saved = json.loads((tmp_path / "new" / "out.json").read_text())
    assert saved["parts"]["first"]["failed"] == "RuntimeError: out of memory"
    record.run("second", 0, lambda: {"ms": 1})
    assert record.finish() == 1
    saved = json.loads((tmp_path / "new" / "out.json").read_text())
    assert saved["parts"]["second"]["figures"] == {"ms": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]


def test_a_part_that_would_begin_too_late_is_skipped(record_module, tmp_path, capsys):
    record = record_module.Record(tmp_path / "out.json", 60, {})
    record.started -= 50
    record.run("long", 20, lambda: pytest.fail("it began"))
    record.run("short", 5, lambda: {"ms": 1})
    assert record.finish() == 0
    assert record.parts["long"] == {"skipped": "10 s were left and it needs 20 s"}
    assert "figures" in record.parts["short"]
    assert "1 parts done, 1 skipped, 0 failed" in capsys.readouterr().out
