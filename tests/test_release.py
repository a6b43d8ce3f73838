"""What a release needs: one version, workflows that call targets which exist, templates that can be read."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import ecanet

ROOT = Path(__file__).parents[1]
YAML = [ROOT / "CITATION.cff", *sorted((ROOT / ".github").rglob("*.yml"))]


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/ecanet/__init__.py"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ecanet.__version__


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_the_files_for_others_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_workflows_run_targets_and_files_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    called = {name for text in texts for name in re.findall(r"run: make ([a-z-]+)", text)}
    assert {"test", "check", "dist"} <= called <= targets
    for text in texts:
        for name in re.findall(r"--constraint (\S+)", text):
            assert (ROOT / name).exists(), name
