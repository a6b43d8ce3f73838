"""Find in one run of a network what follows each of its convolutions: a norm to fold, a gate to move, an activation.

The run shows which module consumed which tensor, so nothing depends on the classes or names of an author. A tensor that
anything else reads (another layer, a hook, the network's output) ends the chain.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from ecanet.attention import Attention
from ecanet.inference.blocks import describe_for_copy
from ecanet.inference.folding import Affine, Convolution, folds, is_convolution, measure_affine
from ecanet.models import gate_of, is_pointwise
from ecanet.ops import must_be_called
from ecanet.surgery import Call, Trace, Value, list_modules, list_records, read_record

FRESH = frozenset(["conv1d", "conv2d", "conv3d", "linear", "batch_norm", "group_norm", "layer_norm", "add"])
"""Operations whose result is new memory, which is no part of another tensor."""


class Chain(NamedTuple):
    """A convolution and what follows it, by their names in the network; None for what it has not."""

    convolution: str
    norm: str | None
    affine: Affine | None
    """What the norm computes."""
    rest: tuple[str, ...]
    """The children that the norm's own forward calls afterwards, such as an activation."""
    gate: str | None
    """A gate that can take its channel means from the convolution's input."""
    activation: str | None
    in_block: bool
    """True if a block of the plan runs the convolution."""


class Plan(NamedTuple):
    """What `ecanet.optimize` changes in a network, by names."""

    chains: list[Chain]
    blocks: list[str]
    """Residual blocks that `ecanet.models` can run by their parts."""
    inplace: list[str]
    """Activations whose input nobody else reads."""
    kept: dict[str, str]
    """The gates that stay where they are, each with the reason."""
    compared: list[str]
    """Children of the network that return the same afterwards."""


class Link(NamedTuple):
    """One call behind a convolution: its module, its result, and the children that its module calls afterwards."""

    module: nn.Module
    value: Value
    rest: tuple[nn.Module, ...] = ()


