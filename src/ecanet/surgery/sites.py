"""Where attention belongs in a stranger's network: the end of every residual branch, or what ``where=`` selects.

The gate goes after the
outermost module that returns the branch, seen through dropout, stochastic depth and constant factors (layer scale,
skip gain).
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ecanet.errors import AttachError
from ecanet.surgery.branches import branch_of, only_scales, step_back
from ecanet.surgery.watch import CONVOLUTIONS, NORMS, Addition, Call, Trace, Value

Where = str | type[nn.Module] | Callable[[str, nn.Module], bool]

INVERTED_RESIDUAL = re.compile(r"InvertedResidual|MBConv|EdgeResidual|DepthwiseSeparableConv")
"""Blocks whose papers put attention in every one, also in those without an addition (the first of each stage)."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place for a gate: on the output of ``target``, kept by ``block``."""

    block: str
    target: str
    channels: int
    axis: int
    index: int
    shape: tuple[int, ...]
    device: torch.device
    append: bool = False
    """The gate becomes the last entry of ``target``, a Sequential, as in the authors' MobileNetV2."""
    affine: str | None = None
    """The norm or convolution that is the target's last step, where `fold` may double it."""


class Finder:
    """Finds sites of one model in the trace of one run."""

    def __init__(self, model: nn.Module, trace: Trace):
        self.trace = trace
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.makers = trace.returned()

    def find(self, where: Where | None) -> list[Site]:
        """The sites that ``where`` selects, all of them for None, in the order in which the network runs.

        Raises:
            AttachError: there are none.
        """
        sites = self.residual() if where is None else self.selected(where)
        if where is None:
            self.refuse_shared(sites, sites)
        sites = sites or (self.stage_ends() if where is None else [])
        if not sites:
            raise AttachError(
                f"found no residual branch and no stage in {type(self.model).__name__}; say where: "
                f"where='a.glob.*' over module names, a module class, or a function of (name, module)"
            )
        return sorted(one_each(sites), key=lambda s: s.index)

    def residual(self) -> list[Site]:
        """The end of every residual branch, and of inverted residual blocks without an addition."""
        sites = [site for addition in self.trace.additions if (site := self.at_addition(addition))]
        blocks = {site.block for site in sites}
        kinds = {type(self.model.get_submodule(name)).__name__ for name in blocks}
        if any(INVERTED_RESIDUAL.search(kind) for kind in kinds):
            sites += self.inverted_residual(blocks)
        return sites

    def refuse_shared(self, sites: list[Site], found: list[Site]) -> None:
        """Raise AttachError if a target of ``sites`` (a shared activation, say) also runs where no branch ends.

        ``found`` are the ends of all residual branches.
        """
        ends = Counter(site.target for site in found)
        runs = Counter(self.names.get(call.module) for call in self.trace.calls)
        for target in {site.target: None for site in sites}:
            if runs[target] > (count := ends[target]):
                raise AttachError(
                    f"{target!r} ends {count} residual branch(es) but runs {runs[target]} times, so a gate on it would "
                    f"act elsewhere too; give the branch a module of its own there, or choose other modules with where="
                )

    def inverted_residual(self, done: set[str]) -> list[Site]:
        """The last step of inverted residual blocks that have no site yet."""
        sites = []
        for call in self.trace.calls:
            name = self.names.get(call.module)
            if name is None or name in done or call.output is None:
                continue
            if INVERTED_RESIDUAL.search(type(call.module).__name__) and not any(d.startswith(name + ".") for d in done):
                site = self.at_value(call.output, call, strictly=True)
                sites += [site] if site else []
        return sites

    def at_addition(self, addition: Addition) -> Site | None:
        """The site at ``addition``, if it ends a residual block.

        It is judged inside the module that adds; where both operands were handed in, or the shortcut was (DLA's
        blocks, adding modules), inside its caller.
        """
        frame: Call | None = addition.call
        for _ in range(2):
            if frame is None:
                return None
            branch = branch_of(addition.a, addition.b, frame.start)
            if branch is not None:
                return self.at_value(branch, frame)
            if addition.a.index >= frame.start and addition.b.index >= frame.start:
                return None
            frame = frame.parent
        return None

    def at_value(self, value: Value, frame: Call, strictly: bool = False) -> Site | None:
        """The site whose target made ``value`` within ``frame``, seen through what may come after a gate."""
        while True:
            calls = [c for c in self.makers.get(value, []) if c.inside(frame) and not (strictly and c is frame)]
            calls = [c for c in calls if c.module in self.names]
            if calls and not only_scales(value, calls[0]):
                return self.site(min(calls, key=lambda c: c.depth), value, frame)
            before = step_back(value)
            if before is None or before.index < frame.start:
                return None
            value = before

    def site(self, call: Call, value: Value, frame: Call) -> Site:
        """The site on the output of ``call``."""
        target = self.names[call.module]
        block: Call | None = frame
        while block is not None and not (self.names.get(block.module) is not None and call.inside(block)):
            block = block.parent
        keeper = self.names[block.module] if block is not None else target
        if (
            block is not None
            and block.module is not call.module
            and not target.startswith(keeper + "." if keeper else "")
        ):
            keeper = target.rpartition(".")[0]
        append = isinstance(call.module, nn.Sequential) and is_mobilenet_v2(self.model.get_submodule(keeper))
        return Site(
            block=self.keeper(keeper),
            target=target,
            channels=value.shape[value.axis],
            axis=value.axis,
            index=value.index,
            shape=tuple(n for i, n in enumerate(value.shape) if i not in (0, value.axis)),
            device=value.device,
            append=append,
            affine=self.affine(call, value),
        )

    def keeper(self, name: str) -> str:
        """``name``, or its nearest ancestor to which a child can be added without its being run in a row."""
        while name and isinstance(self.model.get_submodule(name), nn.Sequential | nn.ModuleList | nn.ModuleDict):
            name = name.rpartition(".")[0]
        return name

    def affine(self, call: Call, value: Value) -> str | None:
        """Name of the norm or convolution behind ``value``, if it runs once and nothing else in ``call`` reads it."""
        leaf = max(self.makers.get(value, [call]), key=lambda c: c.depth).module
        frozen = type(leaf).__name__.startswith("FrozenBatchNorm")
        read = any(value in later.parents for later in self.trace.values[value.index + 1 : call.end])
        runs = sum(c.module is leaf for c in self.trace.calls)
        if (value.op in NORMS or value.op in CONVOLUTIONS or frozen) and not read and runs == 1:
            return self.names.get(leaf)
        return None

    def selected(self, where: Where) -> list[Site]:
        """A selected module stands for the residual branches in it; any other for its own output.

        Raises:
            AttachError: nothing is selected, or a selected module returns no tensor.
        """
        chosen = outermost(
            [name for name, module in self.model.named_modules() if name and matches(where, name, module)]
        )
        if not chosen:
            raise AttachError(f"where={where!r} selects no module of {type(self.model).__name__}")
        found = self.residual()
        sites: list[Site] = []
        for name in chosen:
            inside = [site for site in found if f"{site.block}.".startswith(name + ".")]
            self.refuse_shared(inside, found)
            sites += inside or [self.at_module(name)]
        return sites

    def at_module(self, name: str) -> Site:
        """The site on the output of the module called ``name``."""
        module = self.model.get_submodule(name)
        calls = [call for call in self.trace.calls if call.module is module]
        if not calls:
            raise AttachError(
                f"{name!r} was not run with the example; leave it out of where=, or pass another example="
            )
        values = [call.output for call in calls]
        if any(value is None or len(value.shape) < 2 for value in values):
            raise AttachError(f"{name!r} does not return one tensor (N, C, ...), so no gate can follow it")
        widths = {value.shape[value.axis] for value in values if value is not None}
        if len(widths) > 1:
            raise AttachError(f"{name!r} runs several times with different channel counts: {sorted(widths)}")
        call = calls[0]
        assert call.output is not None
        return self.site(call, call.output, call.parent or call)

    def stage_ends(self) -> list[Site]:
        """Without residual additions: at each resolution with a convolution, the last output of an outermost module."""
        last: dict[tuple[int, ...], tuple[int, Value]] = {}
        convolved: set[tuple[int, ...]] = set()
        for value in self.trace.values:
            size = tuple(value.shape[2:])
            if len(value.shape) < 3 or value.axis != 1 or max(size) == 1:
                continue
            if value.op in CONVOLUTIONS:
                convolved.add(size)
            depth = min((c.depth for c in self.makers.get(value, []) if c.module in self.names), default=0)
            if depth > 0 and size in convolved and depth <= last.get(size, (depth, value))[0]:
                last[size] = depth, value
        root = self.trace.calls[0]
        sites = [self.at_value(value, root, strictly=True) for _, value in last.values()]
        return [site for site in sites if site is not None]


