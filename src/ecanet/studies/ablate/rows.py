"""The rows of an ablation: variants of one network, with those that come to the same network merged."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ecanet import data
from ecanet.attention import ECA, ECANS, SEGC, Attention, SEVar2, SEVar3
from ecanet.errors import ConfigError
from ecanet.models import LAYERS, create_model
from ecanet.recipes import ModelConfig, Recipe, suggestion
from ecanet.studies.cost import Cost, count

LARGER = {
    "resnet8": "resnet14",
    "resnet14": "resnet20",
    "resnet20": "resnet56",
    "resnet18": "resnet34",
    "resnet34": "resnet50",
    "resnet50": "resnet101",
    "resnet101": "resnet152",
}
"""The plain network to compare with: what more depth instead of attention gives."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "eca-k1": ("eca", {"kernel_size": 1}),
    "eca-k3": ("eca", {"kernel_size": 3}),
    "eca-k5": ("eca", {"kernel_size": 5}),
    "eca-k7": ("eca", {"kernel_size": 7}),
    "eca-k9": ("eca", {"kernel_size": 9}),
    "eca-adaptive": ("eca", {}),
    "eca-circular": ("eca", {"padding_mode": "circular"}),
    "eca-ns": ("eca-ns", {}),
    "se": ("se", {"reduction": 16}),
    "se-var1": ("se-var1", {}),
    "se-var2": ("se-var2", {}),
    "se-var3": ("se-var3", {}),
    "se-gc": ("se-gc", {"groups": 16}),
    "cbam": ("cbam", {"reduction": 16}),
    "gc": ("gc", {"reduction": 16}),
    "bigger": ("none", {}),
}
"""Each variant's attention and options; 16 becomes 4 in small-image networks, whose stages have 16 to 64 channels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row: its network, what that costs, and the other names it goes by."""

    name: str
    model: ModelConfig
    cost: Cost
    same_as: tuple[str, ...] = ()


def plan(recipe: Recipe, names: Iterable[str], say: Callable[[str], None] = print) -> list[Variant]:
    """The variants called ``names`` of the recipe's network, "none" first; those of the same network are merged.

    Raises:
        ConfigError: there is no variant of this name, or the network has none.
    """
    spec = data.build(recipe.data, train=False).spec
    size = (spec.channels, spec.size, spec.size)
    merged: dict[str, Variant] = {}
    chosen = [name.strip() for name in names]
    for name in chosen:
        if name not in VARIANTS:
            raise ConfigError(f"there is no variant {name!r}; {suggestion(name, list(VARIANTS))}")
    # in the order of the table, so that a row has one name whatever else is asked for
    for name in dict.fromkeys(["none", *sorted(chosen, key=list(VARIANTS).index)]):
        model = _model(recipe.model, name)
        with torch.device("meta"):
            network = create_model(
                model.name,
                attention=model.attention,
                kernel_sizes=model.kernel_sizes,
                num_classes=len(spec.class_names),
                in_channels=spec.channels,
                **model.options,
            )
        form = form_of(network)
        if form in merged:
            kept = merged[form]
            merged[form] = Variant(name=kept.name, model=kept.model, cost=kept.cost, same_as=(*kept.same_as, name))
            say(f"{name} is the same network as {kept.name} here: one row")
        else:
            merged[form] = Variant(name=name, model=model, cost=count(network, size))
    return list(merged.values())


def _model(base: ModelConfig, name: str) -> ModelConfig:
    attention, options = VARIANTS[name]
    small = base.name in LAYERS and len(LAYERS[base.name][1]) == 3
    options = {key: 4 if small and value == 16 else value for key, value in options.items()}
    kernel_size = options.pop("kernel_size", None)
    stages = len(LAYERS[base.name][1]) if base.name in LAYERS else 7
    network = base.name
    if name == "bigger":
        if base.name not in LARGER:
            raise ConfigError(f"no bigger network is known for {base.name!r}; leave out the variant 'bigger'")
        network = LARGER[base.name]
    kernel_sizes = (
        (kernel_size,) * stages if kernel_size else "adaptive" if attention in ("eca", "eca-ns") else "official"
    )
    return base.but(name=network, attention=attention, kernel_sizes=kernel_sizes, options=options)


def form_of(network: nn.Module) -> str:
    """A text that two networks share when they compute the same functions of equally many parameters.

    >>> form_of(SEGC(16, groups=16)) == form_of(SEVar2(16)), form_of(ECA(32)) == form_of(ECA(32, 3))
    (True, True)
    """
    lines, inside = [], None
    for name, module in network.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, Attention):
            inside = f"{name}." if name else ""
            place = name.rpartition(".")[0]  # a gate's own name says what it is: not here
            lines.append(f"{place}: {_form_of_gate(module)}")
        elif not any(True for _ in module.children()) and not isinstance(module, nn.Identity):
            lines.append(f"{name}: {module}")
    return "\n".join(lines)


def _form_of_gate(gate: Attention) -> str:
    c = gate.channels
    match gate:
        case ECA() if gate.kernel_size == 1:
            return f"one weight for {c} channels"
        case SEVar2() | ECANS(kernel_size=1):
            return f"a weight for each of {c} channels"
        case SEGC() if len(gate.weight) == c:
            return f"a weight for each of {c} channels"
        case SEVar3():
            return f"a full matrix of {c} channels"
        case SEGC() if len(gate.weight) == 1:
            return f"a full matrix of {c} channels"
        case SEGC():
            return f"{len(gate.weight)} blocks of {c} channels"
        case _:
            return str(gate)
