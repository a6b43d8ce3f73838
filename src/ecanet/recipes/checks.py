"""The base class of every configuration, and the checks of its values."""

import dataclasses
import difflib
import math
import types
import unicodedata
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import ClassVar, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from ecanet.errors import ConfigError, show_value

__all__ = ["Config", "Limits", "check_limits", "check_options", "suggestion"]

Limits = dict[str, tuple[float | None, float | None]]
"""The lowest and the highest allowed value by setting, for texts the number of characters; None is the general limit.

Of a list, these are the limits of each item.
"""

LARGEST, LONGEST_TEXT, LONGEST_LIST, DEEPEST_GROUP = 2**53, 4096, 2**17, 8
"""General limits. A recipe may come from anybody's checkpoint: it must not ask for all memory or fail later on."""


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
            got = show_value(values[0])
            raise ConfigError(f"{cls.__name__} takes settings by name, such as {names[0]}=..., got {got}")
        for name in settings:
            if name not in names:
                raise ConfigError(f"{name[:60]} is not a setting of {cls.__name__}; {suggestion(name, names)}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in (field.name for field in fields(self)):
            value = _check_type(name, getattr(self, name), hints[name])
            check_limits(name, value, *self.LIMITS.get(name, (None, None)))
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
    similar = difflib.get_close_matches(wrong[:255], names, n=1)
    return f"did you mean {similar[0]!r}?" if similar else f"choose one of {', '.join(names)}"


def _check_type(name: str, value: object, hint: object) -> object:
    """Return ``value`` converted to a type that the annotation ``hint`` allows, or raise ConfigError."""
    options: tuple[object, ...] = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if _is_instance(value, option):
            return _convert(name, value, option)
    raise ConfigError(f"{name} must be {' or '.join(map(_describe, options))}, got {show_value(value)}")


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


def _convert_numbers(name: str, value: object, depth: int = 0) -> object:
    """Return a copy of the nested dictionaries and lists of ``value`` with plain Python numbers.

    Raises:
        ConfigError: a number is not finite, a text or a number is beyond the general limits, or the nesting is.
    """
    if depth > DEEPEST_GROUP:
        raise ConfigError(f"{name} is nested more than {DEEPEST_GROUP} times; no option needs that")
    if isinstance(value, dict | list | tuple):
        _check_count(name, cast(Sized, value))
    if isinstance(value, dict):
        items = cast(dict[str, object], value).items()
        return {_check_key(name, key): _convert_numbers(f"{name}.{key}", item, depth + 1) for key, item in items}
    if isinstance(value, list | tuple):
        items = [_convert_numbers(name, item, depth + 1) for item in cast(Sequence[object], value)]
        return items if isinstance(value, list) else tuple(items)
    if not isinstance(value, bool) and isinstance(value, Real):
        value = _check_type(name, value, int if isinstance(value, Integral) else float)
    check_limits(name, value)
    return value


def _check_key(group: str, key: object) -> str:
    """Return ``key`` if it can name an option of ``group``."""
    if not isinstance(key, str) or len(key) > 255:
        raise ConfigError(f"{group} has an option called {show_value(key)}; a name is a text of 255 characters at most")
    check_limits(group, key)
    return key


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
    if option == tuple[str, ...]:
        return "a list of texts"
    kind = get_origin(option) or option
    return words.get(kind, f"a {getattr(kind, '__name__', kind)}")


def check_limits(name: str, value: object, lowest: float | None = None, highest: float | None = None) -> None:
    """Check a number, a text or each item of a list.

    Raises:
        ConfigError: it is below ``lowest`` or above ``highest`` (None: the general limit), or a text holds what
            neither paths nor pages can hold.
    """
    if isinstance(value, tuple):
        _check_count(name, cast(Sized, value))
        for item in cast(tuple[object, ...], value):
            check_limits(name, item, lowest, highest)
    if isinstance(value, str):
        _check_text(name, value, LONGEST_TEXT if highest is None else int(highest))
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if isinstance(value, int):
        lowest, highest = (-LARGEST if lowest is None else lowest), (LARGEST if highest is None else highest)
    if lowest is not None and value < lowest:
        raise ConfigError(f"{name} must be at least {lowest:.16g}, got {show_value(value)}")
    if highest is not None and value > highest:
        raise ConfigError(f"{name} must be at most {highest:.16g}, got {show_value(value)}")


NO_OPTIONS = {
    "attention", "example", "features_only", "in_channels", "kernel_sizes", "model", "name", "num_classes",
    "out_indices", "preserve", "replace", "weights", "where",
}  # fmt: skip
"""What building and attaching take beside an attention's options: the data or another setting decides it."""


def check_options(options: Mapping[str, object]) -> None:
    """Raise ConfigError if one of an attention's ``options`` would reach another argument of the network."""
    if taken := NO_OPTIONS & set(options):
        raise ConfigError(f"options are the attention's own, such as reduction; {sorted(taken)[0]!r} is none of them")


def _check_count(name: str, values: Sized) -> None:
    """Raise ConfigError if there are too many values."""
    if len(values) > LONGEST_LIST:
        raise ConfigError(f"{name} has {len(values):,} values; at most {LONGEST_LIST:,} are allowed")


def _check_text(name: str, text: str, longest: int) -> None:
    """Raise ConfigError if ``text`` is too long or holds control characters or broken Unicode.

    The bytes of a file's name that are not UTF-8 are fine: Python writes them as surrogates that stand for them.
    """
    if len(text) > longest:
        raise ConfigError(f"{name} has {len(text):,} characters, at most {longest:,} are allowed: {show_value(text)}")
    if any("\ud800" <= character < "\udc80" or "\udcff" < character <= "\udfff" for character in text):
        raise ConfigError(f"{name} holds half of a character, which no file can: {show_value(text)}")
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise ConfigError(f"{name} holds control characters: {show_value(text)}")
