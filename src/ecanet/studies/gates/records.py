"""What the gates of a network do: their weights by layer and class, alarms for gates that do nothing, one image.

`record` runs images through a network and keeps, for each channel gate, sums by class: memory does not grow with the
number of images. `inspect_pages` draws what it found.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecanet.attention import CBAM, ECA, ChannelAttention, highest
from ecanet.errors import ConfigError
from ecanet.ops import reference

NEAR = 0.01
"""A weight this near to 0 or to its highest value, as a share of that, is saturated there: its gradient is gone."""


@dataclass(frozen=True, kw_only=True)
class GateRecord:
    """What one gate did over many images; weights are of the gate's own range, 0 to ``gain``."""

    name: str
    gain: float
    counts: Tensor
    """Images of each class (K)."""
    class_means: Tensor
    """Mean weight of each channel for each class (K, C); NaN for a class without images."""
    mean: Tensor
    """Mean weight of each channel over all images (C)."""
    deviation: Tensor
    """Standard deviation over all images (C)."""
    lowest: Tensor
    highest: Tensor
    saturated: float
    """Share of all weights, of images and channels, that stand at an end of their range."""
    kernel: Tensor | None
    """ECA's 1-D kernel (k)."""

    @property
    def channels(self) -> int:
        """How many channels the gate weighs."""
        return len(self.mean)

    @property
    def spread(self) -> float:
        """Standard deviation between the classes' mean weights, averaged over channels: 0 if classes do not matter."""
        present = self.class_means[self.counts > 0]
        return float(present.std(0, correction=0).mean()) if len(present) else 0.0

    @property
    def dead(self) -> Tensor:
        """Which channels the gate shuts on every image (C)."""
        return self.highest < NEAR * self.gain

    def alarms(self) -> list[str]:
        """What looks wrong with this gate, one sentence each."""
        found = []
        if self.saturated > 0.1:
            found.append(
                f"{self.saturated:.0%} of the weights stand at an end of their range, where nothing is learned"
            )
        if int(self.dead.sum()):
            found.append(f"{int(self.dead.sum())} of {self.channels} channels are shut on every image")
        if float(self.deviation.max()) < 1e-3 * self.gain:
            found.append("the weights are the same for every image: a constant could take this gate's place")
        return found


def gates(model: nn.Module) -> dict[str, ChannelAttention | CBAM]:
    """The channel gates of ``model`` by name: the paper's Table 2 modules, and CBAM's channel half.

    Raises:
        ConfigError: there is none.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, ChannelAttention | CBAM)}
    if not found:
        raise ConfigError("this network has no channel gates to inspect")
    return found


def weights_of(gate: ChannelAttention | CBAM, x: Tensor) -> Tensor:
    """The channel weights (N, C) that ``gate`` gives to ``x`` (N, C, ...), in float32 or wider."""
    means = reference.squeeze(x)
    if isinstance(gate, CBAM):
        return gate.gain * gate.channel_gate(means.to(x.dtype), highest(x, None)).to(means.dtype)
    return gate.weigh(means)


@torch.inference_mode()
def record(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> list[GateRecord]:
    """Run ``batches`` of (images, labels below ``classes``) through ``model`` and say what each gate did.

    The model's mode is left as it is: put it in evaluation mode before.

    >>> from ecanet import create_model
    >>> batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0]))]
    >>> found = record(create_model("resnet20").eval(), batches, classes=2)
    >>> len(found), found[0].name, found[0].class_means.shape
    (9, 'layer1.0.eca', torch.Size([2, 16]))

    Raises:
        ConfigError: the network has no channel gates, or there are no images.
    """
    sums = {name: _Sums(gate, classes) for name, gate in gates(model).items()}
    with _watched(model, lambda name, gate, x: sums[name].take(weights_of(gate, x))):
        for images, labels in batches:
            for one in sums.values():
                one.labels = labels
            model(images)
    return [one.record(name) for name, one in sums.items()]


@torch.inference_mode()
def weights_for(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Each gate's weights (N, C) for ``images``."""
    found: dict[str, Tensor] = {}
    with _watched(model, lambda name, gate, x: found.update({name: weights_of(gate, x)})):
        model(images)
    return found


@torch.inference_mode()
def without(model: nn.Module, images: Tensor, records: Sequence[GateRecord]) -> dict[str, Tensor]:
    """The model's outputs when one gate at a time is held at its mean weights over the recorded images.

    The difference to the plain output is what that gate's reaction to *these* images did.
    """
    found, modules = {}, gates(model)
    for one in records:
        gate, share = modules[one.name], (one.mean / one.gain).to(images.device)
        method = "channel_gate" if isinstance(gate, CBAM) else "gate"
        setattr(gate, method, lambda means, *maxima, share=share: share.to(means.dtype).expand(means.shape))
        try:
            found[one.name] = model(images)
        finally:
            delattr(gate, method)  # the class's own again
    return found


@contextmanager
def _watched(model: nn.Module, see) -> Iterator[None]:
    """Call ``see(name, gate, input)`` whenever a gate of ``model`` is called."""

    def watch(name: str):
        return lambda module, args: see(name, module, args[0])

    handles = [gate.register_forward_pre_hook(watch(name)) for name, gate in gates(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Running sums of one gate's weights, in float64."""

    def __init__(self, gate: ChannelAttention | CBAM, classes: int):
        self.gate, self.gain, c = gate, float(gate.gain), gate.channels
        self.labels = torch.empty(0, dtype=torch.long)
        self.counts = torch.zeros(classes)
        self.totals = torch.zeros(classes, c, dtype=torch.float64)
        self.squares = torch.zeros(c, dtype=torch.float64)
        self.lowest, self.highest = torch.full((c,), torch.inf), torch.full((c,), -torch.inf)
        self.ends = 0

    def take(self, weights: Tensor) -> None:
        """Add the weights (N, C) of images whose labels are ``labels``."""
        weights = weights.double().cpu()
        labels = self.labels.cpu()
        self.counts.index_add_(0, labels, torch.ones(len(labels)))
        self.totals.index_add_(0, labels, weights)
        self.squares += weights.square().sum(0)
        if len(weights):
            self.lowest = torch.minimum(self.lowest, weights.amin(0).float())
            self.highest = torch.maximum(self.highest, weights.amax(0).float())
        self.ends += int(((weights < NEAR * self.gain) | (weights > (1 - NEAR) * self.gain)).sum())

    def record(self, name: str) -> GateRecord:
        """What the sums come to."""
        n = int(self.counts.sum())
        if not n:
            raise ConfigError("there are no images to inspect")
        mean = self.totals.sum(0) / n
        variance = (self.squares / n - mean.square()).clamp(min=0)
        return GateRecord(
            name=name,
            gain=self.gain,
            counts=self.counts.long(),
            class_means=(self.totals / self.counts[:, None]).float(),
            mean=mean.float(),
            deviation=variance.sqrt().float(),
            lowest=self.lowest,
            highest=self.highest,
            saturated=self.ends / (n * len(mean)),
            kernel=self.gate.conv.weight.detach().flatten().cpu() if isinstance(self.gate, ECA) else None,
        )
