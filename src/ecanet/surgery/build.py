"""Build the gates of the sites: their kernel sizes and options, their neutral form, and a trial of your own classes."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ecanet.attention import Attention, AttentionKind
from ecanet.errors import AttachError, ConfigError, summarize
from ecanet.models import KernelSizes, check_no_kernel_sizes, find_release, resolve_kernel_sizes
from ecanet.surgery.placing import Site


def check_kernel_options(kind: AttentionKind, kernel_sizes: KernelSizes, options: Mapping[str, object]) -> None:
    """Check that kernel sizes are given only where there are kernels, and only once.

    Raises:
        ConfigError: the attention has no kernel, or both ``kernel_sizes`` and ``kernel_size`` are given.
    """
    if "kernel_size" not in kind.options:
        check_no_kernel_sizes(kind, kernel_sizes)
    elif kernel_sizes != "adaptive" and "kernel_size" in options:
        raise ConfigError("give kernel_sizes= (per stage) or kernel_size= (for all), not both")


@contextmanager
def isolate_building(model: nn.Module) -> Generator[None]:
    """Run the body, which builds gates for ``model``, so that only the gates remain of it.

    Random states are restored; the gates' first values follow from them. The gates are built on the CPU: the default
    device may be "meta", or draw other numbers.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    fork = torch.random.fork_rng(devices=list(devices))  # pyright: ignore
    with torch.device("cpu"), fork:
        yield


def build_gates(
    kind: AttentionKind,
    sites: Sequence[Site],
    kernel_sizes: KernelSizes,
    options: Mapping[str, object],
    *,
    lossless: bool,
) -> list[nn.Module]:
    """Build one gate for each site, neutral if ``lossless``.

    Raises:
        AttachError: the attention cannot be neutral, or does not keep the shape of its input.
        ConfigError: an option does not fit the channels of a site.
    """
    sizes = choose_kernel_sizes(sites, kernel_sizes) if "kernel_size" in kind.options else [None] * len(sites)
    gates: list[nn.Module] = []
    for site, size in zip(sites, sizes, strict=True):
        gate = kind.build(site.channels, **(options if size is None else {**options, "kernel_size": size}))
        if lossless:
            neutralize(gate, kind)
        if not kind.is_builtin:
            try_gate(gate, kind, site, lossless=lossless)
        gates.append(gate)
    return gates


def neutralize(gate: nn.Module, kind: AttentionKind) -> None:
    """Make ``gate`` the identity.

    Raises:
        AttachError: it cannot be.
    """
    if not isinstance(gate, Attention):
        raise AttachError(
            f"attention {kind.name!r} is a {type(gate).__name__}, no ecanet.ChannelAttention that can be made neutral, "
            f"so outputs would change; pass preserve=False to allow that"
        )
    gate.neutralize()


def try_gate(gate: nn.Module, kind: AttentionKind, site: Site, *, lossless: bool) -> None:
    """Run a gate of the user's own class once, on noise of the shape that the site has.

    Raises:
        AttachError: it cannot run, changes the shape, or changes the values though it should be neutral.
    """
    device = next((p.device for p in gate.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, site.channels, *site.shape), generator=generator, device="cpu").to(device)
    modes = [(module, module.training) for module in gate.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
            y: object = gate.eval()(x)
    except Exception as error:  # a user's forward may raise anything
        reason = summarize(error)
        raise AttachError(f"attention {kind.name!r} does not run on shape {tuple(x.shape)}: {reason}") from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        returned = f"shape {tuple(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
        raise AttachError(f"attention {kind.name!r} must keep the shape {tuple(x.shape)}, but returns {returned}")
    if lossless and not torch.equal(y, x):
        raise AttachError(
            f"attention {kind.name!r} changes its input after neutralize(), by up to {float((y - x).abs().max()):.3g}; "
            f"its last_parameters() must give a gate of sigmoid(0) when zero; or pass preserve=False"
        )


def choose_kernel_sizes(sites: Sequence[Site], kernel_sizes: KernelSizes) -> list[int | None]:
    """Return a kernel size for each site; None stands for the attention's own rule, in ECA Eq. 12 on its channels.

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
