"""The rows of the benchmark's result, as they are written to JSON."""

from typing import NotRequired, TypedDict


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