def one_each(sites: list[Site]) -> list[Site]:
    """``sites`` without those whose target already has one (shared modules run several times)."""
    first: dict[str, Site] = {}
    for site in sites:
        first.setdefault(site.target, site)
    return list(first.values())


def is_mobilenet_v2(block: nn.Module) -> bool:
    """Whether ``block`` is torchvision's or this library's MobileNetV2 block, whose ``conv`` is its whole branch."""
    module = type(block).__module__
    ours = module in (
        "torchvision.models.mobilenetv2",
        "torchvision.models.quantization.mobilenetv2",
        "ecanet.models.mobilenet",
    )
    return ours and type(block).__name__.endswith("InvertedResidual")


def matches(where: Where, name: str, module: nn.Module) -> bool:
    """Whether ``where``, a glob (``*`` is one part of a name, ``**`` any number), class or predicate, selects."""
    if isinstance(where, str):
        return re.fullmatch(glob_pattern(where), name) is not None
    return isinstance(module, where) if isinstance(where, type) else bool(where(name, module))


def glob_pattern(glob: str) -> str:
    """The regular expression of a glob over dotted names.

    >>> pattern = glob_pattern("layer4.*")
    >>> bool(re.fullmatch(pattern, "layer4.0")), bool(re.fullmatch(pattern, "layer4.0.bn3"))
    (True, False)
    """
    pieces = {"**": ".*", "*": r"[^.]*", "?": "[^.]"}
    return "".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\?)", glob))


def outermost(names: list[str]) -> list[str]:
    """``names`` without those that lie inside another of them."""
    chosen = set(names)
    return [n for n in names if not any(n[:i] in chosen for i, letter in enumerate(n) if letter == ".")]
