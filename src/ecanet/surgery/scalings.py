"""Find the modules of any network that scale its channels, and take one out after a layer beside it has its constant.

These are this library's gates, built in or attached, and the channel attention of other libraries, as modules or as
nodes of a graph.
"""

from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ecanet.attention import Attention, ChannelAttention, StatisticsAttention
from ecanet.surgery.example import record_run
from ecanet.surgery.folding import CONVOLUTIONS, NORMS, find_layer_obstacle
from ecanet.surgery.gating import list_records, uninstall
from ecanet.surgery.graphs import find_nodes, remove_gate, ungroup
from ecanet.surgery.modules import exchange_everywhere, list_modules
from ecanet.surgery.patterns import group_all
from ecanet.surgery.recognition import keep_innermost, recognise, returns_product
from ecanet.surgery.recording import CONVOLUTIONS as CONVOLVING
from ecanet.surgery.recording import NORMS as NORMALIZING
from ecanet.surgery.recording import REORDERS, Call, Trace, Value
from ecanet.surgery.records import read_record

__all__ = ["Scaling", "find_scalings"]


@dataclass(eq=False, kw_only=True)
class Scaling:
    """A module that multiplies each channel (axis 1 of its input) by a factor, and the layers beside it."""

    name: str
    module: nn.Module
    before: str | None = None
    """The norm or convolution whose output this module reads and nothing else does: it can take a scale and a bias."""
    after: str | None = None
    """The convolution or linear layer that alone reads the output of this module: it can take a scale."""
    takes_bias: bool = False
    """Whether ``after`` can take a bias too: a convolution that pads with zeros cannot."""
    obstacle: str = ""
    """Why no layer can take a constant in the place of this module; empty if one can."""

    def put(self, model: nn.Module, module: nn.Module) -> None:
        """Let ``module`` stand in ``model`` where this module, or the one that was put there, stands."""
        exchange_everywhere(model, model.get_submodule(self.name), module)

    @torch.no_grad()
    def absorb(self, model: nn.Module, scale: Tensor, bias: Tensor | None) -> str:
        """Move ``scale * x + bias`` (C) into the layer beside this module, and take the module out; return its name.

        Numbers are multiplied in float64 and rounded once. The module's keys leave the state dict. A convolution
        without a bias gets one if ``bias`` is not zero.
        """
        name = self.before or self.after
        assert name is not None
        layer = model.get_submodule(name)
        scale, bias = scale.double(), torch.zeros_like(scale.double()) if bias is None else bias.double()
        if self.before:
            scale_output(layer, scale, bias)
        else:
            scale_input(layer, scale, bias)
        take_out(model, self)
        return name


def scale_output(layer: nn.Module, scale: Tensor, bias: Tensor) -> None:
    """Let ``layer`` give ``scale * y + bias``, by channel, where it gives y."""
    weight, own = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    weight.copy_(weight.double() * scale.reshape(-1, *(1 for _ in weight.shape[1:])))
    add_bias(layer, bias if own is None else bias + own.double() * (scale - 1))  # pyright: ignore


def scale_input(layer: nn.Module, scale: Tensor, bias: Tensor) -> None:
    """Let ``layer`` give for x what it gives for ``scale * x + bias``, by channel."""
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    assert isinstance(weight, Tensor)
    grouped = weight.double().reshape(groups, -1, *weight.shape[1:])  # G out in k...
    shape = (groups, 1, -1, *(1 for _ in weight.shape[2:]))
    offset = (grouped * bias.reshape(shape)).flatten(2).sum(2).flatten()
    weight.copy_((grouped * scale.reshape(shape)).reshape(weight.shape))
    add_bias(layer, offset)


def add_bias(layer: nn.Module, bias: Tensor) -> None:
    """Add ``bias`` to the bias of ``layer``, which may have none."""
    own, weight = layer.bias, layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(own, Tensor):
        own.copy_(own.double() + bias)
    elif bias.any():
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)


def take_out(model: nn.Module, scaling: Scaling) -> None:
    """Remove the module of ``scaling``, or what was put in its place, so that its input goes on in its stead."""
    keeper, _, key = scaling.name.rpartition(".")
    block, gate = model.get_submodule(keeper), model.get_submodule(scaling.name)
    record = list_records(block).get(key)
    if record is not None and record.mode == "call":
        uninstall(block, key)
    elif find_nodes(model, gate):
        own = read_record(scaling.module)
        remove_gate(model, scaling.name, gate, 1 if own is None else own.axis)
    elif isinstance(block, nn.Sequential) and block[-1] is gate and isinstance(scaling.module, Attention):
        delattr(block, key)  # MobileNetV2's blocks end in it: without it they are the plain network's
    else:
        exchange_everywhere(model, gate, nn.Identity())


@contextmanager
def find_scalings(model: nn.Module, example: object) -> Generator[list[Scaling]]:
    """Yield the modules of ``model`` that scale channels, in running order.

    In the body of the context, parts of graphs that are channel attention are modules. Afterwards those that were not
    taken out are nodes again. The model runs twice on ``example``, in evaluation mode, and its state is restored.

    Raises:
        AttachError: the model does not run on ``example``.
    """
    trace = record_run(model, example)
    groups = list(group_all(model, trace, with_sum=True))
    try:
        trace = record_run(model, example) if groups else trace
        yield list_scalings(model, trace)
    finally:
        for module, moved in reversed(groups):
            ungroup(model, module, moved)


