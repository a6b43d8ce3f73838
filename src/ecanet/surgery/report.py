"""The list of attached gates, which prints as a table."""

from dataclasses import dataclass

import torch
from torch import nn

from ecanet.attention import ChannelAttention
from ecanet.surgery.records import Record, is_folded


@dataclass(frozen=True, kw_only=True, slots=True)
class AttachedSite:
    """One attached gate."""

    name: str
    """The gate's module name, and the prefix of its keys: ``layer1.0.eca``."""
    channels: int
    attention: str
    """Name of the attention, or of the user's class."""
    kernel_size: int | None
    """None for an attention without a kernel."""
    parameters: int
    after: str
    """Name of the module on whose output the gate acts, or whose place it took."""
    note: str = ""


class Report(list[AttachedSite]):
    """The attached gates; prints as a table."""

    def __str__(self) -> str:
        head = ("name", "after", "channels", "attention", "k", "parameters", "note")
        rows = [
            (s.name, s.after, str(s.channels), s.attention, str(s.kernel_size or "-"), str(s.parameters), s.note)
            for s in self
        ]
        total = ("total", "", "", f"{len(self)} sites", "", str(sum(s.parameters for s in self)), "")
        widths = [max(map(len, column)) for column in zip(head, *rows, total, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (head, *rows, total)]
        return "\n".join(line.rstrip() for line in lines)


def describe(name: str, gate: nn.Module, record: Record) -> AttachedSite:
    """Return the row of one gate."""
    keeper = name.rpartition(".")[0]
    note = "" if record.lossless else "outputs changed when attached"
    if record.replaced is not None:
        note = f"in place of {type(record.replaced).__name__}" + (f"; {note}" if note else "")
    return AttachedSite(
        name=name,
        channels=record.channels,
        attention=record.attention,
        kernel_size=getattr(gate, "kernel_size", None),
        parameters=sum(p.numel() for p in gate.parameters()),
        after=name if record.mode == "replace" else f"{keeper}.{record.target}".strip("."),
        note="; ".join(filter(None, (note, "folded" if is_folded(gate, record) else ""))),
    )


@torch.no_grad()
def measure_change(gate: nn.Module, record: Record) -> float:
    """Return how far ``gate`` is from the identity: the largest |gate - 1| over standard normal channel means.

    For an attention that is no `ChannelAttention`, it is the largest change of a standard normal input.
    """
    like = next((p for p in gate.parameters()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    if isinstance(gate, ChannelAttention):
        means = torch.randn((64, record.channels), generator=generator).to(like.device)
        factor = 2 if is_folded(gate, record) else 1
        return float((factor * gate.weigh(factor * means) - 1).abs().max())
    x = torch.randn((2, record.channels, *record.shape), generator=generator).to(like.device, like.dtype)
    return float((gate(x) - x).abs().max())
