"""Show how far long work is: a bar on standard error, on a terminal alone, and one at a time.

Without the package rich, and where standard error is a file or a pipe, nothing is shown.
"""

import importlib.util
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

__all__ = ["Advance", "is_shown", "set_shown", "shares_terminal", "show", "track"]

T = TypeVar("T")


class Advance(Protocol):
    """Advances a bar by a number of steps, and sets how many there are if that has turned out to be another number."""

    def __call__(self, steps: int, total: int | None = None) -> None:
        """Advance the bar."""
        ...


class _State:
    """Whether bars are turned on, and whether there is one now: a second one would overwrite its line."""

    on = True
    busy = False


def set_shown(on: bool) -> None:
    """Turn all bars on or off, as ``--quiet`` does."""
    _State.on = on


def is_shown() -> bool:
    """Return whether a bar would be seen."""
    free = _State.on and not _State.busy
    return free and sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None


def shares_terminal() -> bool:
    """Return whether standard output is a terminal, so that what is printed must go above the bar.

    rich would print it on the bar's own stream, standard error, and a file or a pipe would not get it.
    """
    return sys.stdout is not None and sys.stdout.isatty()


@contextmanager
def show(title: str, total: int | None = None) -> Generator[Advance]:
    """Show a bar until the block ends; yield the function that advances it by a number of ``total`` steps.

    Without ``total`` the bar runs to and fro, beside the time.
    """
    if not is_shown():
        yield lambda steps, total=None: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    counted = [] if total is None else [MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn()]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), *counted)
    _State.busy = True
    try:
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, redirect_stdout=shares_terminal()) as bar:
            task = bar.add_task(title, total=total)
            yield lambda steps, total=None: bar.update(task, advance=steps, total=total)
    finally:
        _State.busy = False


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` with a bar; ``total`` is their number where they have no length."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # pyright: ignore[reportArgumentType]
    with show(title, total) as advance:
        for item in items:
            yield item
            advance(1)
