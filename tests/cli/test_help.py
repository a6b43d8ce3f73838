"""Help fits a screen and is consistent, and the command line says what to install when packages are missing."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

import ecanet as library
from ecanet.__main__ import SHORT_HELP, TRAIN_EXTRA
from ecanet.cli import TASKS, app

COMMANDS = typer.main.get_command(app).commands

PRIVATE_WORDS = {
    "asked",
    "beside",
    "bigger",
    "genuine",
    "judged",
    "killed",
    "laid",
    "likeliest",
    "listened",
    "luck",
    "mixed",
    "opened",
    "paired",
    "rightly",
    "strewn",
    "told",
    "twice",
    "twin",
    "wanted",
    "watched",
    "wire",
}
"""Words that this project once used in a sense of its own. A user must not need to learn them."""


def entries(text):
    """Return the lines of each option, argument and command in the boxes of a help text.

    At 80 columns, what is too long for one line goes on in the next one, which begins further to the right.
    """
    found = []
    for line in text.splitlines():
        if line.startswith("│"):
            content = line.strip("│").rstrip()
            if len(content) - len(content.lstrip()) <= 4:
                found.append([])
            found[-1].append(content.strip())
    return found


def test_the_version(ecanet):
    assert ecanet("--version")[:2] == (0, f"ecanet {library.__version__}\n")
    assert ecanet("--version", "train")[:2] == (0, f"ecanet {library.__version__}\n")


def test_the_list_of_commands_has_one_line_for_each(ecanet):
    code, out, err = ecanet("--help")
    assert (code, err) == (0, "")
    lines = {entry[0].split()[0]: entry for entry in entries(out)}
    assert set(COMMANDS) <= set(lines)
    assert [name for name, entry in lines.items() if len(entry) > 1] == []
    assert ecanet("-h")[1] == out
    assert len([line for line in out.splitlines() if line.strip()]) <= 30


def test_without_arguments_the_eight_tasks_are_shown(ecanet):
    code, out, err = ecanet()
    assert (code, err) == (0, "")
    assert len(TASKS) == 8
    assert max(map(len, out.splitlines())) <= 80
    for task, line in TASKS.items():
        assert re.search(rf"{task} +{re.escape(line)}$", out, re.MULTILINE)
        command, *rest = line.split()[1:]
        options = {name for parameter in COMMANDS[command].params for name in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(ecanet, command):
    code, out, err = ecanet(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: ecanet {command}" in out
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 80
    # The terminal library breaks lines at 80 columns by itself, so a help text that is too long shows as more lines.
    assert [entry for entry in entries(out) if len(entry) > (3 if "recipe" in entry[0] else 2)] == []
    assert "…" not in re.sub(r", …", "", out), "a word is cut off"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_no_private_word(ecanet, command):
    words = set(re.findall(r"[a-z]+", ecanet(*command.split(), "--help")[1].lower()))
    assert words & PRIVATE_WORDS == set()


def test_every_command_with_a_result_prints_json():
    commands = {name: c for name, c in COMMANDS.items() if name != "shards"} | COMMANDS["shards"].commands
    silent = {name for name, c in commands.items() if "as_json" not in {p.name for p in c.params}}
    assert silent == {"app", "completion"}


def test_every_option_is_explained():
    silent = [
        f"{n} {p.name}" for n, c in COMMANDS.items() for p in c.params if not (getattr(p, "help", None) or "").strip()
    ]
    assert silent == []


def test_an_option_means_the_same_in_every_command():
    for name in ("model", "kernel_sizes", "data", "device", "epochs", "as_json", "on_corrupt"):
        options = [p for c in COMMANDS.values() for p in c.params if p.name == name]
        if name == "device":  # the benchmark does not support mps
            options = [p for p in options if p not in COMMANDS["bench"].params]
        assert len(options) > 1, name
        assert len({p.help for p in options}) == 1, name
        assert len({tuple(p.opts) for p in options}) == 1, name


# without the packages of the train extra

WITHOUT = """
import contextlib, io, json, sys
from importlib import metadata
gone = set()
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in gone:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
real = metadata.version
def version(name):
    if name in gone:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
from ecanet.__main__ import main
found = {}
for line, absent in json.loads(sys.argv[1]).items():
    gone.clear()
    gone.update(absent)
    sys.argv = ["ecanet", *line.split()]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            found[line] = stop.code, out.getvalue(), err.getvalue()
print(json.dumps(found))
"""

LINES = {line: sorted(TRAIN_EXTRA) for line in ("", "--help", "--version", "models", "eval --help")}
LINES |= {"doctor": ["typer", "rich", "lightning", "packaging"], "-h": ["typer"], "train quickstart": ["lightning"]}
"""Command lines, and the packages that cannot be imported when they run. The last needs those that the others lack."""


@pytest.fixture(scope="module")
def answers():
    """Return exit code, standard output and standard error of each of `LINES`, run in a process without packages."""
    command = [sys.executable, "-c", WITHOUT, json.dumps(LINES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return {line: tuple(answer) for line, answer in json.loads(done.stdout).items()}


@pytest.mark.parametrize("arguments", ["", "--help", "-h"])
def test_help_without_typer(answers, arguments):
    assert answers[arguments] == (0, SHORT_HELP, "")


def test_the_short_help_lists_the_commands_and_the_remedy():
    assert re.search(r"Commands:((?:\n  .*)+)", SHORT_HELP)[1].replace(",", "").split() == list(COMMANDS)
    assert "pip install 'ecanet[train]'" in SHORT_HELP
    assert max(map(len, SHORT_HELP.splitlines())) <= 80


def test_the_version_without_typer(answers):
    assert answers["--version"] == (0, f"ecanet {library.__version__}\n", "")


@pytest.mark.parametrize("arguments", ["models", "eval --help"])
def test_a_command_without_the_train_extra_is_one_line(answers, arguments):
    said = "ecanet: typer is not installed; the command line needs more packages: pip install 'ecanet[train]'\n"
    assert answers[arguments] == (2, "", said)


def test_the_doctor_without_the_train_extra(answers):
    code, out, err = answers["doctor"]
    assert (code, err) == (0, "")
    assert "missing  train" in out
    assert "lightning is not installed" in out
    assert "pip install 'ecanet[train]'" in out


def test_training_without_lightning_is_one_line(answers):
    code, _, err = answers["train quickstart"]
    assert code == 2
    assert err.startswith("ecanet: lightning is not installed")
    assert err.endswith("pip install 'ecanet[train]'\n")
    assert err.count("\n") == 1


def test_the_list_of_the_train_extra_is_complete():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {
        line.partition(">")[0].replace("scikit-learn", "sklearn") for line in project["optional-dependencies"]["train"]
    }
    assert names <= TRAIN_EXTRA
