"""Kernel sizes of ECA gates, stage by stage: the released checkpoints', the paper's rule, or the caller's.

`RELEASED` is the one table of the released sizes. `create_model` looks a network up in it by name, `ecanet.attach` by
the blocks and channels that it finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import cast

from ecanet.attention import AttentionKind
from ecanet.errors import ConfigError, check_positive_int

KernelSizes = str | int | Sequence[int]
"""``"adaptive"``, ``"official"``, one integer for all stages, or one integer per stage."""


@dataclass(frozen=True, slots=True)
class Release:
    """A network whose ECA checkpoint the authors released: its shape and its kernel sizes, stage by stage."""

    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    """Output channels of a block in each stage."""
    kernel_sizes: tuple[int, ...]


_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)

RELEASED: dict[str, Release] = {
    "resnet18": Release((2, 2, 2, 2), _BASIC, (3, 5, 7, 7)),
    "resnet34": Release((3, 4, 6, 3), _BASIC, (3, 3, 5, 7)),
    "resnet50": Release((3, 4, 6, 3), _BOTTLENECK, (3, 5, 5, 7)),
    "resnet101": Release((3, 4, 23, 3), _BOTTLENECK, (3, 3, 5, 7)),
    "resnet152": Release((3, 8, 36, 3), _BOTTLENECK, (3, 3, 5, 7)),
    # MobileNetV2's code says: 1 below 96 channels, else 3
    "mobilenet_v2": Release((1, 2, 3, 4, 3, 3, 1), (16, 24, 32, 64, 96, 160, 320), (1, 1, 1, 1, 3, 3, 3)),
}
"""Networks with a released ECA checkpoint. No formula gives the kernel sizes of the ResNets."""


def find_release(blocks: Sequence[int], channels: Sequence[int]) -> Release | None:
    """Return the released network with these blocks and output channels per stage, or None.

    >>> find_release((3, 4, 6, 3), (256, 512, 1024, 2048)).kernel_sizes
    (3, 5, 5, 7)
    """
    shape = (tuple(blocks), tuple(channels))
    return next((release for release in RELEASED.values() if (release.blocks, release.channels) == shape), None)


def check_no_kernel_sizes(kind: AttentionKind, kernel_sizes: KernelSizes) -> None:
    """Check that no sizes are given for ``kind``, which has no kernel.

    Raises:
        ConfigError: ``kernel_sizes`` is neither "adaptive" nor "official".
    """
    if kernel_sizes not in ("adaptive", "official"):
        raise ConfigError(
            f"attention {kind.name!r} has no kernel, so kernel_sizes={kernel_sizes!r} has no effect; leave it out"
        )


def resolve_kernel_sizes(kernel_sizes: KernelSizes, stages: int, release: Release | None) -> tuple[int | None, ...]:
    """Return the kernel size of each of ``stages`` stages; None stands for Eq. 12 on a block's output channels.

    "official" means the sizes of ``release``, and Eq. 12 for a network without one.

    >>> resolve_kernel_sizes("adaptive", 4, None), resolve_kernel_sizes((3, 5, 5, 7), 4, None)
    ((None, None, None, None), (3, 5, 5, 7))

    Raises:
        ConfigError: ``kernel_sizes`` is neither "adaptive", "official" nor integers, or their count is not ``stages``.
    """
    if kernel_sizes == "official" and release is not None:
        return release.kernel_sizes
    if kernel_sizes in ("adaptive", "official"):
        return (None,) * stages
    if isinstance(kernel_sizes, str) or not isinstance(cast(object, kernel_sizes), Integral | Sequence):
        raise ConfigError(f"kernel_sizes must be 'official', 'adaptive' or integers, got {kernel_sizes!r}")
    given = kernel_sizes if isinstance(kernel_sizes, Sequence) else [kernel_sizes] * stages
    sizes = tuple(check_positive_int("each of kernel_sizes", size) for size in given)
    if len(sizes) != stages:
        raise ConfigError(f"kernel_sizes needs one integer per stage ({stages}), got {len(sizes)}: {list(sizes)}")
    return sizes
