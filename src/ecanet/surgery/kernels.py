"""Kernel sizes per stage: the released checkpoints', the paper's rule, or the caller's."""

from collections.abc import Sequence

from ecanet.errors import ConfigError
from ecanet.surgery.sites import Site

OFFICIAL: dict[tuple[int, ...], tuple[int, ...]] = {
    (2, 2, 2, 2): (3, 5, 7, 7),
    (3, 4, 6, 3): (3, 5, 5, 7),
    (3, 4, 23, 3): (3, 3, 5, 7),
    (3, 8, 36, 3): (3, 3, 5, 7),
}
"""Released kernel sizes of ResNets by their blocks per stage; ResNet-34 shares ResNet-50's depths."""

OFFICIAL_34 = (3, 3, 5, 7)

MOBILENET_V2 = (16, *[24] * 2, *[32] * 3, *[64] * 4, *[96] * 3, *[160] * 3, 320)
"""Output channels of MobileNetV2's blocks."""


def kernel_sizes_at(sites: Sequence[Site], kernel_sizes: str | int | Sequence[int] | None) -> list[int | None]:
    """A kernel size for each site; None means the paper's rule on its channels.

    ``kernel_sizes`` is "official" (the released checkpoints'; the rule where there is none), "adaptive" or None (the
    rule), one integer, or one integer per stage.

    Raises:
        ConfigError: it is none of these, or the count of integers is not the count of stages.
    """
    stages = stages_of(sites)
    if kernel_sizes is None or kernel_sizes == "adaptive":
        return [None] * len(sites)
    if kernel_sizes == "official":
        return official_at(sites, stages)
    if isinstance(kernel_sizes, str) or not isinstance(kernel_sizes, int | Sequence):
        raise ConfigError(f"kernel_sizes must be 'official', 'adaptive' or integers, got {kernel_sizes!r}")
    count = stages[-1] + 1
    sizes = [kernel_sizes] * count if isinstance(kernel_sizes, int) else list(kernel_sizes)
    if len(sizes) != count:
        raise ConfigError(f"kernel_sizes needs one integer per stage ({count}), got {len(sizes)}: {sizes}")
    return [sizes[stage] for stage in stages]


def official_at(sites: Sequence[Site], stages: Sequence[int]) -> list[int | None]:
    """The released checkpoint's kernel sizes, where the sites look like one of its networks."""
    channels = tuple(site.channels for site in sites)
    if channels == MOBILENET_V2:
        return [1 if c < 96 else 3 for c in channels]
    depths = tuple(stages.count(stage) for stage in range(stages[-1] + 1))
    widths = tuple(channels[stages.index(stage)] for stage in range(stages[-1] + 1))
    if widths in ((64, 128, 256, 512), (256, 512, 1024, 2048)) and depths in OFFICIAL:
        basic = widths[0] == 64
        sizes = OFFICIAL_34 if basic and depths == (3, 4, 6, 3) else OFFICIAL[depths]
        return [sizes[stage] for stage in stages]
    return [None] * len(sites)


def stages_of(sites: Sequence[Site]) -> list[int]:
    """The stage of each site, counted from 0: a stage ends where channels or resolution change."""
    stages: list[int] = []
    for i, site in enumerate(sites):
        same = i > 0 and (site.channels, site.shape) == (sites[i - 1].channels, sites[i - 1].shape)
        stages.append(0 if i == 0 else stages[-1] + (not same))
    return stages
