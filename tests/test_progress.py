"""Progress is shown on standard error, on a terminal alone, one bar at a time, and not with --quiet."""

import io
import sys

import pytest
import typer

from ecanet import progress
from ecanet.cli import app


class Terminal(io.StringIO):
    def isatty(self):
        return True


def become_terminal(monkeypatch):
    """Make standard error a terminal that keeps what is written. A fixture is too early: pytest sets it once more."""
    monkeypatch.setattr(progress._State, "on", True)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    return sys.stderr


def test_a_terminal_shows_a_bar_and_all_items_pass(monkeypatch):
    terminal = become_terminal(monkeypatch)
    assert list(progress.track(range(3), "counting")) == [0, 1, 2]
    assert "counting" in terminal.getvalue()
    assert "0/3" in terminal.getvalue()


def test_items_without_a_length(monkeypatch):
    terminal = become_terminal(monkeypatch)
    assert list(progress.track(iter("ab"), "letters")) == ["a", "b"]
    assert list(progress.track(iter("ab"), "known", 2)) == ["a", "b"]
    assert "0/2" in terminal.getvalue()


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_what_is_printed_beside_a_bar_reaches_standard_output(monkeypatch, kind):
    """A file or a pipe gets it, on a terminal it stands above the bar."""
    terminal, output = become_terminal(monkeypatch), kind()
    monkeypatch.setattr(sys, "stdout", output)
    for number in progress.track(range(2), "counting"):
        print(f"row {number}")
    printed, other = (output, terminal) if kind is io.StringIO else (terminal, output)
    assert [f"row {number}" in printed.getvalue() for number in range(2)] == [True, True]
    assert "row" not in other.getvalue()
    assert sys.stdout is output


def test_no_bar_without_a_terminal(monkeypatch):
    monkeypatch.setattr(progress._State, "on", True)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not progress.is_shown()
    assert list(progress.track(range(3), "counting")) == [0, 1, 2]
    with progress.show("working") as advance:
        advance(1)
    assert sys.stderr.getvalue() == ""


def test_no_standard_error_is_no_mistake(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress.track(range(3), "counting")) == [0, 1, 2]


def test_bars_can_be_turned_off(monkeypatch):
    terminal = become_terminal(monkeypatch)
    progress.set_shown(False)
    assert list(progress.track(range(3), "counting")) == [0, 1, 2]
    assert terminal.getvalue() == ""


def test_there_is_one_bar_at_a_time_and_another_one_after_an_error(monkeypatch):
    terminal = become_terminal(monkeypatch)
    with progress.show("outer"):
        list(progress.track(range(3), "inner"))
    assert "inner" not in terminal.getvalue()
    with pytest.raises(ZeroDivisionError), progress.show("failing"):
        raise ZeroDivisionError
    list(progress.track(range(3), "later"))
    assert "later" in terminal.getvalue()


def test_without_rich_nothing_is_shown(monkeypatch):
    terminal = become_terminal(monkeypatch)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    assert list(progress.track(range(3), "counting")) == [0, 1, 2]
    assert terminal.getvalue() == ""


GROUP = typer.main.get_command(app).commands
COMMANDS = {**GROUP, **{f"shards {name}": one for name, one in GROUP["shards"].commands.items()}}
BOTH = {"eval", "predict", "detect", "paper", "ablate", "inspect", "bench", "export", "slim"}
REPORT_PROGRESS = {*BOTH, "train", "report"}
PRINT_A_RESULT = {*BOTH, "models", "cost", "doctor", "train", "report", "weights", "push"}
IN_SHARDS = ["shards pack", "shards index", "shards check"]


@pytest.mark.parametrize(("option", "names"), [("--quiet", REPORT_PROGRESS), ("--json", PRINT_A_RESULT)])
def test_commands_have_the_options_of_their_kind(option, names):
    have = {name for name, one in COMMANDS.items() if any(option in p.opts for p in one.params)}
    assert have == {*names, *IN_SHARDS}


def test_quiet_turns_bars_off_for_its_command_alone(ecanet, monkeypatch):
    monkeypatch.setattr(progress._State, "on", True)
    ecanet("eval", "nowhere", "--quiet")
    assert not progress._State.on
    ecanet("eval", "nowhere")
    assert progress._State.on
