"""The list of attached gates, which prints as a table."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from ecanet.attention import ChannelAttention
from ecanet.surgery.probing import copy_module
from ecanet.surgery.records import Record, find_factor, is_folded, read_record


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
    calls: int | None = None
    """How often the gate ran in one forward of the example, which is as often as its place; None without a proof."""
    note: str = ""


class Report(list[AttachedSite]):
    """The attached gates; prints as a table."""

    def __init__(self, sites: Iterable[AttachedSite] = (), left_out: Iterable[tuple[str, str]] = ()):
        super().__init__(sites)
        self.left_out = list(left_out)
        """The modules that end a branch and got no gate, each with the reason."""

    def __str__(self) -> str:
        head = ("name", "after", "channels", "attention", "k", "parameters", "calls", "note")
        rows = [
            (
                site.name,
                site.after,
                str(site.channels),
                site.attention,
                str(site.kernel_size or "-"),
                str(site.parameters),
                "-" if site.calls is None else str(site.calls),
                site.note,
            )
            for site in self
        ]
        total = ("total", "", "", f"{len(self)} sites", "", str(sum(s.parameters for s in self)), "", "")
        widths = [max(map(len, column)) for column in zip(head, *rows, total, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (head, *rows, total)]
        lines += [f"left out: {name} ({reason})" for name, reason in self.left_out]
        return "\n".join(line.rstrip() for line in lines)


LEFT_OUT = "_sites_left_out"
"""Attribute of the model to which gates were attached: the modules that got none."""


def remember_left_out(model: nn.Module, left_out: list[tuple[str, str]]) -> None:
    """Keep in ``model`` which modules got no gate, each with the reason, for its report."""
    vars(model).pop(LEFT_OUT, None)
    if left_out:
        vars(model)[LEFT_OUT] = left_out


def get_left_out(model: nn.Module) -> list[tuple[str, str]]:
    """Return the modules of ``model`` that got no gate, each with the reason."""
    return cast("list[tuple[str, str]]", vars(model).get(LEFT_OUT, []))


def describe(model: nn.Module, name: str, gate: nn.Module, record: Record) -> AttachedSite:
    """Return the row of one gate of ``model``."""
    keeper = name.rpartition(".")[0]
    notes = [
        "" if record.replaced is None else f"in place of {type(record.replaced).__name__}",
        "" if record.lossless else "outputs changed when attached",
        "folded" if is_folded(gate, record) else "",
        "in a frozen block; trains" if trains_alone(model.get_submodule(keeper), gate) else "",
    ]
    return AttachedSite(
        name=name,
        channels=getattr(gate, "channels", record.channels),
        attention=record.attention,
        kernel_size=getattr(gate, "kernel_size", None),
        parameters=sum(p.numel() for p in gate.parameters()),
        after=name if record.mode == "replace" else f"{keeper}.{record.target}".strip("."),
        calls=record.runs,
        note="; ".join(filter(None, notes)),
    )


def trains_alone(block: nn.Module, gate: nn.Module) -> bool:
    """Return whether ``gate`` is trained in a ``block`` whose own parameters are all frozen (and that has some)."""
    gates = [module for module in block.modules() if read_record(module) is not None]
    inside = {id(p) for module in gates for p in module.parameters()}
    own = [p for p in block.parameters() if id(p) not in inside]
    frozen = bool(own) and not any(p.requires_grad for p in own)
    return frozen and any(p.requires_grad for p in gate.parameters())


@torch.no_grad()
def measure_change(gate: nn.Module, record: Record) -> float:
    """Return how far ``gate`` is from the identity: the largest |gate - 1| over standard normal channel means.

    For an attention that is no `ChannelAttention`, it is the largest change of a standard normal input; for an ECA
    that was converted, the largest difference to the module that comes back, rounding left aside. It is 0 on the meta
    device, where there are no values.
    """
    like = next((p for p in gate.parameters()), torch.empty(0))
    if like.is_meta:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    if record.replaced is not None and record.lossless:
        x = torch.randn((2, record.channels, *record.shape), generator=generator, device="cpu").to(
            like.device, like.dtype
        )
        ours, theirs = (copy_module(module)(x.clone()) for module in (gate, record.replaced.to(x.device, x.dtype)))
        change = float((ours - theirs).abs().max())
        return change if change > 64 * torch.finfo(x.dtype).eps * float(x.abs().max()) else 0.0
    factor = find_factor(gate) if is_folded(gate, record) else 1
    if isinstance(gate, ChannelAttention):
        means = torch.randn((64, record.channels), generator=generator, device="cpu").to(like.device)
        return float((factor * gate.weigh(factor * means) - 1).abs().max())
    x = torch.randn((2, record.channels, *record.shape), generator=generator, device="cpu").to(like.device, like.dtype)
    return float((gate(factor * x) - x).abs().max())
