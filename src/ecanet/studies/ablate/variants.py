"""Variants of one network, and a test that finds the variants that are the same network."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from ecanet import data, training
from ecanet.attention import ECA, ECANS, SEGC, Attention, SEVar2, SEVar3
from ecanet.data import DataSpec
from ecanet.errors import ConfigError
from ecanet.models import DETECTORS, LAYERS
from ecanet.networks import build, find, is_ours
from ecanet.recipes import ModelConfig, Recipe, suggestion
from ecanet.studies.ablate.controls import choose_larger
from ecanet.studies.cost import Cost, count

__all__ = ["VARIANTS", "NeutralECA", "Variant", "describe_form", "name_network", "plan"]


class NeutralECA(ECA):
    """ECA whose gates begin as the identity, in the form that `ecanet.attach` inserts: 2 · sigmoid(0 · p) = 1.

    The paper's gates begin near sigmoid(0) = 1/2, which halves each branch. The two show whether that costs accuracy
    in short runs.
    """

    def __init__(self, channels: int, kernel_size: int | None = None):
        super().__init__(channels, kernel_size)
        self.neutralize()


VARIANTS: dict[str, tuple[str, dict[str, int | str]]] = {
    "none": ("none", {}),
    "eca-k1": ("eca", {"kernel_size": 1}),
    "eca-k3": ("eca", {"kernel_size": 3}),
    "eca-k5": ("eca", {"kernel_size": 5}),
    "eca-k7": ("eca", {"kernel_size": 7}),
    "eca-k9": ("eca", {"kernel_size": 9}),
    "eca-adaptive": ("eca", {}),
    "eca-random": ("eca", {"preserve": False}),
    "eca-circular": ("eca", {"padding_mode": "circular"}),
    "eca-neutral": (f"{__name__}.NeutralECA", {}),
    "eca-ns": ("eca-ns", {}),
    "se": ("se", {"reduction": 16}),
    "se-var1": ("se-var1", {}),
    "se-var2": ("se-var2", {}),
    "se-var3": ("se-var3", {}),
    "se-gc": ("se-gc", {"groups": 16}),
    "cbam": ("cbam", {"reduction": 16}),
    "gc": ("gc", {"reduction": 16}),
    "asr": ("asr", {"reduction": 16}),
    "ese": ("ese", {}),
    "gct": ("gct", {}),
    "srm": ("srm", {}),
    "fca": ("fca", {"reduction": 16}),
    "simam": ("simam", {}),
    "coord": ("coord", {}),
    "ela": ("ela", {}),
    "ema": ("ema", {}),
    "larger": ("none", {}),
}
"""The attention of each variant and its options.

