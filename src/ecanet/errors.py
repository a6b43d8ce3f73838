"""The errors that a user can cause. The command line prints each as one line and exits with 2.

EcanetError (a ValueError)
├── ConfigError        a setting, option or name does not exist or does not fit
├── DataError          a data set, directory, image or annotation is missing or broken
├── CheckpointError    a weights file is missing, broken, unsafe or made for another network
├── AttachError        there is no place to attach, or a promise cannot be kept at a site
└── ExportError        a network cannot be written for a runtime, or its file fails the check
"""

import reprlib
import sys
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

__all__ = [
    "AttachError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EcanetError",
    "ExportError",
    "check_int",
    "check_positive_int",
    "is_path",
    "is_text",
    "shorten_interrupts",
    "show_value",
    "summarize",
]


class EcanetError(ValueError):
    """Base class of the errors that ecanet raises for a user's mistake."""


class ConfigError(EcanetError):
    """A setting, option or name does not exist or does not fit."""


class DataError(EcanetError):
    """A data set, directory, image or annotation is missing or broken."""


class CheckpointError(EcanetError):
    """A weights file is missing, broken, unsafe or made for another network."""


class AttachError(EcanetError):
    """There is no place to attach, or a promise cannot be kept at a site."""


class ExportError(EcanetError):
    """A network cannot be written for a runtime, or its file fails the check."""


def check_positive_int(name: str, value: object) -> int:
    """Return ``value`` as an int; NumPy's integers are accepted.

    Raises:
        ConfigError: ``value`` is not an integer of at least 1; the message calls it ``name``.
    """
    return check_int(name, value, least=1)


def check_int(name: str, value: object, *, least: int) -> int:
    """Return ``value`` as an int of at least ``least``, which is 0 or 1; NumPy's integers are accepted.

    Raises:
        ConfigError: ``value`` is something else; the message calls it ``name``.
    """
    # True and False are integers to Python, and never meant as a count.
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ConfigError(f"{name} must be {expected}, got {show_value(value)}")
    return int(value)


def is_path(value: object) -> TypeGuard[str | Path]:
    """Return whether ``value`` can be the name of a file or folder, in Unicode text."""
    return isinstance(value, str | Path) and is_text(str(value)) and "\0" not in str(value)


def is_text(value: str) -> bool:
    """Return whether ``value`` can be written into a file: Python also has strings that are no Unicode text.

    >>> is_text("猫"), is_text("\\udc80")
    (True, False)
    """
    return not any("\ud800" <= character <= "\udfff" for character in value)


def summarize(error: Exception) -> str:
    """Return the first line of an error's message in at most 160 printable characters, or the name of its class."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (line if line.isprintable() else ascii(line))[:160]


class _ShortRepr(reprlib.Repr):
    """Python's short representations, which fail for integers of more than 4,300 digits."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 128 else f"an integer of {x.bit_length():,} bits"


_short = _ShortRepr()
_short.maxlevel, _short.maxstring, _short.maxlist, _short.maxtuple, _short.maxdict = 3, 60, 6, 6, 4


def show_value(value: object) -> str:
    """Return ``repr(value)`` for an error message, in one line and shortened if it is long, deep or a huge number.

    >>> show_value("x" * 1000)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxx'"
    """
    text = " ".join(_short.repr(value).split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def shorten_interrupts() -> None:
    """If this process is the command line, let Ctrl-C end it with one line, while it imports packages too."""
    program = sys.argv[0] if sys.argv else ""  # "-m" while Python looks for the module that it will run
    pairs = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    if Path(program).stem == "ecanet" or (program == "-m" and ("-m", "ecanet") in pairs):
        sys.excepthook = _say_interrupted


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line for Ctrl-C, and the traceback of every other exception."""
    if issubclass(kind, KeyboardInterrupt):
        print("ecanet: stopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
