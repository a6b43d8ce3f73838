"""The attention slot of a network: which gate a block of a given stage and width holds, and under which key."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

from torch import nn

from ecanet.attention import attention_key, make_attention, options_of
from ecanet.errors import ConfigError, check_positive_int

KernelSizes = str | int | Sequence[int]
KernelRule = Callable[[int, int], int | None]
"""Maps (channels, stage) to a kernel size; None means the adaptive rule on the channels."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What every block of one network puts at the end of its residual branch."""

    name: str = "none"
    kernel_rule: KernelRule | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Attribute, and state-dict key, of the gate inside a block."""
        return attention_key(self.name)

    def build(self, channels: int, stage: int) -> nn.Module:
        """The gate of a block with ``channels`` outputs in ``stage`` (counted from 0)."""
        options = dict(self.options)
        if self.kernel_rule is not None:
            options["kernel_size"] = self.kernel_rule(channels, stage)
        return make_attention(self.name, channels, **options)


def slot(
    attention: str, kernel_sizes: KernelSizes, stages: int, official: KernelRule | None, options: dict[str, object]
) -> Slot:
    """The slot for ``attention`` in a network of ``stages`` stages whose released kernel sizes are ``official``.

    Raises:
        ConfigError: ``kernel_sizes`` does not fit the network, or the attention has no kernel.
    """
    takes_kernel = "kernel_size" in options_of(attention)
    if not takes_kernel:
        if kernel_sizes not in ("official", "adaptive"):
            raise ConfigError(f"attention {attention!r} has no kernel, so kernel_sizes={kernel_sizes!r} means nothing")
        return Slot(name=attention, options=options)
    if "kernel_size" in options:
        raise ConfigError("in a network give kernel_sizes=, one integer per stage (or one for all), not kernel_size=")
    return Slot(name=attention, kernel_rule=kernel_rule(kernel_sizes, stages, official), options=options)


def kernel_rule(kernel_sizes: KernelSizes, stages: int, official: KernelRule | None) -> KernelRule:
    """The rule that ``kernel_sizes`` means: "official", "adaptive", one integer, or one integer per stage.

    >>> kernel_rule((3, 5, 5, 7), 4, None)(512, 1)
    5

    Raises:
        ConfigError: it is none of these, or the count of integers is not the count of stages.
    """
    if kernel_sizes == "adaptive" or (kernel_sizes == "official" and official is None):
        return lambda channels, stage: None
    if kernel_sizes == "official" and official is not None:
        return official
    if isinstance(kernel_sizes, str) or not isinstance(kernel_sizes, Integral | Sequence):
        raise ConfigError(f"kernel_sizes must be 'official', 'adaptive' or integers, got {kernel_sizes!r}")
    given = kernel_sizes if isinstance(kernel_sizes, Sequence) else [kernel_sizes] * stages
    sizes = [check_positive_int("each of kernel_sizes", size) for size in given]
    if len(sizes) != stages:
        raise ConfigError(f"kernel_sizes needs one integer per stage ({stages}), got {len(sizes)}: {sizes}")
    return lambda channels, stage: sizes[stage]