class Finder:
    """The finder of chains in one network, from the trace of one run."""

    def __init__(self, model: nn.Module, trace: Trace):
        self.model = model
        self.trace = trace
        self.names = {module: name for name, module in list_modules(model)}
        self.calls: dict[nn.Module, list[Call]] = defaultdict(list)
        self.read_by: dict[Value, list[Value]] = defaultdict(list)
        self.taken_by: dict[Value, list[Call]] = defaultdict(list)
        self.watched: set[Value] = set(trace.returned)
        """Values that the user gets to see: in the output, or by a hook."""
        self.inner: set[Value] = set()
        """Values that do not exist in the copy."""
        self.affine: dict[nn.Module, Affine | None] = {}
        for value in trace.values:
            for parent in value.parents:
                self.read_by[parent].append(value)
        for call in trace.calls:
            self.calls[call.module].append(call)
            if len(call.inputs) == 1:
                self.taken_by[call.inputs[0]].append(call)
            if must_be_called(call.module):
                self.watched.update(call.inputs, [] if call.output is None else [call.output])

    def plan(self) -> Plan:
        """Return all that can be changed in the network."""
        blocks = {
            name: parts for name, one in self.list_named(self.calls) if (parts := describe_for_copy(one)) is not None
        }
        inside = {module for parts in blocks.values() for layer in parts.branch for module in layer if module}
        inside |= {module for parts in blocks.values() for module in (parts.attention, parts.end) if module}
        kept = {name: describe_obstacle(gate, None) or "" for name, gate in self.list_named(self.find_gates())}
        chains: list[Chain] = []
        for name, convolution in self.list_named(self.calls):
            if is_convolution(convolution):
                links = self.follow_all(convolution)
                gate = links.get("gate")
                reason = None if gate is None else self.find_obstacle(gate.module, convolution)
                if gate is not None and reason is None:
                    kept.pop(self.names[gate.module], None)
                elif gate is not None and reason is not None:
                    kept[self.names[gate.module]] = reason
                    links = {kind: link for kind, link in links.items() if kind == "norm"}
                if links:
                    chains.append(self.make_chain(name, convolution, links, in_block=convolution in inside))
        changed = {name for chain in chains for name in (chain.convolution, chain.norm, chain.gate, chain.activation)}
        compared = [
            self.names[call.module]
            for call in self.trace.calls
            if call.depth == 1 and call.output not in self.inner and self.names.get(call.module) not in {None, *changed}
        ]
        inplace = [name for name, one in self.list_named(self.calls) if self.may_work_inplace(one)]
        return Plan(chains, list(blocks), inplace, kept, list(dict.fromkeys(compared)))

    def list_named(self, modules: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
        """Return the modules that have a name in the network, without the network itself."""
        return [(self.names[module], module) for module in modules if self.names.get(module)]

    def make_chain(self, name: str, convolution: Convolution, links: dict[str, Link], *, in_block: bool) -> Chain:
        """Return the chain of ``links``; note the values that will not exist any more."""
        norm = links.get("norm")
        found = {kind: self.names[link.module] for kind, link in links.items()}
        for call in self.calls[convolution]:
            assert call.output is not None
            self.inner.add(call.output)
            for value in [*self.follow(call, convolution).values()][:-1]:
                self.inner.add(value.value)
        return Chain(
            name,
            found.get("norm"),
            None if norm is None else self.affine[norm.module],
            () if norm is None else tuple(self.names[one] for one in norm.rest),
            found.get("gate"),
            found.get("activation"),
            in_block,
        )

    # what follows a convolution

    def follow_all(self, convolution: Convolution) -> dict[str, Link]:
        """Return what follows ``convolution`` in each of its calls, as far as it is the same modules every time."""
        found = [self.follow(call, convolution) for call in self.calls[convolution]]
        same: dict[str, Link] = {}
        for kind in ("norm", "gate", "activation"):
            links = [links.get(kind) for links in found]
            first = links[0]
            if len({None if link is None else link.module for link in links}) > 1:
                break
            if first is not None and len(self.calls[first.module]) != len(found):
                break
            if first is not None:
                same[kind] = first
        return same

    def follow(self, call: Call, convolution: Convolution) -> dict[str, Link]:
        """Return the norm, the gate and the activation that follow one call of ``convolution``, in this order."""
        links: dict[str, Link] = {}
        value = call.output
        for kind, find in (("norm", self.find_norm), ("gate", self.find_gate), ("activation", self.find_activation)):
            link = None if value is None else find(value, convolution)
            if link is not None:
                links[kind], value = link, link.value
        return links

    def find_readers(self, value: Value) -> Iterator[Call]:
        """Yield the calls in which everything happens that is ever done with ``value``, the outermost first."""
        for call in self.taken_by[value] if value not in self.watched else ():
            made = call.output is not None and call.output.index >= call.start
            inside = all(call.start <= reader.index < call.end for reader in self.read_by[value])
            if made and inside and call.module in self.names and not must_be_called(call.module):
                yield call

    def find_norm(self, value: Value, convolution: Convolution) -> Link | None:
        """Return the norm that reads ``value`` and that can be folded into ``convolution``."""
        for call in self.find_readers(value):
            module = call.module
            if module not in self.affine:
                self.affine[module] = measure_affine(module, convolution.out_channels, len(convolution.kernel_size))
            affine, link = self.affine[module], self.find_rest(call)
            if affine is not None and link is not None and len(affine.slope) == convolution.out_channels:
                return link if folds(convolution, affine) else None
        return None

    def find_rest(self, call: Call) -> Link | None:
        """Return the value before the children that ``call`` runs, which must run in a row at its end."""
        assert call.output is not None
        inner = [one for one in self.trace.calls if one.parent is call]
        last = call.output
        for one in reversed(inner):
            if one.output is not last or len(one.inputs) != 1 or one.module not in self.names:
                return None
            last = one.inputs[0]
        if last.index < call.start or any(must_be_called(one.module) for one in inner):
            return None
        return Link(call.module, last, tuple(one.module for one in inner))

    def find_gate(self, value: Value, convolution: Convolution) -> Link | None:
        """Return the gate on channel means that reads ``value``."""
        return next(
            (Link(c.module, c.output) for c in self.find_readers(value) if c.output and gate_of(c.module)), None
        )

    def find_activation(self, value: Value, convolution: Convolution) -> Link | None:
        """Return the activation that reads ``value``, if it is one that a kernel can apply."""
        kinds = nn.ReLU, nn.ReLU6
        return next(
            (Link(c.module, c.output) for c in self.find_readers(value) if c.output and type(c.module) in kinds), None
        )

    # gates and activations

    def find_gates(self) -> list[nn.Module]:
        """Return the gates of the network, attached or built in, that are no part of another one."""
        gates = {one for one in self.calls if isinstance(one, Attention) or read_record(one) or gate_of(one)}
        return [
            one
            for one in self.calls
            if one in gates and not any(self.is_within(call, gates) for call in self.calls[one])
        ]

    def is_within(self, call: Call, modules: set[nn.Module]) -> bool:
        """Return whether ``call`` happened within a call of one of ``modules``."""
        parent = call.parent
        while parent is not None and parent.module not in modules:
            parent = parent.parent
        return parent is not None

    def find_obstacle(self, gate: nn.Module, convolution: nn.Module) -> str | None:
        """Return why ``gate``, right behind ``convolution``, stays there; None if it can be moved before it."""
        keeper, _, key = self.names[gate].rpartition(".")
        if any(record.target == key for record in list_records(self.model.get_submodule(keeper)).values()):
            return "another gate follows it"
        return describe_obstacle(gate, convolution)

    def may_work_inplace(self, module: nn.Module) -> bool:
        """Return whether ``module`` is an activation, not in place, that alone reads new memory each time."""
        if (
            getattr(module, "inplace", None) is not False
            or must_be_called(module)
            or any(True for _ in module.children())
        ):
            return False
        inputs = [call.inputs for call in self.calls[module]]
        return all(
            len(values) == 1
            and values[0].op in FRESH
            and any(call.module is module for call in self.find_readers(values[0]))
            for values in inputs
        )


def describe_obstacle(gate: nn.Module, convolution: nn.Module | None) -> str | None:
    """Return why ``gate`` stays behind ``convolution``, None if its means are better taken from what that reads."""
    if gate_of(gate) is None:
        return f"{type(gate).__name__} is not a gate on channel means"
    if convolution is None:
        return "it does not follow a convolution, but for a norm that can be folded"
    if not isinstance(convolution, nn.Conv2d) or not is_pointwise(convolution):
        return "the convolution before it is not a dense 1x1 convolution of stride 1"
    c, k = convolution.out_channels, convolution.in_channels
    return (
        None if k <= c else f"the convolution before it has {k} channels in and {c} out, so its output is less to read"
    )
