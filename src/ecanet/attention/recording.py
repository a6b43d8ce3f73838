"""Record what the gates of a network do: their weights by class, their extremes, and what looks wrong.

`record_gates` runs images through a network and keeps sums by class for each channel gate, so memory does not grow with
the number of images.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ecanet import progress
from ecanet.attention.base import Attention
from ecanet.attention.gates import ECA, ChannelAttention
from ecanet.attention.others import CBAM, compute_maxima
from ecanet.attention.statistics import StatisticsAttention
from ecanet.errors import ConfigError
from ecanet.ops import reference

Gate = ChannelAttention | StatisticsAttention | CBAM

NEAR = 0.01
"""A weight is saturated if it is within this share of the gate's range of 0 or of the highest value.

Its gradient is then almost zero.
"""


@dataclass(frozen=True, kw_only=True)
class GateRecord:
    """The behaviour of one gate over many images. Weights are in the gate's own range, 0 to ``ceiling``."""

    name: str
    gain: float
    ceiling: float
    """The highest weight that the gate can give: its gain, and 2 for a GCT."""
    counts: Tensor
    """Images of each class (K)."""
    class_means: Tensor
    """Mean weight of each channel for each class (K, C); NaN for a class without images."""
    mean: Tensor
    """Mean weight of each channel over all images (C)."""
    deviation: Tensor
    """Standard deviation of each channel's weight over all images (C)."""
    lowest: Tensor
    """Lowest weight of each channel (C)."""
    highest: Tensor
    """Highest weight of each channel (C)."""
    saturated: float
    """Share of the weights, over images and channels, that are saturated."""
    kernel: Tensor | None
    """ECA's 1-D kernel (k); None for other gates."""

    @property
    def channels(self) -> int:
        """Number of channels that the gate weighs."""
        return len(self.mean)

    @property
    def spread(self) -> float:
        """Standard deviation of the mean weights across classes, averaged over channels; 0 if the classes are equal."""
        present = self.class_means[self.counts > 0]
        return float(present.std(0, correction=0).mean()) if len(present) else 0.0

    @property
    def dead(self) -> Tensor:
        """Boolean mask of the channels that the gate shuts on every image (C)."""
        return self.highest < NEAR * self.ceiling

    @property
    def is_unmoved(self) -> bool:
        """True for a lossless gate that is still the identity: on every image, each weight is practically 1."""
        farthest = max(float(self.highest.max()) - 1, 1 - float(self.lowest.min()))
        return self.ceiling == 2 and farthest < NEAR * self.ceiling

    def find_alarms(self) -> list[str]:
        """Return one sentence for each thing that looks wrong with this gate."""
        broken = int(self.mean.isnan().sum())
        if broken:  # NaN hides everything else
            return [f"the weights of {broken} of {self.channels} channels are NaN"]
        found: list[str] = []
        if self.saturated > 0.1:
            found.append(f"{self.saturated:.0%} of the weights are at an end of their range, where gradients vanish")
        if int(self.dead.sum()):
            found.append(f"{int(self.dead.sum())} of {self.channels} channels are shut on every image")
        if self.is_unmoved:
            found.append(
                f"every weight is still within {NEAR * self.ceiling:g} of 1: the gate began as the identity and has "
                f"not moved; ecanet.parameter_groups gives the gates a higher learning rate"
            )
        elif int(self.counts.sum()) > 1 and float(self.deviation.max()) < 1e-3 * self.ceiling:
            found.append("the weights are the same for every image: a constant could replace this gate")
        return found


def find_gates(model: nn.Module) -> dict[str, Gate]:
    """Return the channel gates of ``model`` by name: gates on channel statistics, and CBAM (its channel gate).

    Raises:
        ConfigError: there is none.
    """
    modules = dict(cast(Iterable[tuple[str, nn.Module]], model.named_modules()))
    found = {name: module for name, module in modules.items() if isinstance(module, Gate)}
    if not found:
        others = sorted({type(module).__name__ for module in modules.values() if isinstance(module, Attention)})
        if others:
            raise ConfigError(
                f"there are no channel gates to inspect: {', '.join(others)} does not give each channel one weight; "
                f"inspect shows eca, se and their variants, cbam, ese, gct, srm and fca"
            )
        raise ConfigError("this network has no channel gates to inspect; ecanet.attach adds them")
    return found


def compute_weights(gate: Gate, x: Tensor) -> Tensor:
    """Return the channel weights (N, C) of ``gate`` for ``x`` (N, C, ...), in float32 or wider."""
    if isinstance(gate, StatisticsAttention):
        return gate.weigh(x)
    means = reference.squeeze(x)
    if isinstance(gate, CBAM):
        return gate.gain * gate.channel_gate(means.to(x.dtype), compute_maxima(x, None)).to(means.dtype)
    return gate.weigh(means)


