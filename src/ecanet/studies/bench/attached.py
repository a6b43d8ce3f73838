"""Time any network plain and with attention, in turns, after each has passed its checks."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from ecanet import networks
from ecanet.attention import find_attention
from ecanet.errors import ConfigError, EcanetError, summarize
from ecanet.models import DETECTORS, is_detector
from ecanet.studies.bench import timing
from ecanet.studies.bench.arms import Arms, build_arms, check_arms, create
from ecanet.studies.bench.check import check_compiler
from ecanet.studies.bench.machine import describe_environment
from ecanet.studies.bench.measure import Budget
from ecanet.studies.bench.networks import compile_networks, make_eval_step, make_images, move_to_device
from ecanet.studies.bench.rows import Result

__all__ = ["run_model"]

DETECTOR_SIDE = 800
"""The short side in pixels to which this library's detectors resize an image."""


def run_model(
    model: str,
    attentions: Sequence[str] = ("eca",),
    *,
    device: str = "cpu",
    quick: bool = False,
    compiled: bool | None = None,
    batch_sizes: Sequence[int] | None = None,
    image_size: int | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Check and time the network called ``model`` without attention and with each of ``attentions``.

    This library's networks have their gates built in, other networks have them attached. Gates begin as the identity
    where they can, so that the check can compare outputs; their values do not change how long they take.

    Args:
        model: Name of the network: NAME, timm:NAME, torchvision:NAME or FILE.py:FACTORY; detectors too.
        attentions: Names of the attentions.
        device: As for `run`.
        quick: Whether to use one batch size and fewer rounds.
        compiled: Whether to add the compiled networks (default: unless ``quick``; a detector never is).
        batch_sizes: As for `run`.
        image_size: Height and width of the images in pixels (default: what the network is made for).
        say: Function that receives each line of progress.

    Returns:
        As `run` does, without block tails: the rows of the networks, and the ratios of each to the plain one.

    Raises:
        ConfigError: a name does not exist, the network does not run at a size, or see `run`.
        AttachError: there is no place for gates.
    """
    started = time.perf_counter()
    device = timing.select_device(device)
    sizes = timing.check_batch_sizes(batch_sizes or timing.BATCH_SIZES.get((device, quick), ()))
    attentions = check_attentions(attentions)
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    plain = create(model, "none", image_size)
    compiled = choose_compiling(compiled, quick=quick, detects=is_detector(plain))
    channels, side = find_image(model, image_size)
    with explain_failures(model, 2, side):
        images = make_images(2, side, "cpu", channels)
        make_eval_step(plain.eval(), images)()
    build_ours = partial(create, model, side=image_size) if networks.is_ours(model) else None
    arms = build_arms(plain, attentions, images, build_ours, say)
    with explain_failures(model, 2, side):
        arms.trained = {name: move_to_device(network, device) for name, network in arms.trained.items()}
        images = images.to(device)
        checks = check_arms(arms, images, say)
        variants = make_variants(arms, compiled=compiled)
        counts = timing.count_traffic(variants, images)
    budgets = scale_budgets(timing.QUICK if quick else timing.FULL, len(arms.trained))
    minutes = len(sizes) * sum(budget.seconds for budget in budgets.values()) / 60
    say(f"{len(checks)} checks passed; timing for about {max(1, round(minutes))} min")
    environment = {**describe_environment(device, model, side), "attention": list(arms.trained)[1:]}
    result = timing.make_result(environment, checks)
    for size in sizes:
        with explain_failures(model, size, side):
            images = make_images(size, side, device, channels)
            timing.add_compiled_checks(variants, images, result, say)
            timing.time_networks(variants, images, budgets, counts, result)
    result["seconds"] = time.perf_counter() - started
    return result


def check_attentions(attentions: Sequence[str]) -> list[str]:
    """Return each of the names once.

    Raises:
        ConfigError: one does not exist, or there is none.
    """
    names = [name for name in dict.fromkeys(attentions) if name != "none"]
    for name in names:
        find_attention(name)
    if not names:
        raise ConfigError("give at least one attention to compare with the plain network, such as --attention eca,se")
    return names


def find_image(model: str, side: int | None) -> tuple[int, int]:
    """Return the channels and the side in pixels of the images for the network called ``model``."""
    channels, usual, _ = (3, DETECTOR_SIDE, 0) if model in DETECTORS else networks.image_size(model)
    return channels, usual if side is None else side


def choose_compiling(compiled: bool | None, *, quick: bool, detects: bool) -> bool:
    """Return whether compiled networks are timed, too.

    Raises:
        ConfigError: they are asked for, and the network is a detector or the compiler does not work.
    """
    if compiled and detects:
        raise ConfigError("a detector is no single graph, so its compiled form is not timed: leave --compile out")
    chosen = not (quick or detects) if compiled is None else compiled
    if chosen:
        check_compiler()
    return chosen


def scale_budgets(budgets: Mapping[str, Budget], arms: int) -> dict[str, Budget]:
    """Return ``budgets`` with as much time for each of the ``arms`` as the whole benchmark has for each network."""
    networks_of_run = 5
    return {
        phase: replace(budgets[phase], seconds=budgets[phase].seconds * arms / networks_of_run)
        for phase in ("training", "inference")
    }


def make_variants(arms: Arms, *, compiled: bool) -> timing.Variants:
    """Return the networks that are timed, and the pairs whose times are divided."""
    fast = compile_networks(arms.trained | arms.optimized) if compiled else {}
    others = list(arms.trained)[1:]
    pairs = [(name, "plain") for name in others]
    pairs += [(f"optimized {name}", "optimized plain") for name in others]
    pairs += [(name, name.removeprefix("optimized ")) for name in arms.optimized]
    return timing.Variants(trained=arms.trained, optimized=arms.optimized, compiled=fast, pairs=tuple(pairs))


@contextmanager
def explain_failures(model: str, batch_size: int, side: int) -> Generator[None]:
    """Turn errors of the network's own code, and of too little memory, into one line.

    Raises:
        ConfigError: the network does not run.
    """
    try:
        yield
    except EcanetError:
        raise
    except Exception as error:  # a network may raise anything
        raise ConfigError(
            f"{model} does not run on {batch_size} images of {side} pixels ({summarize(error)}); choose another "
            f"--batch-size or --image-size"
        ) from error
