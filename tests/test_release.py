"""What a release needs: one version, workflows that call targets which exist, templates that can be read."""

import re
import runpy
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

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


def test_the_changelog_begins_with_this_version_and_how_to_upgrade():
    first, second = re.findall(r"^##+ (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[:2]
    assert re.fullmatch(rf"{re.escape(ecanet.__version__)} \(\d{{4}}-\d\d-\d\d\)", first)
    assert second.startswith("Upgrading from ")


def test_the_versions_of_python_are_those_that_the_workflow_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {line.rsplit(" ", 1)[1] for line in project["classifiers"] if "Python :: 3." in line}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    used = {*workflow["jobs"]["test"]["strategy"]["matrix"]["python"]}
    for job in workflow["jobs"].values():
        used |= {step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})}
    assert named == {version for version in used if "$" not in version}
    assert project["requires-python"] == f">={min(named)}"


# the README on an index


@pytest.fixture
def hook(monkeypatch):
    """Return the names of hatch_build.py, which is loaded without the build tool."""
    interface = SimpleNamespace(MetadataHookInterface=object)
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    return runpy.run_path(str(ROOT / "hatch_build.py"))


@pytest.mark.parametrize("path", ["README.md", "README.zh-CN.md"])
def test_on_an_index_every_link_is_absolute(hook, path):
    text = (ROOT / path).read_text()
    made = hook["make_absolute"](text, "https://example.org/us/ecanet", "v1.2")
    before, after = (re.findall(r"\]\(([^)]+)\)", one) for one in (text, made))
    assert len(before) == len(after) > 50
    for old, new in zip(before, after, strict=True):
        if "://" in old:
            assert new == old
            continue
        if old.startswith("#"):
            assert new == old
            continue
        view = "raw" if old.endswith(("png", "jpg")) else "blob"
        assert new == f"https://example.org/us/ecanet/{view}/v1.2/{old}"
    assert re.sub(r"\]\([^)]+\)", "", made) == re.sub(r"\]\([^)]+\)", "", text)


@pytest.mark.parametrize("address", ["", "https://example.org/us/ecanet/"])
def test_the_address_stands_in_one_place(hook, monkeypatch, address):
    links = hook["Links"].update
    monkeypatch.setitem(links.__globals__, "read_address", lambda: address.rstrip("/"))
    metadata = {}
    links(None, metadata)
    readme = metadata["readme"]["text"]
    if address:
        assert all(url.startswith(address.rstrip("/")) for url in metadata["urls"].values())
        assert f"](https://example.org/us/ecanet/blob/v{ecanet.__version__}/docs/attach.md" in readme
    else:
        assert "urls" not in metadata
        assert readme == (ROOT / "README.md").read_text()
