"""The rows of the benchmark's result, as they are written to JSON, and how they are chosen and written in words."""

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict, TypeVar, cast

Row = TypeVar("Row", bound=Mapping[str, object])


class Spread(TypedDict):
    """Median and quartiles of one figure over the rounds."""

    median: float
    low: float
    high: float


class CheckRow(TypedDict):
    """One passed check: its relative error, and the error that was allowed."""

    what: str
    error: float
    allowed: float


class NetworkRow(TypedDict):
    """The time of one network in one phase (training or inference) at one batch size."""

    batch_size: int
    phase: str
    variant: str
    ms: Spread
    seconds: list[float]
    """The time of each round."""
    images_per_second: float
    memory_mb: NotRequired[float]
    moved_mb_per_image: float | None
    """MB read and written, by count; None for compiled networks."""


class LayerRow(TypedDict):
    """The time of one block tail or gate alone, at one shape (N, C, H, W)."""

    batch_size: int
    shape: list[int]
    variant: str
    ms: Spread
    seconds: list[float]
    """The time of each round."""
    moved_mb: float
    share_of_copy: float
    """Bandwidth as a share of that of a large copy."""


class RatioRow(Spread):
    """The time of ``first`` divided by that of ``second``, round by round."""

    batch_size: int
    phase: str
    shape: NotRequired[list[int]]
    first: str
    second: str


class CopyRow(TypedDict):
    """Memory bandwidth, measured by a large copy in the same rounds as the block tails."""

    batch_size: int
    gb_per_second: Spread


class Result(TypedDict):
    """Everything that one run of the benchmark found."""

    format: int
    environment: dict[str, object]
    checks: list[CheckRow]
    compile_seconds: dict[str, float]
    networks: list[NetworkRow]
    layers: list[LayerRow]
    ratios: list[RatioRow]
    copy: list[CopyRow]
    seconds: float


def select_rows(rows: Sequence[Row], **values: object) -> list[Row]:
    """Return the rows that have these ``values``."""
    return [row for row in rows if all(row.get(key) == value for key, value in values.items())]


def list_batch_sizes(result: Result) -> list[int]:
    """Return the batch sizes in the order in which they were timed."""
    return list(dict.fromkeys(row["batch_size"] for row in result["networks"]))


def format_headline(result: Result) -> str:
    """Return the network, the settings and the machine in one line."""
    found = result["environment"]
    return (
        f"{found['model']}, {found['image_size']} pixels, {found['dtype']}; {found['device']}, "
        f"{found['threads']} thread{'s' * (cast(int, found['threads']) > 1)}, torch {found['torch']}"
    )


def format_three_digits(x: float) -> str:
    """Return ``x`` with three digits, or more if it is 1000 or larger.

    >>> format_three_digits(1234.5), format_three_digits(12.345), format_three_digits(0.5)
    ('1234', '12.3', '0.50')
    """
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"
