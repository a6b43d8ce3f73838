"""Random recipes and kernel sizes: what fits survives JSON, what does not is one line that names the setting."""

import dataclasses
import json
import types
from collections import Counter
from collections.abc import Mapping
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecanet.errors import ConfigError
from ecanet.recipes import Recipe, from_dict, parse_kernel_sizes, to_dict, with_settings

pytestmark = pytest.mark.random_cases

keys = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]))
"""Names in one line."""

LARGEST = 10**300
"""Larger whole numbers do not fit a float."""

texts = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/\\"), min_size=1, max_size=99)
"""What a setting may be called."""

plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-LARGEST, LARGEST)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)
"""What JSON can hold."""


def kinds_of(hint: object) -> tuple[object, ...]:
    """Return the alternatives of a type hint."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def settings_of(group: type, prefix: str = "") -> dict[str, object]:
    """Return the dotted names of all settings of a recipe, each with its type hint."""
    found: dict[str, object] = {}
    for name, hint in get_type_hints(group).items():
        if name in {field.name for field in dataclasses.fields(group)}:
            if dataclasses.is_dataclass(hint):
                found |= settings_of(hint, f"{prefix}{name}.")
            else:
                found[prefix + name] = hint
    return found


SETTINGS = settings_of(Recipe)


def fitting(kind: object) -> st.SearchStrategy[object]:
    """Return a strategy for values of the type ``kind``, most of them within the limits."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        return st.lists(st.integers(1, 99), max_size=5)
    if get_origin(kind) is dict:
        return st.dictionaries(keys, st.integers(0, 99) | texts | st.lists(st.integers(0, 99), max_size=3), max_size=3)
    return {
        int: st.integers(0, 40),
        float: st.floats(0.001, 1) | st.integers(0, 1),
        bool: st.booleans(),
        str: texts,
        type(None): st.none(),
    }[kind]


def fits(kind: object, value: object) -> bool:
    """Return whether ``value`` is one of the type ``kind``, without its limits."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(type(v) is int for v in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (get_origin(kind) or kind)


def nested(values: Mapping[str, object]) -> dict[str, object]:
    """Return ``values`` with a dictionary for each group of the dotted names."""
    groups: dict[str, object] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        group = groups
        for part in path:
            group = group.setdefault(part, {})  # pyright: ignore[reportAssignmentType]
        group[last] = value  # pyright: ignore[reportIndexIssue]
    return groups


@st.composite
def some_settings(draw: st.DrawFn) -> dict[str, object]:
    """Draw up to five settings with values of their types."""
    names = draw(st.lists(st.sampled_from(list(SETTINGS)), max_size=5, unique=True))
    return {name: draw(st.one_of(*map(fitting, kinds_of(SETTINGS[name])))) for name in names}


def check_message(error: ConfigError, *parts: str) -> None:
    """Hold a message to one line that contains one of ``parts``."""
    text = str(error)
    assert len(text.splitlines()) == 1, text
    assert any(part in text for part in parts), text


def test_settings_survive_json_or_are_refused_by_name():
    counts = Counter[str]()

    @given(some_settings())
    def check(values: dict[str, object]) -> None:
        try:
            recipe = from_dict(Recipe, nested(values))
        except ConfigError as error:
            counts["refused"] += 1
            check_message(error, *(name.rpartition(".")[2] for name in values))
            return
        counts["built"] += 1
        through_json = json.loads(json.dumps(to_dict(recipe)))
        assert from_dict(Recipe, through_json) == recipe
        assert to_dict(from_dict(Recipe, through_json)) == through_json
        for name, value in values.items():
            actual: object = recipe
            for part in name.split("."):
                actual = getattr(actual, part)
            assert actual == (tuple(value) if isinstance(value, list) else value)
        assert with_settings(Recipe(), values) == recipe

    check()
    assert counts["built"] > counts["refused"], dict(counts)


@given(st.sampled_from(list(SETTINGS)), plain_values | st.text(st.characters(categories=["Cc", "Cs"])))
def test_a_value_beyond_the_limits_is_refused_by_name_and_others_survive_json(name, value):
    try:
        recipe = from_dict(Recipe, nested({name: value}))
    except ConfigError as error:
        check_message(error, name.rpartition(".")[2])
    else:
        assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe


@given(st.sampled_from(list(SETTINGS)), plain_values)
def test_a_value_of_another_type_is_refused_by_name(name, value):
    if any(fits(kind, value) for kind in kinds_of(SETTINGS[name])):
        return
    with pytest.raises(ConfigError) as caught:
        from_dict(Recipe, nested({name: value}))
    check_message(caught.value, name)


@given(st.sampled_from(["", *{name.rpartition(".")[0] + "." for name in SETTINGS if "." in name}]), keys, plain_values)
def test_a_name_that_is_no_setting_is_refused(group, name, value):
    if any(known == group + name or known.startswith(f"{group}{name}.") for known in SETTINGS):
        return
    path = group.rstrip(".")
    with pytest.raises(ConfigError, match="is not a setting"):
        from_dict(Recipe, {path: {name: value}} if path else {name: value})


@given(plain_values)
def test_whatever_a_file_holds_is_a_recipe_or_refused(value):
    try:
        from_dict(Recipe, value)
    except ConfigError as error:
        check_message(error, "")


@given(st.lists(st.integers(1, 99), min_size=2, max_size=6))
def test_kernel_sizes_with_commas_are_one_for_each_stage(sizes):
    assert parse_kernel_sizes(",".join(map(str, sizes))) == tuple(sizes)
    assert parse_kernel_sizes(", ".join(map(str, sizes))) == tuple(sizes)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=6))
def test_kernel_sizes_without_commas_are_digits(sizes):
    assert parse_kernel_sizes("".join(map(str, sizes))) == tuple(sizes)


@given(st.integers(1, 99))
def test_one_kernel_size_is_a_number(size):
    assert parse_kernel_sizes(str(size)) == size


@given(st.text() | st.text("0123456789, -+_.eadficl") | st.sampled_from(["official", "adaptive"]))
def test_other_texts_are_kernel_sizes_or_refused(text):
    try:
        sizes = parse_kernel_sizes(text)
    except ConfigError as error:
        check_message(error, "kernel sizes")
        return
    if isinstance(sizes, str):
        assert sizes in ("official", "adaptive")
    else:
        assert all(type(size) is int for size in (sizes if isinstance(sizes, tuple) else (sizes,)))


@pytest.mark.parametrize("text", ["0", "-3,5", "3_5,5", "+3,5", "3,0,5"])
def test_kernel_sizes_that_no_kernel_has(text):
    with pytest.raises(ConfigError, match="kernel sizes"):
        parse_kernel_sizes(text)


def test_a_number_too_large_for_a_float():
    with pytest.raises(ConfigError, match="learning_rate"):
        from_dict(Recipe, {"optimizer": {"learning_rate": 10**400}})


def test_a_name_with_a_line_break_is_refused_in_one_line():
    with pytest.raises(ConfigError) as caught:
        from_dict(Recipe, {"epo\nchs": 3})
    check_message(caught.value, "is not a setting")
