"""What an export did, and what its check found."""

from dataclasses import asdict, dataclass, field

__all__ = ["Comparison", "ExportReport", "Timing"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Outputs of the file beside PyTorch's, on one batch of random images."""

    shape: tuple[int, ...]
    """Of the input."""
    error: float
    """Largest relative error of an output, against PyTorch in float64; for a detector the share of missing boxes."""
    allowed: float
    """Four times the error of PyTorch in float32, and a few roundings."""

    @property
    def passed(self) -> bool:
        """Return whether the error is within its bound; NaN is not."""
        return self.error <= self.allowed


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds for one batch of the example's size; the files take turns, so that a ratio is of one round."""

    rounds: int
    network: float
    """Smallest time of the file."""
    plain: float
    """Smallest time of the plain network in the same runtime: without gates, otherwise equal."""
    ratio: float
    """Median of the rounds' ratios: file over plain."""
    low: float
    high: float
    """Quartiles of the ratios."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """The file, and what was compared."""

    path: str
    target: str
    bytes: int
    gates: dict[str, int]
    """How many gates have which form; "as it is" counts attention without another form."""
    facts: dict[str, object]
    """What is worth knowing of the file, such as its opset and which sizes vary."""
    comparisons: tuple[Comparison, ...] = ()
    operations: dict[str, int] = field(default_factory=dict[str, int])
    partitions: int | None = None
    stray: int | None = None
    """Operations outside of the runtime's fast backend."""
    added: float | None = None
    """Operations that a gate adds, on average over the gates."""
    timing: Timing | None = None
    notes: tuple[str, ...] = ()
    """What could not be checked, and why; errors in other precisions."""

    @property
    def checked(self) -> bool:
        """Return whether the file ran in its own runtime."""
        return bool(self.comparisons)

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain values for JSON."""
        return asdict(self)

    def list_rows(self) -> list[tuple[str, str]]:
        """Return names and values for a table."""
        forms = ", ".join(f"{count} {form}" for form, count in self.gates.items()) or "none"
        rows = [("file", self.path), ("target", self.target), ("size", f"{self.bytes / 1e6:.1f} MB"), ("gates", forms)]
        rows += [(name, str(value)) for name, value in self.facts.items()]
        for c in self.comparisons:
            rows.append((f"error at {'x'.join(map(str, c.shape))}", f"{c.error:.1e}, allowed {c.allowed:.1e}"))
        if self.partitions is not None:
            rows.append(("partitions", f"{self.partitions}, {self.stray} operations outside of them"))
        if self.operations:
            rows.append(("operations", str(sum(self.operations.values()))))
        if self.added is not None:
            rows.append(("operations per gate", f"{self.added:.1f}"))
        if (t := self.timing) is not None:
            spread = f"{t.ratio:.2f} of plain ({t.low:.2f} to {t.high:.2f}, {t.rounds} rounds)"
            rows.append(("time", f"{t.network:.2f} ms, plain {t.plain:.2f} ms: {spread}"))
        return rows + [("note", note) for note in self.notes]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.list_rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.list_rows())
