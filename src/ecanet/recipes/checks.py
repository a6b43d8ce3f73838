"""The base class of every configuration, and the checks of its values."""

import dataclasses
import difflib
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import ClassVar, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from ecanet.errors import ConfigError

__all__ = ["Config", "Limits", "suggestion"]

Limits = dict[str, tuple[float | None, float | None]]
"""The lowest and the highest allowed value by setting; None is no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A frozen group of settings. Values are checked against their annotations and, if they are numbers, ``LIMITS``.

    NumPy's numbers become Python's, lists become tuples, and integers become floats where a float is expected.

    Raises:
        ConfigError: there is no setting of such a name, or a value does not fit.
    """

    LIMITS: ClassVar[Limits] = {}

    def __new__(cls, *values: object, **settings: object) -> Self:
        """Refuse an unknown setting. The generated ``__init__`` runs later, and its TypeError would suggest nothing."""
        names = [field.name for field in fields(cls)]
        if values:
            raise ConfigError(f"{cls.__name__} takes settings by name, such as {names[0]}=..., got {values[0]!r}")
        for name in settings:
            if name not in names:
                raise ConfigError(f"{name} is not a setting of {cls.__name__}; {suggestion(name, names)}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in (field.name for field in fields(self)):
            value = _check_type(name, getattr(self, name), hints[name])
            _check_limits(name, value, *self.LIMITS.get(name, (None, None)))
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raise ConfigError if two settings contradict each other."""

    def but(self, **changes: object) -> Self:
        """Return a copy with ``changes``.

        Raises:
            ConfigError: as for the constructor.
        """
        return dataclasses.replace(self, **changes)


def suggestion(wrong: str, names: Sequence[str]) -> str:
    """Return the end of an error message about an unknown name: the most similar of ``names``, or all of them.

    >>> suggestion("epoch", ["epochs", "seed"])
    "did you mean 'epochs'?"
    """
    similar = difflib.get_close_matches(wrong, names, n=1)
    return f"did you mean {similar[0]!r}?" if similar else f"choose one of {', '.join(names)}"


def _check_type(name: str, value: object, hint: object) -> object:
    """Return ``value`` converted to a type that the annotation ``hint`` allows, or raise ConfigError."""
    options: tuple[object, ...] = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if _is_instance(value, option):
            return _convert(name, value, option)
    raise ConfigError(f"{name} must be {' or '.join(map(_describe, options))}, got {value!r}")


def _is_instance(value: object, option: object) -> bool:
    """Return whether ``value`` can stand where a setting is annotated with ``option``."""
    kind = get_origin(option) or option
    if kind is Literal:
        return isinstance(value, str) and value in get_args(option)
    if kind is float:
        return _is_finite(value)
    if kind is int:
        # True and False are integers to Python, and never meant as a number here.
        return not isinstance(value, bool) and isinstance(value, Integral)
    if kind is tuple:
        return isinstance(value, tuple | list) and all(
            _is_instance(item, get_args(option)[0]) for item in cast(Sequence[object], value)
        )
    return isinstance(kind, type) and isinstance(value, kind)


def _is_finite(value: object) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _convert(name: str, value: object, option: object) -> object:
    """Return ``value``, which fits the annotation ``option``, as a plain Python value."""
    kind = get_origin(option) or option
    if kind is float:
        return float(cast(float, value))
    if kind is int:
        return int(cast(int, value))
    if kind is tuple:
        return tuple(_convert(name, item, get_args(option)[0]) for item in cast(Sequence[object], value))
    return _convert_numbers(name, value) if kind is dict else value


def _convert_numbers(name: str, value: object) -> object:
    """Return a copy of the nested dictionaries and lists of ``value`` with plain Python numbers.

    Raises:
        ConfigError: a number is not finite.
    """
    if isinstance(value, dict):
        items = cast(dict[str, object], value).items()
        return {key: _convert_numbers(f"{name}.{key}", item) for key, item in items}
    if isinstance(value, list | tuple):
        items = [_convert_numbers(name, item) for item in cast(Sequence[object], value)]
        return items if isinstance(value, list) else tuple(items)
    if not isinstance(value, bool) and isinstance(value, Real):
        return _check_type(name, value, int if isinstance(value, Integral) else float)
    return value


def _describe(option: object) -> str:
    """Return the words for an annotation in an error message."""
    words: dict[object, str] = {
        int: "an integer", float: "a finite number", str: "a string", bool: "true or false",
        dict: "a group of settings", tuple: "a list of integers", type(None): "None",
    }  # fmt: skip
    if get_origin(option) is Literal:
        return " or ".join(repr(choice) for choice in get_args(option))
    if option == tuple[float, ...]:
        return "a list of finite numbers"
    kind = get_origin(option) or option
    return words.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _check_limits(name: str, value: object, lowest: float | None, highest: float | None) -> None:
    """Raise ConfigError if ``value`` is a number below ``lowest`` or above ``highest``."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if lowest is not None and value < lowest:
        raise ConfigError(f"{name} must be at least {lowest:g}, got {value}")
    if highest is not None and value > highest:
        raise ConfigError(f"{name} must be at most {highest:g}, got {value}")
