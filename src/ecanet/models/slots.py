"""The attention slot of a network: which gate a block of a given stage and width holds, and under which key."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ecanet.attention import attention_key, make_attention, options_of
from ecanet.errors import ConfigError
from ecanet.models.kernel_sizes import KernelSizes, Release, resolve_kernel_sizes


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The attention that every block of one network holds at the end of its residual branch."""

    name: str = "none"
    kernel_sizes: tuple[int | None, ...] | None = None
    """Kernel size of each stage, None for Eq. 12; None as a whole for an attention without a kernel."""
    options: Mapping[str, object] = field(default_factory=dict[str, object])

    @property
    def key(self) -> str:
        """Attribute, and state-dict key, of the gate inside a block."""
        return attention_key(self.name)

    def build(self, channels: int, stage: int) -> nn.Module:
        """Build the gate of a block with ``channels`` output channels in ``stage``, counted from 0."""
        options = dict(self.options)
        if self.kernel_sizes is not None:
            options["kernel_size"] = self.kernel_sizes[stage]
        return make_attention(self.name, channels, **options)


def make_slot(
    attention: str, kernel_sizes: KernelSizes, stages: int, release: Release | None, options: Mapping[str, object]
) -> Slot:
    """Return the slot for ``attention`` in a network of ``stages`` stages; ``release`` has its official kernel sizes.

    Raises:
        ConfigError: ``kernel_sizes`` does not fit the network, or the attention has no kernel.
    """
    if "kernel_size" not in options_of(attention):
        if kernel_sizes not in ("official", "adaptive"):
            raise ConfigError(
                f"attention {attention!r} has no kernel, so kernel_sizes={kernel_sizes!r} has no effect; leave it out"
            )
        return Slot(name=attention, options=options)
    if "kernel_size" in options:
        raise ConfigError("in a network give kernel_sizes=, one integer per stage (or one for all), not kernel_size=")
    sizes = resolve_kernel_sizes(kernel_sizes, stages, release)
    return Slot(name=attention, kernel_sizes=sizes, options=options)
