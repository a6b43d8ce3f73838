"""Say where the gate of one output goes: the module after which it acts, and the module that keeps it."""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import fx, nn

from ecanet.surgery.graphs import find_block
from ecanet.surgery.modules import list_modules
from ecanet.surgery.recording import CONVOLUTIONS, NORMS, Call, Trace, Value

NEVER_TRAINS = "does not run in training mode, so a gate on it would never train"
FUSED = (
    "is skipped in evaluation by the fused kernel of its TransformerEncoderLayer, so a gate would act in training alone"
)

ZERO_MEANS = (
    "ends with an instance norm without a bias, whose channel means are all zero, so a gate has nothing to weigh"
)

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


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
    graph: str = ""
    """Name of the `torch.fx.GraphModule` in which the gate is a node."""
    node: str = ""
    """Name of the node in that graph behind which the gate stands; "" elsewhere."""
    module: bool = True
    """Whether ``target`` is a module; False for a node that calls a function."""
    affine: str | None = None
    """Name of the norm or convolution that is the last step of ``target``, where `fold` may double it."""


class Placer:
    """The maker of sites in one model, from the trace of one run."""

    def __init__(self, model: nn.Module, trace: Trace):
        self.trace = trace
        self.model = model
        self.names = {module: name for name, module in list_modules(model)}
        self.makers = trace.find_makers()
        self.nodes: dict[tuple[nn.Module, Value], fx.Node] = {}
        for graph, node, value in trace.steps:
            self.nodes.setdefault((graph, value), node)  # a node that returns its own input (dropout) made nothing

    def find_obstacle(self, call: Call, value: Value) -> str:
        """Return why no gate can act on ``value``, the output of ``call``; "" if one can."""
        if not value.dtype.is_floating_point:
            kind = "complex numbers" if value.dtype.is_complex else "numbers"
            return f"returns {kind} of {value.dtype}, and a gate takes real numbers of floating point"
        if value.axis == 0 or value.channels == 0:
            return f"returns a tensor of shape {tuple(value.shape)} without the axes (batch, channels, ...)"
        if any(has_zero_means(made.module) for made in self.makers.get(value, [])):
            return ZERO_MEANS
        # The recorded run does not show it: PyTorch takes no fused kernel while operations are recorded.
        if is_fused(call):
            return FUSED
        trained = self.trace.trained
        return NEVER_TRAINS if isinstance(trained, set) and call.module not in trained else ""

    def make_site(self, call: Call, value: Value) -> Site | None:
        """Return the site on the output of ``call``; None if no module there can keep a gate.

        The gate is kept by the module that calls the target, if it is the target's parent in the tree of modules.
        Containers are no such parents, since they would run the gate as one more entry, and the root is none, since
        others take its children out of it (``list(model.children())[:-1]``). Then the target keeps the gate itself.
        """
        for frame in (call.parent, call):
            if frame is not None and (site := self.make_node_site(frame, value)):
                return site
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

    def make_node_site(self, frame: Call, value: Value) -> Site | None:
        """Return the site behind the node that made ``value`` in ``frame``, if that is a run of a graph; else None."""
        graph = frame.module
        node = self.nodes.get((graph, value)) if frame.start <= value.index < frame.end else None
        if node is None or not isinstance(graph, fx.GraphModule) or graph not in self.names:
            return None
        name, block = self.names[graph], find_block(graph, node)
        called = [c for c in self.makers.get(value, []) if c.parent is frame and c.module in self.names]
        local = str(node.target) if called else f"{block}.{node.name}".lstrip(".")
        prefix = f"{name}." if name else ""
        return Site(
            block=f"{prefix}{block}".strip("."),
            target=prefix + local,
            graph=name,
            node=node.name,
            module=bool(called),
            affine=self.find_affine(called[0], value) if called else None,
            **describe_value(value),
        )

    def describe_site(self, block: str, call: Call, value: Value, append: bool = False) -> Site:
        """Return the site on the output of ``call``, with its gate kept by ``block``."""
        return Site(
            block=block,
            target=self.names[call.module],
            append=append,
            affine=self.find_affine(call, value),
            **describe_value(value),
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


class Description(TypedDict):
    """The part of a site that one value says."""

    channels: int
    axis: int
    index: int
    shape: tuple[int, ...]
    device: torch.device


def describe_value(value: Value) -> Description:
    """Return what ``value`` says of its site."""
    return {
        "channels": value.shape[value.axis],
        "axis": value.axis,
        "index": value.index,
        "shape": tuple(n for i, n in enumerate(value.shape) if i not in (0, value.axis)),
        "device": value.device,
    }


def is_fused(call: Call) -> bool:
    """Return whether ``call`` happened within a layer for which PyTorch has a fused kernel in evaluation."""
    outer = call.parent
    while outer is not None and not isinstance(outer.module, nn.TransformerEncoderLayer):
        outer = outer.parent
    return outer is not None


def has_zero_means(module: nn.Module) -> bool:
    """Return whether the mean of each channel of each sample is zero in the output of ``module``."""
    return isinstance(module, INSTANCE_NORMS) and not module.affine and not module.track_running_stats


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
