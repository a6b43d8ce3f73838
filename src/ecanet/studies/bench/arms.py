"""One network without attention and with each of some attentions: built, checked, and optimized."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ecanet import networks
from ecanet.attention import Attention, make_attention
from ecanet.errors import AttachError, ConfigError, EcanetError, check_positive_int
from ecanet.inference import optimize
from ecanet.models import DETECTORS, create_detector, is_detector, small_example
from ecanet.studies.bench.check import check_error
from ecanet.studies.bench.networks import list_outputs
from ecanet.studies.bench.rows import CheckRow
from ecanet.surgery import attach, attached
from ecanet.testing import measure_relative_error

ALLOWED = 1e-8
"""Allowed relative error in float64 of outputs that are computed in another order."""


@dataclass(kw_only=True)
class Arms:
    """One network without attention and with each of some attentions, with the same weights beside the gates."""

    trained: dict[str, nn.Module]
    """The networks by name: "plain", and each attention by its own."""
    allowed: dict[str, float] = field(default_factory=dict[str, float])
    """How far the outputs with an attention may be from the plain ones; nothing for one that changes outputs."""
    optimized: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    """The copies for inference, by name: "optimized plain" and so on."""


def create(model: str, attention: str, side: int | None = None) -> nn.Module:
    """Build the network called ``model``; ``attention`` is for this library's networks and detectors.

    A detector then resizes images to ``side`` pixels.

    Raises:
        ConfigError: there is no such network, or it does not take that side.
    """
    if side is not None:
        check_positive_int("--image-size", side)
    if model in DETECTORS:
        network = create_detector(model, attention=attention)
    else:
        network = networks.find(model, **({"attention": attention} if networks.is_ours(model) else {}))
    if side is not None and is_detector(network):
        resize_to(network, model, side)
    return network


def resize_to(detector: nn.Module, model: str, side: int) -> None:
    """Let ``detector``, which is called ``model``, resize images to ``side`` pixels instead of its own size.

    Raises:
        ConfigError: it resizes every image to one size, another than ``side``.
    """
    transform: Any = detector.get_submodule("transform")
    if transform.fixed_size is None:
        transform.min_size, transform.max_size = (side,), round(side * 5 / 3)
    elif set(transform.fixed_size) != {side}:
        fixed = transform.fixed_size[0]
        raise ConfigError(f"{model} resizes every image to {fixed} pixels: leave --image-size out, got {side}")


def build_arms(
    plain: nn.Module,
    attentions: Sequence[str],
    images: Tensor,
    build_ours: Callable[[str], nn.Module] | None,
    say: Callable[[str], None],
) -> Arms:
    """Return the network ``plain`` and the same with each attention, attached on ``images`` (N, C, H, W) or built in.

    ``build_ours`` builds it by this library with an attention; None where it comes from elsewhere. Say how many gates
    each has.
    """
    arms = Arms(trained={"plain": plain})
    for attention in attentions:
        is_neutral = can_be_neutral(attention)
        if build_ours is not None:
            network = build_ours(attention)
            is_same, allowed, lines = build_in(plain, network, neutralize=is_neutral), ALLOWED, ["built in"]
        else:
            network = copy.deepcopy(plain)
            small = small_example(network) if is_detector(network) else nullcontext(images)
            with small as inputs:
                attach(network, attention, example=inputs, preserve=None if is_neutral else False)
            is_same, allowed, lines = is_neutral, 0.0, ["attached"]
            lines += [f"left out: {name} ({why})" for name, why in attached(network).left_out]
        gates = sum(isinstance(module, Attention) for module in network.modules())
        say(f"{attention}: {gates} gates {'; '.join(lines)}")
        if is_same:
            arms.allowed[attention] = allowed
        else:
            say(f"{attention}: it cannot begin as the identity, so its outputs are not compared with the plain ones")
        arms.trained[attention] = network
    return arms


def build_in(plain: nn.Module, network: nn.Module, *, neutralize: bool) -> bool:
    """Give ``network`` the tensors of ``plain``, and make its gates the identity if ``neutralize``.

    Return whether the two are the same function now.
    """
    own, given = network.state_dict(), plain.state_dict()
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    network.load_state_dict(fitting, strict=False)
    for module in network.modules():
        if neutralize and isinstance(module, Attention):
            module.neutralize()
    return neutralize and len(fitting) == len(given)


def can_be_neutral(attention: str) -> bool:
    """Return whether ``attention`` can begin as the identity.

    >>> can_be_neutral("eca"), can_be_neutral("se-var1")
    (True, False)
    """
    gate = make_attention(attention, 64)
    try:
        cast(Any, gate).neutralize()
    except (AttachError, AttributeError):
        return False
    return True


def check_arms(arms: Arms, images: Tensor, say: Callable[[str], None]) -> list[CheckRow]:
    """Optimize the networks and check all outputs in evaluation against the plain ones', in float64.

    `ecanet.attach` has proven before that each gate acts as often as its place. Attached gates must give equal bits.

    Raises:
        ConfigError: an error is too large.
    """
    found: list[CheckRow] = []
    outputs = {name: compute_outputs(network, images) for name, network in arms.trained.items()}
    for name, allowed in arms.allowed.items():
        error = measure_relative_error(outputs[name], outputs["plain"])
        found.append(check_error(f"{name}: outputs in evaluation", error, allowed))
    for name, network in arms.trained.items():
        example = None if is_detector(network) else images  # which optimize makes small itself
        try:
            fast = optimize(network, example=example)
        except EcanetError as error:
            say(f"without optimized copies: {error}")
            break
        wide = optimize(copy.deepcopy(network).double(), example=None if example is None else images.double())
        error = measure_relative_error(compute_outputs(wide, images), outputs[name])
        found.append(check_error(f"optimized {name}: outputs", error, ALLOWED))
        arms.optimized[f"optimized {name}"] = fast
    return found


@torch.no_grad()
def compute_outputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the outputs of a copy of ``network`` in float64 and evaluation; a detector's are its backbone's features.

    A detector with random weights finds nothing, so that its detections would hide an error.
    """
    copied = copy.deepcopy(network).double().eval()
    features = copied.get_submodule("backbone") if is_detector(copied) else copied
    return list_outputs(features(images.double()))