@torch.inference_mode()
def record_gates(model: nn.Module, batches: Iterable[tuple[object, Tensor | None]], classes: int) -> list[GateRecord]:
    """Run ``batches`` of images and labels (below ``classes``) through ``model`` and return what each gate did.

    Without labels all weights are of class 0. A detector's gate may then run several times for an image, on each level
    of a pyramid or on each region, and each run counts.

    The model's mode is not changed: put it in evaluation mode first.

    >>> from ecanet import create_model
    >>> from ecanet.attention import record_gates
    >>> batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0]))]
    >>> found = record_gates(create_model("resnet20").eval(), batches, classes=2)
    >>> len(found), found[0].name, found[0].class_means.shape
    (9, 'layer1.0.eca', torch.Size([2, 16]))

    Raises:
        ConfigError: the network has no channel gates, there are no images, or a gate ran on none of them.
    """
    sums = {name: _Sums(gate, classes) for name, gate in find_gates(model).items()}

    def add(name: str, gate: Gate, x: Tensor) -> None:
        sums[name].add(compute_weights(gate, x))

    empty = True
    with _observe_gates(model, add):
        for images, labels in progress.track(batches, "recording the gates, in batches"):
            empty = False
            for one in sums.values():
                one.labels = labels
            model(images)
    if empty:
        raise ConfigError("there are no images to inspect; choose other data with --data")
    return [one.make_record(name) for name, one in sums.items()]


@torch.inference_mode()
def compute_image_weights(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the weights (N, C) of each gate for ``images``."""
    found: dict[str, Tensor] = {}

    def keep(name: str, gate: Gate, x: Tensor) -> None:
        found[name] = compute_weights(gate, x)

    with _observe_gates(model, keep):
        model(images)
    return found


@torch.inference_mode()
def run_with_held_gates(model: nn.Module, images: Tensor, records: Sequence[GateRecord]) -> dict[str, Tensor]:
    """Return the model's outputs by gate, when that gate is held at its mean weights over the recorded images.

    The difference to the plain output is the effect of the gate's reaction to these images.
    """
    found: dict[str, Tensor] = {}
    modules = find_gates(model)
    for one in records:
        gate = modules[one.name]
        method = "channel_gate" if isinstance(gate, CBAM) else "gate"
        setattr(gate, method, _make_constant_gate((one.mean / gate.gain).to(images.device)))
        try:
            found[one.name] = model(images)
        finally:
            delattr(gate, method)  # uncovers the method of the class
    return found


def _make_constant_gate(weights: Tensor) -> Callable[..., Tensor]:
    def gate(statistics: Tensor, *maxima: Tensor) -> Tensor:  # SRM's statistics have a third axis
        return weights.to(statistics.dtype).expand(len(statistics), -1)

    return gate


@contextmanager
def _observe_gates(model: nn.Module, observe: Callable[[str, Gate, Tensor], None]) -> Generator[None]:
    """Call ``observe(name, gate, input)`` before each call of a gate of ``model``."""

    def make_hook(name: str, gate: Gate) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: observe(name, gate, args[0])

    handles = [gate.register_forward_pre_hook(make_hook(name, gate)) for name, gate in find_gates(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Running sums of one gate's weights, in float64."""

    def __init__(self, gate: Gate, classes: int) -> None:
        self.gate, c = gate, gate.channels
        self.ceiling = gate.gain * (gate.highest if isinstance(gate, StatisticsAttention) else 1)
        self.labels: Tensor | None = None
        self.counts = torch.zeros(classes)
        self.totals = torch.zeros(classes, c, dtype=torch.float64)
        self.squares = torch.zeros(c, dtype=torch.float64)
        self.lowest, self.highest = torch.full((c,), torch.inf), torch.full((c,), -torch.inf)
        self.saturated = 0

    def add(self, weights: Tensor) -> None:
        """Add the weights (N, C) of images whose labels are ``self.labels``, or of one class without labels."""
        weights = weights.double().cpu()
        labels = torch.zeros(len(weights), dtype=torch.long) if self.labels is None else self.labels.cpu()
        self.counts.index_add_(0, labels, torch.ones(len(labels)))
        self.totals.index_add_(0, labels, weights)
        self.squares += weights.square().sum(0)
        if len(weights):
            self.lowest = torch.minimum(self.lowest, weights.amin(0).float())
            self.highest = torch.maximum(self.highest, weights.amax(0).float())
        self.saturated += int(((weights < NEAR * self.ceiling) | (weights > (1 - NEAR) * self.ceiling)).sum())

    def make_record(self, name: str) -> GateRecord:
        """Return the means, deviations and shares that follow from the sums."""
        n = int(self.counts.sum())
        if not n:
            raise ConfigError(
                f"the gate {name!r} ran on none of these images, as in a detector that proposes no region; train the "
                "network first, or choose other data with --data"
            )
        mean = self.totals.sum(0) / n
        variance = (self.squares / n - mean.square()).clamp(min=0)
        return GateRecord(
            name=name,
            gain=self.gate.gain,
            ceiling=self.ceiling,
            counts=self.counts.long(),
            class_means=(self.totals / self.counts[:, None]).float(),
            mean=mean.float(),
            deviation=variance.sqrt().float(),
            lowest=self.lowest,
            highest=self.highest,
            saturated=self.saturated / (n * len(mean)),
            kernel=self.gate.conv.weight.detach().flatten().cpu() if isinstance(self.gate, ECA) else None,
        )