def list_scalings(model: nn.Module, trace: Trace) -> list[Scaling]:
    """Return what `find_scalings` yields, from the ``trace`` of one run."""
    found: dict[nn.Module, Scaling] = {}
    own = [(name, module) for name, module in list_modules(model) if isinstance(module, Attention)]
    inside = {part for _, module in own for part in module.modules()}
    for name, module in own:
        known = isinstance(module, ChannelAttention | StatisticsAttention)
        found[module] = Scaling(
            name=name, module=module, obstacle="" if known else "it is not one factor for a channel"
        )
    for one in keep_innermost(recognise(model, trace, [])):
        if one.module not in inside:
            reason = "" if returns_product(one) else "it returns its factor, and the module around it multiplies"
            found[one.module] = Scaling(name=one.name, module=one.module, obstacle=reason)
    order = {call.module: call.start for call in reversed(trace.calls) if call.module in found}
    surroundings = Surroundings(model, trace)
    for scaling in found.values():
        surroundings.look(scaling)
    return sorted(found.values(), key=lambda scaling: order.get(scaling.module, len(trace.values)))


class Surroundings:
    """The layers before and after a module in one run of the network."""

    def __init__(self, model: nn.Module, trace: Trace):
        self.model, self.trace = model, trace
        self.names = {module: name for name, module in list_modules(model)}
        self.makers = trace.find_makers()
        self.readers: dict[Value, list[Value]] = defaultdict(list)
        for value in trace.values:
            for parent in value.parents:
                self.readers[parent].append(value)

    def look(self, scaling: Scaling) -> None:
        """Fill in the layers beside ``scaling``, or what is in the way."""
        calls = [call for call in self.trace.calls if call.module is scaling.module]
        if scaling.obstacle:
            return
        if len(calls) != 1 or not calls[0].inputs or calls[0].output is None:
            scaling.obstacle = (
                f"it runs {len(calls)} times for an image" if len(calls) != 1 else "its input is not seen"
            )
            return
        before, reason = self.find_before(calls[0])
        after, other = self.find_after(calls[0])
        if before is not None:
            scaling.before = self.names[before]
        elif after is not None:
            scaling.after = self.names[after]
            padding: object = getattr(after, "padding", 0)
            pads = any(cast("tuple[object, ...]", padding)) if isinstance(padding, tuple) else padding != 0
            scaling.takes_bias = not pads or padding == "valid"
        else:
            scaling.obstacle = f"{reason}, and {other}"

    def find_before(self, call: Call) -> tuple[nn.Module | None, str]:
        """Return the norm or convolution whose output only ``call`` reads, or None and why there is none."""
        value, readers = call.inputs[0], range(call.start, call.end)
        while True:
            if value in self.trace.returned or any(one.index not in readers for one in self.readers[value]):
                return None, "another operation reads its input too"
            if value.op not in REORDERS:
                break
            readers, value = range(value.index, value.index + 1), value.parents[0]
        return self.check(value, (*CONVOLUTIONS, *NORMS), "no norm or convolution is before it")

    def find_after(self, call: Call) -> tuple[nn.Module | None, str]:
        """Return the convolution that alone reads the output of ``call``, or None and why there is none."""
        value = call.output
        assert value is not None
        nothing = "no convolution alone reads its output"
        while True:
            readers = [one for one in self.readers[value] if one.index >= call.end]
            if value in self.trace.returned or len(readers) != 1 or readers[0].parents[0] is not value:
                return None, nothing
            (reader,) = readers
            if reader.op not in REORDERS:
                break
            value = reader
        linear = reader.op == "linear" and value.axis != len(value.shape) - 1  # it mixes another axis
        return (None, nothing) if linear else self.check(reader, CONVOLUTIONS, nothing)

    def check(self, value: Value, kinds: tuple[type[nn.Module], ...], nothing: str) -> tuple[nn.Module | None, str]:
        """Return the module that made ``value`` if it is of one of ``kinds`` and its weights can be changed."""
        makers = self.makers.get(value)
        if not makers:
            return None, nothing
        leaf = max(makers, key=lambda one: one.depth).module
        frozen = type(leaf).__name__.startswith("FrozenBatchNorm") and NORMS[0] in kinds
        if not frozen and (value.op not in CONVOLVING | NORMALIZING or not isinstance(leaf, kinds)):
            return None, nothing
        name = self.names[leaf]
        if sum(call.module is leaf for call in self.trace.calls) != 1:
            return None, f"{name!r} beside it runs several times"
        if obstacle := find_layer_obstacle(self.model, name):
            return None, obstacle
        weight = leaf.weight
        if isinstance(leaf, NORMS) and isinstance(weight, Tensor) and weight.dim() != 1:
            return None, f"{name!r} has a weight for each position"
        return leaf, ""
