"""`ecanet doctor` says what is so, and what to do, whatever is missing or broken."""

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ecanet import ops
from ecanet.studies import doctor

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

FOR_DEVELOPERS = {"dev", "docs", "sweep"}


def find(name):
    (found,) = [one for one in doctor.examine() if one.name == name]
    return found


@pytest.fixture
def installed(monkeypatch):
    """Versions by name, which stand for all that is installed; the requirements are those of pyproject.toml."""
    versions = {"lightning": "2.6.6"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    lines = [
        f'{requirement}; extra == "{extra}"'
        for extra, requirements in PROJECT["optional-dependencies"].items()
        for requirement in requirements
    ]
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.11", *lines])
    return versions


def test_every_extra_for_users_is_examined(installed):
    assert set(doctor.PURPOSES) <= {*PROJECT["optional-dependencies"], "openvino", "executorch"}
    assert {*PROJECT["optional-dependencies"]} - FOR_DEVELOPERS <= set(doctor.PURPOSES)
    names = {found.name for found in doctor.examine()}
    assert {*PROJECT["optional-dependencies"]} - FOR_DEVELOPERS <= names


def test_a_missing_extra_names_its_packages_and_the_command(installed):
    found = find("mlflow")
    assert (found.state, found.remedy) == ("missing", "pip install 'ecanet[mlflow]'")
    assert found.detail == "the logger mlflow: mlflow is not installed"
    found = find("train")
    assert found.state == "missing"
    assert "more" in found.detail
    assert "lightning" not in found.detail


def test_an_extra_is_there_when_all_its_packages_fit(installed):
    installed["mlflow"] = "3.1"
    assert find("mlflow").state == "ok"
    installed["mlflow"] = "2.9"
    assert find("mlflow").detail == "the logger mlflow: mlflow is 2.9, not >=3"


def test_a_clone_that_is_not_installed(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert (find("extras").state, find("extras").remedy) == ("missing", "pip install .")


def test_kernels_on_a_gpu_are_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: f"GPU {at}")
    asked = []

    def find_failure(device, dtype):
        asked.append((device, dtype))
        return "dz is off by 3" if dtype == torch.bfloat16 else None

    monkeypatch.setattr(ops.proof, "find_failure", find_failure)
    assert find("devices").detail.endswith("cuda:0 (GPU 0), cuda:1 (GPU 1)")
    asked.clear()
    assert find("kernels, float32").state == "ok"
    assert asked == [(torch.device("cuda", 0), dtype) for dtype in ops.proof.DTYPES]
    found = find("kernels, bfloat16")
    assert (found.state, "dz is off by 3" in found.detail) == ("broken", True)


def test_the_table_is_aligned_and_says_the_remedy():
    found = [
        doctor.Finding(name="a", state="ok", detail="fine"),
        doctor.Finding(name="long name", state="missing", detail="gone", remedy="pip install it"),
    ]
    assert doctor.format_findings(found).splitlines() == [
        "ok       a          fine",
        "missing  long name  gone",
        "                    pip install it",
    ]


# whole processes

BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


def run(code, folder):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    return done.returncode, done.stdout, done.stderr


def test_a_broken_torchvision(tmp_path):
    (tmp_path / "torchvision.py").write_text(BROKEN)
    code = "import sys; sys.argv = ['ecanet', 'doctor']; from ecanet.__main__ import main; main()"
    status, out, err = run(code, tmp_path)
    assert (status, err) == (2, "")
    (line,) = [line for line in out.splitlines() if "torchvision  " in line]
    assert line == "broken   torchvision  does not fit this torch: operator torchvision::nms does not exist"
    assert doctor.TOGETHER in out


def test_the_command(ecanet):
    status, out, err = ecanet("doctor")
    assert (status, err) == (0, "")
    assert "ok       torchvision" in out
    found = json.loads(ecanet("doctor", "--json")[1])
    assert [one["name"] for one in found["findings"]][:3] == ["python", "torch", "torchvision"]
