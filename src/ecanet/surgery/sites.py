"""Find the places for gates in any network: the end of every residual branch, or what ``where=`` selects.

The gate goes after the outermost module that returns the branch. Dropout, stochastic depth and constant factors (layer
scale, skip gain) that follow the branch stay behind the gate.
"""

from collections import Counter

from torch import fx, nn

from ecanet.errors import AttachError
from ecanet.surgery.branches import (
    compare_widths,
    find_branch,
    find_convolution_before,
    find_projection,
    is_constant_product,
    is_layer_scale,
    is_linear,
    step_back,
)
from ecanet.surgery.modules import list_modules
from ecanet.surgery.placing import FUSED, NEVER_TRAINS, Placer, Site, is_container
from ecanet.surgery.recording import CONVOLUTIONS, Addition, Call, Trace, Value
from ecanet.surgery.selection import Where, is_selected, keep_outermost


class Finder(Placer):
    """The finder of sites in one model, from the trace of one run."""

    def __init__(self, model: nn.Module, trace: Trace):
        super().__init__(model, trace)
        self.left_out: list[tuple[str, str]] = []
        """Names of the modules whose outputs `find` left out though branches end there, each with the reason."""

    def find(self, where: Where | None) -> list[Site]:
        """Return the sites that ``where`` selects (None: all), in the order in which the network runs.

        Raises:
            AttachError: there are none.
        """
        sites = self.find_all() if where is None else self.find_selected(where)
        if not sites:
            reasons = describe_left_out(self.left_out) or "found no residual branch and no stage"
            raise AttachError(
                f"{type(self.model).__name__} has no place for a gate: {reasons}; select modules: where='a.glob.*' "
                f"over module names, a module class, or a function of (name, module)"
            )
        return sorted(drop_repeated_targets(sites), key=lambda s: s.index)

    def find_all(self) -> list[Site]:
        """Return the ends of all residual branches; in a network without any, the end of each stage."""
        found = self.find_residual()
        sites = self.leave_out_shared(found, found)
        if sites or any(reason not in (NEVER_TRAINS, FUSED) for _, reason in self.left_out):
            return sites
        return self.find_stage_ends()

    def find_residual(self) -> list[Site]:
        """Return the end of every residual branch, and of inverted residual blocks without an addition."""
        sites: list[Site] = []
        blocks: list[Call] = []
        projections: list[Value] = []
        for addition in self.trace.additions:
            branch, frame = self.find_branch(addition)
            site = None if branch is None else self.locate_value(branch, frame)
            if branch is not None and site is not None:
                sites.append(site)
                blocks.append(frame)
                projection = find_projection(branch, frame.start)
                projections += [] if projection is None else [projection]
        if all(compare_widths(projection) == 0 for projection in projections):
            return sites
        return sites + self.find_inverted_residual(blocks) + self.find_projections_in_graphs(projections)

    def find_inverted_residual(self, done: list[Call]) -> list[Site]:
        """Return the last step of the inverted residual blocks without an addition; ``done`` are blocks with one."""
        blocks: dict[Value, Call] = {}
        for call in self.trace.calls:
            value = call.output
            if value is None or len(value.shape) < 3 or call.module not in self.names:
                continue
            if call.parent is None or is_container(call.module) or any(map(call.is_inside, done)):
                continue
            if find_projection(value, call.start) is not None:
                blocks[value] = call  # the innermost, which comes last
        sites = [self.locate_value(value, call, strictly=True) for value, call in blocks.items()]
        return [site for site in sites if site is not None]

    def find_projections_in_graphs(self, done: list[Value]) -> list[Site]:
        """Return the last step of the inverted residual blocks in graphs, where no modules show the blocks.

        ``done`` are the projections of blocks with an addition.
        """
        ends: dict[tuple[Call, Value], Value] = {}
        for frame in self.trace.calls:
            for graph, _, value in self.trace.steps if isinstance(frame.module, fx.GraphModule) else ():
                if graph is frame.module and frame.start <= value.index < frame.end and len(value.shape) >= 3:
                    projection = find_projection(value, frame.start)
                    if projection is not None and projection not in done and projection.shape == value.shape:
                        ends[frame, projection] = value
        # A block ends without an activation. Squeeze-excite has such convolutions, too, of the means, not the planes.
        curved = [value for value in self.trace.values if not is_linear(value)]
        activated = {parent for value in curved for parent in value.parents if parent.shape == value.shape}
        ends = {key: value for key, value in ends.items() if value not in activated and keeps_resolution(*key)}
        sites = [self.check_site(self.make_node_site(f, value), f, value) for (f, _), value in ends.items()]
        return [site for site in sites if site is not None]

    def find_branch(self, addition: Addition) -> tuple[Value | None, Call]:
        """Return the residual branch that ends at ``addition``, or None, and the call that made it.

        Only values made inside the module that adds are considered. If an operand came from outside (DLA's blocks,
        modules that only add), the values of its caller are considered too.
        """
        frame = addition.call
        for _ in range(2):
            branch = find_branch(addition.a, addition.b, frame.start)
            inside = addition.a.index >= frame.start and addition.b.index >= frame.start
            if branch is not None or inside or frame.parent is None:
                return branch, frame
            frame = frame.parent
        return None, frame

    def locate_value(self, value: Value, frame: Call, strictly: bool = False) -> Site | None:
        """Return the site whose target made ``value`` within ``frame``, or None if no module did or none can be gated.

        Operations that may follow a gate, such as layer scale, are skipped. ``strictly`` excludes ``frame`` itself.
        """
        while True:
            node = None if strictly or is_constant_product(value) else self.make_node_site(frame, value)
            if node is not None:
                return self.check_site(node, frame, value)
            calls = [c for c in self.makers.get(value, []) if c.is_inside(frame) and not (strictly and c is frame)]
            calls = [c for c in calls if c.module in self.names]
            if calls and not is_layer_scale(value, calls[0]):
                call = min(calls, key=lambda c: c.depth)
                return self.check_site(self.make_site(call, value), call, value)
            before = step_back(value)
            if before is None or before.index < frame.start:
                return None
            value = before

    def check_site(self, site: Site | None, call: Call, value: Value) -> Site | None:
        """Return ``site``, on the output of ``call``, or None if no gate can act there."""
        reason = self.find_obstacle(call, value)
        if reason:
            self.leave_out(self.names[call.module] if site is None else site.target, reason)
        return None if reason else site

    def leave_out(self, name: str, reason: str) -> None:
        """Note that the module called ``name`` gets no gate."""
        if (name, reason) not in self.left_out:
            self.left_out.append((name, reason))

    def leave_out_shared(self, sites: list[Site], found: list[Site]) -> list[Site]:
        """Return ``sites`` without modules (a shared activation, say) that also run where no branch ends.

        Modules that run with different channel counts are left out too. ``found`` are the ends of all residual
        branches.
        """
        ends = Counter(site.target for site in found)
        runs = Counter(self.names.get(call.module) for call in self.trace.calls)
        kept: list[Site] = []
        for site in sites:
            widths = sorted({other.channels for other in found if other.target == site.target})
            axes = {other.axis for other in found if other.target == site.target}
            if site.node:  # other nodes that call the same module are no concern of this one
                kept.append(site)
            elif runs[site.target] > ends[site.target]:
                reason = (
                    f"ends {ends[site.target]} residual branch(es) but runs {runs[site.target]} times, so a gate on it "
                    f"would act elsewhere too"
                )
                self.leave_out(site.target, reason)
            elif len(widths) > 1 or len(axes) > 1:
                self.leave_out(site.target, f"runs several times with different channels: {widths} on axes {axes}")
            else:
                kept.append(site)
        return kept

    def find_selected(self, where: Where) -> list[Site]:
        """Return the residual branches inside each selected module, or its own output if it has none.

        Raises:
            AttachError: nothing is selected, or no gate can act in a selected module.
        """
        chosen = keep_outermost(
            [name for name, module in list_modules(self.model) if name and is_selected(where, name, module)]
        )
        if not chosen:
            raise AttachError(f"where={where!r} selects no module of {type(self.model).__name__}")
        found, sites = self.find_residual(), list[Site]()
        everywhere, self.left_out = self.left_out, []
        for name in chosen:
            before = len(self.left_out)
            for target, reason in everywhere:
                if f"{target}.".startswith(name + "."):
                    self.leave_out(target, reason)
            inside = self.leave_out_shared([s for s in found if f"{s.block}.".startswith(name + ".")], found)
            if not inside and len(self.left_out) > before:
                raise AttachError(f"{describe_left_out(self.left_out[before:])}; choose other modules with where=")
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
        widths = {value.channels for value in values if value is not None}
        if len(widths) > 1:
            raise AttachError(f"{name!r} runs several times with different channel counts: {sorted(widths)}")
        call = calls[0]
        assert call.output is not None
        reason = self.find_obstacle(call, call.output)
        if reason:
            raise AttachError(f"{name!r} {reason}; choose other modules with where=")
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
        ends: dict[tuple[int, ...], list[tuple[int, int, Site, str]]] = {}
        convolved: set[tuple[int, ...]] = set()
        read = self.trace.returned.union(*(later.parents for later in self.trace.values))
        for value in self.trace.values:
            size = tuple(value.shape[2:])
            number = value.dtype.is_floating_point or value.dtype.is_complex
            if len(value.shape) < 3 or value.axis != 1 or max(size) == 1 or not number:
                continue
            if value.op in CONVOLUTIONS:
                convolved.add(size)
            calls = [c for c in self.makers.get(value, []) if c.module in self.names and c.depth > 0]
            calls = calls or [c for c in self.trace.calls if self.make_node_site(c, value)]
            outermost = min(calls, key=lambda c: c.depth, default=None)
            unread = value not in read and len(self.trace.returned) > 0  # a pool for another head, say
            if (
                size in convolved
                and not unread
                and outermost is not None
                and (site := self.make_site(outermost, value))
            ):
                reason = self.find_obstacle(outermost, value)
                if reason in (NEVER_TRAINS, FUSED):
                    self.leave_out(site.target, reason)
                else:
                    ends.setdefault(size, []).append((outermost.depth, -value.index, site, reason))
        sites: list[Site] = []
        for _, _, site, reason in map(min, ends.values()):
            if reason:
                self.leave_out(site.target, reason)
            else:
                sites.append(site)
        return sites


def keeps_resolution(frame: Call, projection: Value) -> bool:
    """Return whether ``projection`` and the convolution before it in ``frame`` have planes of the same size."""
    before = find_convolution_before(projection, frame.start)
    return before is not None and before.shape[2:] == projection.shape[2:]


def describe_left_out(places: list[tuple[str, str]]) -> str:
    """Return one clause about each of the first three ``places``, and the number of the others."""
    more = [f"and {len(places) - 3} more"] if len(places) > 3 else []
    return ", ".join([f"{name!r} {reason}" for name, reason in places[:3]] + more)


def drop_repeated_targets(sites: list[Site]) -> list[Site]:
    """Return the first site of each target; shared modules run several times."""
    first: dict[tuple[str, str], Site] = {}
    for site in sites:
        first.setdefault((site.target, site.node), site)
    return list(first.values())
