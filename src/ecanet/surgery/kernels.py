"""Kernel sizes of new gates, from the stages that the sites form."""

from collections.abc import Sequence

from ecanet.models import KernelSizes, find_release, resolve_kernel_sizes
from ecanet.surgery.sites import Site


def kernel_sizes_at(sites: Sequence[Site], kernel_sizes: KernelSizes) -> list[int | None]:
    """Return a kernel size for each site; None stands for Eq. 12 on its channels.

    Raises:
        ConfigError: ``kernel_sizes`` is neither "adaptive", "official", one integer nor one integer per stage.
    """
    stages = find_stages(sites)
    count = stages[-1] + 1
    blocks = [stages.count(stage) for stage in range(count)]
    channels = [sites[stages.index(stage)].channels for stage in range(count)]
    sizes = resolve_kernel_sizes(kernel_sizes, count, find_release(blocks, channels))
    return [sizes[stage] for stage in stages]


def find_stages(sites: Sequence[Site]) -> list[int]:
    """Return the stage of each site, counted from 0: a stage ends where channels or resolution change."""
    stages: list[int] = []
    for i, site in enumerate(sites):
        same = i > 0 and (site.channels, site.shape) == (sites[i - 1].channels, sites[i - 1].shape)
        stages.append(0 if i == 0 else stages[-1] + (not same))
    return stages
