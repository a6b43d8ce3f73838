"""The kernels compiled for an H100 or H200, which needs none: registers, memory accesses, programs a processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
COMPILE = """
import json, compile_kernels
rows = [*compile_kernels.list_passes("bf16", True), *compile_kernels.list_passes("bf16", False)]
rows += [*compile_kernels.list_expansions("bf16"), *compile_kernels.list_predicted_gates("bf16")]
print(json.dumps([compile_kernels.compile_kernel(kernel) for kernel in rows]))
"""


@pytest.fixture(scope="module")
def rows():
    """Return the rows of the report, for all shapes of ResNet-50 in bfloat16. The first run compiles for minutes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_nothing_spills(rows):
    assert len(rows) > 40
    assert [row for row in rows if row["local_bytes"] or row["stack_bytes"]] == []


@pytest.mark.slow
def test_tensors_are_read_in_sixteen_bytes(rows):
    """No load has the two bytes of one bfloat16: what is not 16 bytes wide is a coefficient, or sign bits."""
    passes = [row for row in rows if "role" in row]
    assert [row for row in passes if "load 2" in row["memory"] or "load 16" not in row["memory"]] == []
    narrow = {(row["kernel"], row["layout"]) for row in passes if "store 2" in row["memory"]}
    assert narrow == {("_reduce", "contiguous")}  # t, in planes of an odd number of elements


@pytest.mark.slow
def test_processors_have_several_programs(rows):
    """Reductions at batch 256 are one whole wave: eight programs on each processor. The shortcut's norm needs more."""
    last = [row for row in rows if row["layout"] == "channels_last"]
    reductions = [row for row in last if row["kernel"] in ("_moments", "_reduce") and row["role"] != "side"]
    assert min(row["blocks"] for row in reductions) >= 8
    assert min(row["blocks"] for row in rows if "role" in row) >= 5
    first = [row for row in rows if row["kernel"].startswith("_expand") and row["inputs"] == 64]
    assert min(row["blocks"] for row in first) >= 3
    assert min(row["blocks"] for row in rows if row["kernel"].startswith("_predict_gate")) >= 3
