"""The report of `ecanet.slim`: what was folded and what was kept, with the figures that decided it."""

from dataclasses import dataclass, field

from ecanet.deploy.slim_judge import Share

__all__ = ["GateReport", "SlimReport"]


@dataclass(kw_only=True)
class GateReport:
    """One gate: whether it was folded, and why."""

    name: str
    attention: str
    """Class of the gate."""
    into: str = ""
    """The layer that took the constant; empty if the gate was kept."""
    reason: str = ""
    """Why the gate was folded or kept."""
    spread: float | None = None
    """Standard deviation of a channel's factor over the images, averaged over the channels."""
    divergence: float | None = None
    """Kullback-Leibler divergence of the class probabilities when this gate alone is constant."""
    together: Share | None = None
    """Decisions that change when this gate is constant and all with a smaller divergence too; None if not tried."""

    @property
    def folded(self) -> bool:
        """True if the gate is gone."""
        return bool(self.into)

    def to_dict(self) -> dict[str, object]:
        """Return the gate as plain values."""
        return {
            "name": self.name,
            "attention": self.attention,
            "folded": self.folded,
            "into": self.into or None,
            "reason": self.reason,
            "spread": self.spread,
            "divergence": self.divergence,
            "changed": None if self.together is None else self.together.share,
            "changed limit": None if self.together is None else self.together.limit,
        }


@dataclass(kw_only=True)
class SlimReport:
    """All gates in the order in which they were tried, and the copy beside the network that it was made from."""

    budget: float
    fitted: int
    """Images for the least squares and the order of the gates."""
    gates: list[GateReport] = field(default_factory=list[GateReport])
    changed: Share | None = None
    """Decisions of the copy that differ, on images that were not used for the least squares; None without a gate to
    judge."""
    also: dict[str, Share] = field(default_factory=dict[str, Share])
    """The same on each set of images of the caller's that was held to the budget."""
    shifted: dict[str, float] = field(default_factory=dict[str, float])
    """The share of changed decisions on mildly shifted images, by name; not held to the budget."""
    error: float = 0.0
    """Largest difference, by moving the constants into layers, of an output to that with constants in the gates'
    places; relative to the largest output."""

    @property
    def folded(self) -> list[GateReport]:
        """The gates that are gone."""
        return [gate for gate in self.gates if gate.folded]

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain values, for JSON."""

        def show(share: Share | None) -> dict[str, object] | None:
            if share is None:
                return None
            return {"images": share.images, "changed": share.share, "changed limit": share.limit}

        return {
            "budget": self.budget,
            "folded": len(self.folded),
            "fitted": self.fitted,
            "judged": show(self.changed),
            "also": {name: show(share) for name, share in self.also.items()},
            "shifted": self.shifted,
            "error": self.error,
            "gates": [gate.to_dict() for gate in self.gates],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table: name, attention, spread, divergence, changed (limit), and what became of the gate."""
        found: list[tuple[str, ...]] = []
        for gate in self.gates:
            together = "-" if gate.together is None else f"{gate.together.share:.2%} ({gate.together.limit:.2%})"
            spread = "-" if gate.spread is None else f"{gate.spread:.3f}"
            divergence = "-" if gate.divergence is None else f"{gate.divergence:.2g}"
            end = f"into {gate.into}" if gate.folded else f"kept: {gate.reason}"
            found.append((gate.name, gate.attention, spread, divergence, together, end))
        return found

    def lines(self) -> list[str]:
        """Return what is said below the table."""
        lines = [f"folded {len(self.folded)} of {len(self.gates)} gates; error of folding {self.error:.1g}"]
        if self.changed is not None:
            lines.append(
                f"{self.changed.share:.2%} of decisions changed, at most {self.changed.limit:.2%} (95 %) of a budget "
                f"of {self.budget:.2%}, on {self.changed.images:,} images; fitted on {self.fitted:,} others"
            )
        lines += [
            f"{name}: {share.share:.2%} changed, at most {share.limit:.2%}, on {share.images:,} images"
            for name, share in self.also.items()
        ]
        if self.shifted:
            shares = ", ".join(f"{name} {share:.2%}" for name, share in self.shifted.items())
            lines.append(f"changed on shifted images, which the budget does not hold: {shares}")
        return lines

    def __str__(self) -> str:
        header = ("gate", "attention", "spread", "divergence", "changed (limit)", "")
        table = [header, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*text, *self.lines()])
