"""Find the places for gates in any network: the end of every residual branch, or what ``where=`` selects.

The gate goes after the outermost module that returns the branch. Dropout, stochastic depth and constant factors (layer
scale, skip gain) that follow the branch stay behind the gate.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ecanet.errors import AttachError
from ecanet.surgery.branches import find_branch, is_layer_scale, step_back
from ecanet.surgery.modules import list_modules
from ecanet.surgery.recording import CONVOLUTIONS, NORMS, Addition, Call, Trace, Value

Where = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A glob over module names, a class, or a function of (name, module)."""

INVERTED_RESIDUAL = re.compile(r"InvertedResidual|MBConv|EdgeResidual|DepthwiseSeparableConv")
"""Class names of blocks that all get attention, also those without an addition (the first of each stage)."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place for a gate: on the output of ``target``, kept by ``block``."""

    block: str
    target: str
    channels: int
    axis: int
    """Axis of the channels in the output of ``target``."""
    index: int
    """Position of that output in the run, by which sites are sorted."""
    shape: tuple[int, ...]
    """Spatial shape of that output: without batch and channels."""
    device: torch.device
    append: bool = False
    """Whether the gate becomes the last entry of ``target``, a Sequential, as in the authors' MobileNetV2."""
    affine: str | None = None
    """Name of the norm or convolution that is the last step of ``target``, where `fold` may double it."""


class Finder:
    """The finder of sites in one model, from the trace of one run."""

    def __init__(self, model: nn.Module, trace: Trace):
        self.trace = trace
        self.model = model
        self.names = {module: name for name, module in list_modules(model)}
        self.makers = trace.find_makers()
        self.left_out: list[tuple[str, str]] = []
        """Modules that end a branch and can hold no gate, each with the reason."""

    def find(self, where: Where | None) -> list[Site]:
        """Return the sites that ``where`` selects (None: all), in the order in which the network runs.

        Raises:
            AttachError: there are none.
        """
        sites = self.find_residual() if where is None else self.find_selected(where)
        if where is None:
            self.refuse_shared(sites, sites)
        sites = sites or (self.find_stage_ends() if where is None else [])
        if not sites:
            raise AttachError(
                f"found no residual branch and no stage in {type(self.model).__name__}; select modules: "
                f"where='a.glob.*' over module names, a module class, or a function of (name, module)"
            )
        return sorted(drop_repeated_targets(sites), key=lambda s: s.index)

    def find_residual(self) -> list[Site]:
        """Return the end of every residual branch, and of inverted residual blocks without an addition."""
        sites = [site for addition in self.trace.additions if (site := self.locate_addition(addition))]
        blocks = {site.block for site in sites}
        kinds = {type(self.model.get_submodule(name)).__name__ for name in blocks}
        if any(INVERTED_RESIDUAL.search(kind) for kind in kinds):
            sites += self.find_inverted_residual(blocks)
        return sites

    def refuse_shared(self, sites: list[Site], found: list[Site]) -> None:
        """Check that no target of ``sites`` (a shared activation, say) also runs where no branch ends.

        ``found`` are the ends of all residual branches.

        Raises:
            AttachError: a target does.
        """
        ends = Counter(site.target for site in found)
        runs = Counter(self.names.get(call.module) for call in self.trace.calls)
        for target in {site.target: None for site in sites}:
            if runs[target] > (count := ends[target]):
                raise AttachError(
                    f"{target!r} ends {count} residual branch(es) but runs {runs[target]} times, so a gate on it would "
                    f"act elsewhere too; give the branch a module of its own there, or choose other modules with where="
                )

    def find_inverted_residual(self, done: set[str]) -> list[Site]:
        """Return the last step of the inverted residual blocks that are not in ``done``."""
        sites: list[Site] = []
        for call in self.trace.calls:
            name = self.names.get(call.module)
            if name is None or name in done or call.output is None:
                continue
            if INVERTED_RESIDUAL.search(type(call.module).__name__) and not any(d.startswith(name + ".") for d in done):
                site = self.locate_value(call.output, call, strictly=True)
                sites += [site] if site else []
        return sites

    def locate_addition(self, addition: Addition) -> Site | None:
        """Return the site at ``addition`` if it ends a residual block, else None.

        Only values made inside the module that adds are considered. If an operand came from outside (DLA's blocks,
        modules that only add), the values of its caller are considered too.
        """
        frame: Call | None = addition.call
        for _ in range(2):
            if frame is None:
                return None
            branch = find_branch(addition.a, addition.b, frame.start)
            if branch is not None:
                return self.locate_value(branch, frame)
            if addition.a.index >= frame.start and addition.b.index >= frame.start:
                return None
            frame = frame.parent
        return None

    def locate_value(self, value: Value, frame: Call, strictly: bool = False) -> Site | None:
        """Return the site whose target made ``value`` within ``frame``, or None if no module did.

        Operations that may follow a gate, such as layer scale, are skipped. ``strictly`` excludes ``frame`` itself.
        """
        while True:
            calls = [c for c in self.makers.get(value, []) if c.is_inside(frame) and not (strictly and c is frame)]
            calls = [c for c in calls if c.module in self.names]
            if calls and not is_layer_scale(value, calls[0]):
                return self.make_site(min(calls, key=lambda c: c.depth), value)
            before = step_back(value)
            if before is None or before.index < frame.start:
                return None
            value = before

    def make_site(self, call: Call, value: Value) -> Site | None:
        """Return the site on the output of ``call``; None if no module there can keep a gate.

        The gate is kept by the module that calls the target, if it is the target's parent in the tree of modules.
        Containers are no such parents, since they would run the gate as one more entry, and the root is none, since
        others take its children out of it (``list(model.children())[:-1]``). Then the target keeps the gate itself.
        """
        target = self.names[call.module]
        parent = target.rpartition(".")[0]
        calls_target = call.parent is not None and self.names.get(call.parent.module) == parent
        append = isinstance(call.module, nn.Sequential) and is_mobilenet_v2(self.model.get_submodule(parent))
        if append or (parent and calls_target and not is_container(self.model.get_submodule(parent))):
            return self.describe_site(parent, call, value, append)
        own = [c for c in self.makers.get(value, [call]) if c.is_inside(call) and not is_container(c.module)]
        own = [c for c in own if c.module in self.names]
        if not own:
            return None
        call = min(own, key=lambda c: c.depth)
        return self.describe_site(self.names[call.module], call, value)

    def describe_site(self, block: str, call: Call, value: Value, append: bool = False) -> Site:
        """Return the site on the output of ``call``, with its gate kept by ``block``."""
        return Site(
            block=block,
            target=self.names[call.module],
            channels=value.shape[value.axis],
            axis=value.axis,
            index=value.index,
            shape=tuple(n for i, n in enumerate(value.shape) if i not in (0, value.axis)),
            device=value.device,
            append=append,
            affine=self.find_affine(call, value),
        )

    def find_affine(self, call: Call, value: Value) -> str | None:
        """Return the name of the norm or convolution that made ``value``.

        Return None if there is none, if it runs several times, or if another operation in ``call`` reads ``value``.
        """
        leaf = max(self.makers.get(value, [call]), key=lambda c: c.depth).module
        frozen = type(leaf).__name__.startswith("FrozenBatchNorm")
        read = any(value in later.parents for later in self.trace.values[value.index + 1 : call.end])
        runs = sum(c.module is leaf for c in self.trace.calls)
        if (value.op in NORMS or value.op in CONVOLUTIONS or frozen) and not read and runs == 1:
            return self.names.get(leaf)
        return None

    def find_selected(self, where: Where) -> list[Site]:
        """Return the residual branches inside each selected module, or its own output if it has none.

        Raises:
            AttachError: nothing is selected, or a selected module returns no tensor.
        """
        chosen = keep_outermost(
            [name for name, module in list_modules(self.model) if name and is_selected(where, name, module)]
        )
        if not chosen:
            raise AttachError(f"where={where!r} selects no module of {type(self.model).__name__}")
        found = self.find_residual()
        sites: list[Site] = []
        for name in chosen:
            inside = [site for site in found if f"{site.block}.".startswith(name + ".")]
            self.refuse_shared(inside, found)
            sites += inside or [self.locate_output(name)]
        return sites

    def locate_output(self, name: str) -> Site:
        """Return the site on the output of the module called ``name``.

        Raises:
            AttachError: the module did not run, returns no tensor, or runs with different channel counts.
        """
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
        site = self.make_site(call, call.output)
        if site is None:
            raise AttachError(
                f"{name!r} is a container, and no module in it returns its output, so no gate can be kept"
            )
        return site

    def find_stage_ends(self) -> list[Site]:
        """Return the last output of an outermost module at each resolution that has a convolution.

        This is for networks without residual additions.
        """
        ends: dict[tuple[int, ...], list[tuple[int, int, Site]]] = {}
        convolved: set[tuple[int, ...]] = set()
        for value in self.trace.values:
            size = tuple(value.shape[2:])
            if len(value.shape) < 3 or value.axis != 1 or max(size) == 1:
                continue
            if value.op in CONVOLUTIONS:
                convolved.add(size)
            calls = [c for c in self.makers.get(value, []) if c.module in self.names and c.depth > 0]
            outermost = min(calls, key=lambda c: c.depth, default=None)
            if size in convolved and outermost is not None and (site := self.make_site(outermost, value)):
                ends.setdefault(size, []).append((outermost.depth, -value.index, site))
        return [min(found)[2] for found in ends.values()]


