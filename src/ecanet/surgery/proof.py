"""Put the gates of all sites into a network and prove on the spot that they act as promised, or undo everything.

The network runs once more on the example that was recorded. Each gate must run exactly as often as the module behind
which it stands, and outputs must be the same bit for bit where attach promises it. A gate that does not is moved to its
next place, the target itself. Where that fails too, the site is left out.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from ecanet.attention import AttentionKind
from ecanet.errors import AttachError, summarize
from ecanet.surgery.example import run_again
from ecanet.surgery.insertion import find_target, insert, remove
from ecanet.surgery.modules import forward_hooks
from ecanet.surgery.outputs import are_same, check_has_numbers, refuse_difference
from ecanet.surgery.placing import Site, is_container
from ecanet.surgery.recording import Trace
from ecanet.surgery.records import read_record


@dataclass(eq=False)
class Placed:
    """A gate and its site."""

    site: Site
    gate: nn.Module
    name: str = ""
    """Name of the gate in the network; "" while it is not in."""
    runs: int = 0
    """How often the gate ran in the proof."""
    acts: int = 0
    """How often it did so because its target had run."""
    fault: str = ""


class Insertion:
    """The insertion of gates of one kind at all sites of a model: proven, or undone."""

    def __init__(self, model: nn.Module, trace: Trace, kind: AttentionKind, *, lossless: bool):
        self.model = model
        self.trace = trace
        self.kind = kind
        self.lossless = lossless
        self.gates: list[Placed] = []
        self.left_out: list[tuple[str, str]] = []
        """The targets that got no gate, each with the reason."""

    def place(self, sites: Sequence[Site], gates: Sequence[nn.Module], *, verify: bool) -> None:
        """Put ``gates`` at ``sites`` and prove them; on any error take all of them out again.

        Raises:
            AttachError: no site can be proven, or the outputs change.
        """
        self.gates = [Placed(site, gate) for site, gate in zip(sites, gates, strict=True)]
        try:
            self.put_all()
            if verify:
                self.prove()
        except BaseException:
            self.take_all()
            raise

    def put(self, one: Placed) -> None:
        """Put one gate into the network."""
        one.name = insert(self.model, one.site, self.kind, one.gate, lossless=self.lossless)

    def take(self, one: Placed) -> None:
        """Take one gate out of the network."""
        record = read_record(one.gate)
        assert record is not None
        remove(self.model, one.name, one.gate, record)
        one.name = ""

    def put_all(self) -> None:
        """Put all gates into the network."""
        for one in self.gates:
            self.put(one)

    def take_all(self) -> None:
        """Take all gates out of the network, the last one first."""
        for one in reversed([one for one in self.gates if one.name]):
            self.take(one)

    def prove(self) -> None:
        """Move or leave out the gates that do not act as often as their place, until all of them do.

        Raises:
            AttachError: no site can be proven, or the outputs change or are NaN.
        """
        if self.lossless:
            check_has_numbers(self.model, self.trace.output)
        while faulty := self.find_faulty():
            for one in faulty:
                self.take(one)
                target = find_target(self.model, one.site)
                if not one.site.node and one.site.block != one.site.target and not is_container(target):
                    one.site = replace(one.site, block=one.site.target, append=False)
                    self.put(one)
                else:
                    self.left_out.append((one.site.target, one.fault))
            self.gates = [one for one in self.gates if one.name]
            if not self.gates:
                reasons = "; ".join(f"{name!r}: {reason}" for name, reason in self.left_out[:3])
                raise AttachError(f"no gate can act in {type(self.model).__name__} as it should ({reasons})")
        for one in self.gates:
            record = read_record(one.gate)
            assert record is not None
            record.runs = one.runs

    def find_faulty(self) -> list[Placed]:
        """Run the example; return the gates that did not run as often as their target.

        Raises:
            AttachError: all did, and yet the outputs are not those of the plain network.
        """
        try:
            output = self.run_counted()
        except Exception as error:  # a forward may raise anything when a gate is where it should not be
            return self.find_failing(error)
        expected = Counter(call.module for call in self.trace.calls)
        for one in self.gates:
            place = one.site.graph if one.site.node else one.site.target
            count = expected[self.model.get_submodule(place)]
            # A block that runs its children in a row may run the gate, too, which is not the gate's act.
            acts = one.runs if one.site.node or one.site.append else one.acts
            fine = count == one.runs and one.runs == acts
            one.fault = "" if fine else f"it ran {count} times, its gate {one.runs} times, behind it {one.acts} times"
        faulty = [one for one in self.gates if one.fault]
        if not faulty and self.lossless and not are_same(output, self.trace.output):
            self.refuse_change(output)
        return faulty

    def run_counted(self) -> object:
        """Run the example and count the runs of each gate; return the output."""
        records = {one: record for one in self.gates if (record := read_record(one.gate)) is not None}
        for one, record in records.items():
            one.runs = record.acts = 0

            def count(*_: object, one: Placed = one) -> None:
                one.runs += 1

            forward_hooks(one.gate)["ecanet.proof"] = count
        try:
            return run_again(self.model, self.trace)
        finally:
            for one, record in records.items():
                del forward_hooks(one.gate)["ecanet.proof"]
                one.acts, record.acts = record.acts or 0, None

    def find_failing(self, error: Exception) -> list[Placed]:
        """Return the gates with which the network fails when they are alone in it.

        Raises:
            AttachError: there are none, so they fail together.
        """
        self.take_all()
        for one in self.gates:
            self.put(one)
            try:
                run_again(self.model, self.trace)
                one.fault = ""
            except Exception as failed:  # as above
                one.fault = f"the network fails with a gate there ({summarize(failed)})"
            self.take(one)
        failing = [one for one in self.gates if one.fault]
        if not failing:
            raise AttachError(f"{type(self.model).__name__} fails with gates in it ({summarize(error)})") from error
        self.put_all()
        return failing

    def refuse_change(self, output: object) -> None:
        """Refuse the gates, which changed ``output``, unless two runs of the plain network differ as well.

        Raises:
            AttachError: they do not.
        """
        self.take_all()
        same = are_same(run_again(self.model, self.trace), self.trace.output)
        if same:
            refuse_difference(self.model, self.trace.output, output)
        self.put_all()