With pretrained weights all gates begin neutral, except those of ``eca-random``.
"""

MEANT = {"eca": "eca-adaptive", "bigger": "larger", "plain": "none"}
"""What is meant by names that one could expect among the variants, and that are not spelled like any of them."""

SMALL_DIVISOR = 4
"""Replaces a reduction or group count of 16 in small-image networks, whose stages have 16 to 64 channels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One variant: the recipe of its runs, its network's cost, and the names of variants that are the same network.

    ``origin`` says how the network of the variant "larger" was chosen; it is empty for this library's own.
    """

    name: str
    recipe: Recipe
    cost: Cost
    same_as: tuple[str, ...] = ()
    origin: str = ""

    @property
    def model(self) -> ModelConfig:
        """The network and its attention."""
        return self.recipe.model

    @property
    def label(self) -> str:
        """The name, with the network in the two rows without attention."""
        network = name_network(self.recipe)
        if self.name == "none":
            return f"none (plain {network})"
        how = f": {self.origin}" if self.origin else ""
        return f"larger (plain {network}, control{how})" if self.name == "larger" else self.name


def name_network(recipe: Recipe) -> str:
    """Return the name of the network of ``recipe``; a detector of this library with its backbone.

    >>> name_network(Recipe(model=ModelConfig(name="resnet18")))
    'resnet18'
    """
    has_backbone = recipe.task == "detection" and is_ours(recipe.model.name)
    return f"{recipe.model.name} over {recipe.detector.backbone}" if has_backbone else recipe.model.name


def plan(recipe: Recipe, names: Iterable[str], say: Callable[[str], None] = print) -> list[Variant]:
    """Return the plain network ("none", always included) and the variants called ``names``, in `VARIANTS`' order.

    Variants that build the same network are merged, and ``say`` is called with one line for each of them, and with
    what there is to say about the data's files. ``larger=NETWORK`` names the network of the variant "larger".

    Raises:
        ConfigError: a name is unknown, or the recipe's network has no such variant.
    """
    images = data.build(recipe.data, train=False)
    for line in images.notices:  # once for all runs
        say(line)
    chosen, named = _read_names(names)
    by_form: dict[str, Variant] = {}
    # The order of VARIANTS, so that merged variants always keep the same name, however they were listed.
    for name in dict.fromkeys(["none", *sorted(chosen, key=list(VARIANTS).index)]):
        arm, origin = _configure_larger(recipe, named) if name == "larger" else (_configure(recipe, name), "")
        network = _build(arm, images.spec)
        # With pretrained weights, the same network may begin in two ways.
        form = describe_form(network) + (f"preserve={arm.model.preserve}" if arm.model.weights else "")
        if form in by_form:
            kept = by_form[form]
            by_form[form] = replace(kept, same_as=(*kept.same_as, name))
            say(f"{name} is the same network as {kept.name} here: one row")
            continue
        cost = count(network, (images.spec.channels if is_ours(arm.model.name) else 3, *[images.spec.size] * 2))
        by_form[form] = Variant(name=name, recipe=arm, cost=cost, origin=origin)
    variants = list(by_form.values())
    _check_control(variants)
    return variants


def _read_names(names: Iterable[str]) -> tuple[list[str], str | None]:
    """Return the variants' names, and the network that ``larger=NETWORK`` names; None if no variant does.

    Raises:
        ConfigError: there is no such variant.
    """
    chosen: list[str] = []
    named = None
    for text in names:
        name, equals, network = text.strip().partition("=")
        if name not in VARIANTS:
            hint = f"did you mean {MEANT[name]!r}?" if name in MEANT else suggestion(name, list(VARIANTS))
            raise ConfigError(f"there is no variant {name!r}; {hint}")
        if equals and (name != "larger" or not network):
            raise ConfigError(f"{text.strip()}: only the larger control names a network: larger=timm:resnet50d")
        named = network or named
        chosen.append(name)
    return chosen, named


def _check_control(variants: list[Variant]) -> None:
    """Raise ConfigError if the larger control is not larger than the plain network."""
    plain = variants[0].cost
    for variant in variants:
        cost = variant.cost
        if variant.name == "larger" and cost.parameters <= plain.parameters and cost.macs <= plain.macs:
            raise ConfigError(
                f"larger={name_network(variant.recipe)} is not larger: {cost.parameters:,} parameters, and the plain "
                f"network has {plain.parameters:,}; name another one"
            )


def _build(recipe: Recipe, spec: DataSpec) -> nn.Module:
    """Return the network of ``recipe`` for data of this ``spec``, without its weights."""
    model, classes = recipe.model.but(weights=None), len(spec.class_names)
    if is_ours(model.name) and model.where is None:
        with torch.device("meta"):
            if recipe.task == "detection":
                return training.build_detector(recipe.but(model=model), spec).model
            gates = {"attention": model.attention, "kernel_sizes": model.kernel_sizes, **model.options}
            return find(model.name, num_classes=classes, in_channels=spec.channels, **gates)
    if recipe.task == "detection":
        return training.build_detector(recipe.but(model=model), spec).model
    return build(model, num_classes=classes, image=(spec.channels, spec.size, spec.size)).model


def _configure(recipe: Recipe, name: str) -> Recipe:
    """Return ``recipe`` with the attention of the variant ``name``."""
    attention, values = VARIANTS[name]
    base = recipe.model
    network = recipe.detector.backbone if recipe.task == "detection" and is_ours(base.name) else base.name
    is_small = network in LAYERS and len(LAYERS[network][1]) == 3
    options = {key: SMALL_DIVISOR if is_small and value == 16 else value for key, value in values.items()}
    kernel_sizes = options.pop("kernel_size", "adaptive")
    preserve = options.pop("preserve", base.preserve)
    changes: dict[str, object] = {"kernel_sizes": kernel_sizes, "preserve": preserve}
    if attention == "none":
        changes |= {"preserve": None, "where": None, "replace": None}
    return recipe.but(model=base.but(attention=attention, options=options, **changes))


def _configure_larger(recipe: Recipe, named: str | None) -> tuple[Recipe, str]:
    """Return ``recipe`` with a larger plain network, the one that is ``named``, and how the network was chosen.

    Of this library's detectors the backbone is exchanged.

    Raises:
        ConfigError: no larger network is known, or the weights are not for it.
    """
    plain = _configure(recipe, "larger")
    detects = recipe.task == "detection" and is_ours(recipe.model.name)
    network, origin = choose_larger(
        recipe.detector.backbone if detects else recipe.model.name, named, recipe.model.weights
    )
    if detects and is_ours(network) and network not in DETECTORS:
        return plain.but(detector=plain.detector.but(backbone=network)), origin
    return plain.but(model=plain.model.but(name=network)), origin


def describe_form(network: nn.Module) -> str:
    """Return a text that two networks share if they compute the same functions of equally many parameters.

    >>> describe_form(SEGC(16, groups=16)) == describe_form(SEVar2(16))
    True
    >>> describe_form(ECA(32)) == describe_form(ECA(32, 5))
    False
    """
    lines: list[str] = []
    inside_gate = None
    for name, module in cast(Iterable[tuple[str, nn.Module]], network.named_modules()):
        if inside_gate is not None and name.startswith(inside_gate):
            continue
        if isinstance(module, Attention):
            inside_gate = f"{name}." if name else ""
            # The last part of a gate's name is its class, which does not count here: only its block does.
            lines.append(f"{name.rpartition('.')[0]}: {_describe_gate(module)}")
        elif not list(module.children()) and not isinstance(module, nn.Identity):
            lines.append(f"{name}: {module}")
    return "\n".join(lines)


def _describe_gate(gate: Attention) -> str:
    """Return the form of a gate; gates of different classes have the same form where their formulas coincide."""
    channels = gate.channels
    match gate:
        case ECA(gain=1) if gate.kernel_size == 1:
            return f"one weight for {channels} channels"
        case SEVar2() | ECANS(kernel_size=1):
            return f"a weight for each of {channels} channels"
        case SEGC() if len(gate.weight) == channels:
            return f"a weight for each of {channels} channels"
        case SEVar3():
            return f"a full matrix of {channels} channels"
        case SEGC() if len(gate.weight) == 1:
            return f"a full matrix of {channels} channels"
        case SEGC():
            return f"{len(gate.weight)} blocks of {channels} channels"
        case _:
            return str(gate)