def drop_repeated_targets(sites: list[Site]) -> list[Site]:
    """Return the first site of each target; shared modules run several times."""
    first: dict[str, Site] = {}
    for site in sites:
        first.setdefault(site.target, site)
    return list(first.values())


def is_container(module: nn.Module) -> bool:
    """Return whether ``module`` may run its children in a row, a gate among them."""
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def is_mobilenet_v2(block: nn.Module) -> bool:
    """Return whether ``block`` is torchvision's or this library's MobileNetV2 block: ``conv`` is its whole branch."""
    module = type(block).__module__
    ours = module in (
        "torchvision.models.mobilenetv2",
        "torchvision.models.quantization.mobilenetv2",
        "ecanet.models.mobilenet",
    )
    return ours and type(block).__name__.endswith("InvertedResidual")


def is_selected(where: Where, name: str, module: nn.Module) -> bool:
    """Return whether ``where`` selects the module called ``name``."""
    if isinstance(where, str):
        return re.fullmatch(translate_glob(where), name) is not None
    return isinstance(module, where) if isinstance(where, type) else bool(where(name, module))


def translate_glob(glob: str) -> str:
    """Return the regular expression of a glob over dotted names: ``*`` is one part of a name, ``**`` any number.

    >>> pattern = translate_glob("layer4.*")
    >>> bool(re.fullmatch(pattern, "layer4.0")), bool(re.fullmatch(pattern, "layer4.0.bn3"))
    (True, False)
    """
    pieces = {"**": ".*", "*": r"[^.]*", "?": "[^.]"}
    return "".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\?)", glob))


def keep_outermost(names: list[str]) -> list[str]:
    """Return ``names`` without those that lie inside another of them."""
    chosen = set(names)
    return [n for n in names if not any(n[:i] in chosen for i, letter in enumerate(n) if letter == ".")]
