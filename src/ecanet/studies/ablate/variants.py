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
from ecanet.models import LAYERS
from ecanet.networks import find, is_ours
from ecanet.recipes import ModelConfig, Recipe, suggestion
from ecanet.studies.cost import Cost, count

__all__ = ["VARIANTS", "NeutralECA", "Variant", "describe_form", "plan"]

LARGER = {
    "resnet8": "resnet14",
    "resnet14": "resnet20",
    "resnet20": "resnet56",
    "resnet18": "resnet34",
    "resnet34": "resnet50",
    "resnet50": "resnet101",
    "resnet101": "resnet152",
}
"""The larger plain network that serves as a control: it shows the gain of more layers instead of attention."""


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

SMALL_DIVISOR = 4
"""Replaces a reduction or group count of 16 in small-image networks, whose stages have 16 to 64 channels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One variant: its network, the network's cost, and the names of other variants that are the same network."""

    name: str
    model: ModelConfig
    cost: Cost
    same_as: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, with the network in the two rows without attention."""
        if self.name == "none":
            return f"none (plain {self.model.name})"
        return f"larger (plain {self.model.name}, control)" if self.name == "larger" else self.name


def plan(recipe: Recipe, names: Iterable[str], say: Callable[[str], None] = print) -> list[Variant]:
    """Return the plain network ("none", always included) and the variants called ``names``, in `VARIANTS`' order.

    Variants that build the same network are merged, and ``say`` is called with one line for each of them, and with
    what there is to say about the data's files.

    Raises:
        ConfigError: a name is unknown, or the recipe's network has no such variant.
    """
    images = data.build(recipe.data, train=False)
    for line in images.notices:  # once for all runs
        say(line)
    spec = images.spec
    channels = spec.channels if is_ours(recipe.model.name) else 3
    size = (channels, spec.size, spec.size)
    chosen = [name.strip() for name in names]
    for name in chosen:
        if name not in VARIANTS:
            raise ConfigError(f"there is no variant {name!r}; {suggestion(name, list(VARIANTS))}")
    by_form: dict[str, Variant] = {}
    # The order of VARIANTS, so that merged variants always keep the same name, however they were listed.
    for name in dict.fromkeys(["none", *sorted(chosen, key=list(VARIANTS).index)]):
        model = _configure(recipe.model, name)
        network = _build(model, spec)
        # With pretrained weights, the same network may begin in two ways.
        form = describe_form(network) + (f"preserve={model.preserve}" if model.weights else "")
        if form in by_form:
            kept = by_form[form]
            by_form[form] = replace(kept, same_as=(*kept.same_as, name))
            say(f"{name} is the same network as {kept.name} here: one row")
        else:
            by_form[form] = Variant(name=name, model=model, cost=count(network, size))
    return list(by_form.values())


def _build(model: ModelConfig, spec: DataSpec) -> nn.Module:
    """Return the network of ``model`` for data of this ``spec``, without its weights."""
    classes = len(spec.class_names)
    if not is_ours(model.name) or model.where is not None:
        return training.build(
            model.but(weights=None), num_classes=classes, image=(spec.channels, spec.size, spec.size)
        ).model
    gates = {"attention": model.attention, "kernel_sizes": model.kernel_sizes, **model.options}
    with torch.device("meta"):
        return find(model.name, num_classes=classes, in_channels=spec.channels, **gates)


def _configure(base: ModelConfig, name: str) -> ModelConfig:
    """Return the configuration of variant ``name`` of the network ``base``."""
    attention, values = VARIANTS[name]
    network = base.name
    if name == "larger":
        if base.name not in LARGER:
            raise ConfigError(f"no larger network is known for {base.name!r}; leave out the variant 'larger'")
        network = LARGER[base.name]
    is_small = base.name in LAYERS and len(LAYERS[base.name][1]) == 3
    options = {key: SMALL_DIVISOR if is_small and value == 16 else value for key, value in values.items()}
    kernel_sizes = options.pop("kernel_size", "adaptive")
    preserve = options.pop("preserve", base.preserve)
    changes: dict[str, object] = {"kernel_sizes": kernel_sizes, "preserve": preserve}
    if attention == "none":
        changes |= {"preserve": None, "where": None, "replace": None}
    return base.but(name=network, attention=attention, options=options, **changes)


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
