"""Settings as plain dictionaries, by dotted names, and as text.

>>> from_dict(Recipe, {"data": {"batchsize": 4}})
Traceback (most recent call last):
    ...
ecanet.errors.ConfigError: data.batchsize is not a setting; did you mean 'batch_size'?
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import TypeVar, cast, get_type_hints

from ecanet.errors import ConfigError, show_value
from ecanet.recipes.checks import Config, suggestion
from ecanet.recipes.config import Recipe

__all__ = ["from_dict", "parse_kernel_sizes", "to_dict", "with_settings"]

ConfigT = TypeVar("ConfigT", bound=Config)

POSITIVE_INTEGER = re.compile("[1-9][0-9]*")


def from_dict(cls: type[ConfigT], values: object, at: str = "") -> ConfigT:
    """Return a ``cls`` with the plain ``values``; settings that are left out have their defaults.

    ``at`` is the path of the group in a larger configuration, which an error message shows before the setting.

    Raises:
        ConfigError: a key is not a setting, or a value does not fit.
    """
    hints, names = get_type_hints(cls), [f.name for f in fields(cls)]
    settings: dict[str, object] = {}
    for key, value in _check_group(values, at).items():
        if key not in names:
            wrong = _quote(key)
            raise ConfigError(f"{at}.{wrong} is not a setting; {suggestion(wrong, names)}".removeprefix("."))
        path = f"{at}.{key}" if at else key
        kind: object = hints[key]
        if isinstance(kind, type) and issubclass(kind, Config):
            value = from_dict(kind, value, path)
        settings[key] = value
    try:
        return cls(**settings)
    except ConfigError as error:
        raise ConfigError(f"{at}.{error}" if at else str(error)) from None


def to_dict(config: Config) -> dict[str, object]:
    """Return ``config`` as dictionaries, lists, strings, numbers, booleans and None. `from_dict` is the inverse.

    >>> from_dict(Recipe, to_dict(Recipe(epochs=3))) == Recipe(epochs=3)
    True
    """
    return {f.name: _to_plain(getattr(config, f.name)) for f in fields(config)}


def with_settings(config: ConfigT, settings: Mapping[str, object]) -> ConfigT:
    """Return ``config`` with values changed by their dotted names.

    As in `Recipe.but`, a warm-up that is too long for the new ``epochs`` shrinks, and no least number of steps
    lengthens the run, unless these are changed too.

    >>> with_settings(Recipe(), {"data.batch_size": 32, "epochs": 2}).data.batch_size
    32

    Raises:
        ConfigError: a name is not a setting, or a value does not fit.
    """
    if isinstance(config, Recipe) and "epochs" in settings:
        settings = {"schedule.warmup_epochs": config.warmup_for(settings["epochs"]), "min_steps": 0, **settings}
    values = to_dict(config)
    for name, value in settings.items():
        *groups, last = name.split(".")
        inner = values
        for group in groups:
            nested = inner.get(group)
            if not isinstance(nested, dict):
                raise ConfigError(f"{_quote(name)} is not a setting; {suggestion(group, list(inner))}")
            inner = cast(dict[str, object], nested)
        inner[last] = value
    return from_dict(type(config), values)


def parse_kernel_sizes(text: str) -> str | int | tuple[int, ...]:
    """Return the kernel sizes that ``text`` names.

    ``official`` and ``adaptive`` stay names. ``3,5,5,7`` and ``3557`` are one size per stage, ``5`` and ``11`` are one
    size for all stages.

    >>> parse_kernel_sizes("adaptive"), parse_kernel_sizes("3557"), parse_kernel_sizes("3, 5, 5, 11")
    ('adaptive', (3, 5, 5, 7), (3, 5, 5, 11))
    >>> parse_kernel_sizes("11")
    11

    Raises:
        ConfigError: ``text`` is none of these.
    """
    if text in ("official", "adaptive"):
        return text
    if len(text) <= 2 and POSITIVE_INTEGER.fullmatch(text):
        return int(text)
    parts = [part.strip(" ") for part in text.split(",")] if "," in text else list(text)
    if not parts or not all(map(POSITIVE_INTEGER.fullmatch, parts)):
        raise ConfigError(
            f"kernel sizes {text!r} are not 'official', 'adaptive' or one number per stage, such as 3,5,5,7"
        )
    return tuple(map(int, parts))


def _check_group(values: object, at: str) -> Mapping[str, object]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{at or 'a recipe'} must be a group of settings, got {show_value(values)}")
    return cast(Mapping[str, object], values)


def _quote(name: object) -> str:
    """Return ``name`` as an error message shows it: escaped if it has control characters, shortened if it is long."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 60 else show_value(name)


def _to_plain(value: object) -> object:
    if isinstance(value, Config):
        return to_dict(value)
    # A copy, so that changes of the dictionary do not reach the frozen value.
    return list(cast(tuple[object, ...], value)) if isinstance(value, tuple) else copy.deepcopy(value)
