"""The attention slot of a network: which gate a block of a given stage and width holds, and under which key."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ecanet.attention import AttentionKind, find_attention
from ecanet.errors import ConfigError
from ecanet.models.kernel_sizes import KernelSizes, Release, check_no_kernel_sizes, resolve_kernel_sizes


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The attention that every block of one network holds at the end of its residual branch."""

    kind: AttentionKind = field(default_factory=lambda: find_attention("none"))
    kernel_sizes: tuple[int | None, ...] | None = None
    """Kernel size of each stage, None for the attention's own rule; None as a whole if it has no kernel."""
    options: Mapping[str, object] = field(default_factory=dict[str, object])

    @property
    def name(self) -> str:
        """Name of the attention, as ``attention=`` takes it."""
        return self.kind.name

    @property
    def key(self) -> str:
        """Attribute, and state-dict key, of the gate inside a block."""
        return self.kind.key

    def build(self, channels: int, stage: int) -> nn.Module:
        """Build the gate of a block with ``channels`` output channels in ``stage``, counted from 0."""
        options = dict(self.options)
        size = None if self.kernel_sizes is None else self.kernel_sizes[stage]
        if size is not None:
            options["kernel_size"] = size
        return self.kind.build(channels, **options)


def make_slot(
    kind: AttentionKind,
    kernel_sizes: KernelSizes,
    stages: int,
    release: Release | None,
    options: Mapping[str, object],
) -> Slot:
    """Return the slot for ``kind`` in a network of ``stages`` stages; ``release`` has its official kernel sizes.

    Raises:
        ConfigError: ``kernel_sizes`` does not fit the network, or the attention has no kernel.
    """
    if "kernel_size" not in kind.options:
        check_no_kernel_sizes(kind, kernel_sizes)
        return Slot(kind=kind, options=options)
    if "kernel_size" in options:
        raise ConfigError("in a network give kernel_sizes=, one integer per stage (or one for all), not kernel_size=")
    return Slot(kind=kind, kernel_sizes=resolve_kernel_sizes(kernel_sizes, stages, release), options=options)
