"""Group the parameters of a network for its optimizer: the gates apart from everything else."""

import math
from typing import cast

from torch import nn

from ecanet.attention import Attention
from ecanet.errors import ConfigError
from ecanet.surgery.gates import find_gates
from ecanet.surgery.modules import list_modules


def parameter_groups(
    model: nn.Module, lr: float, *, gate_lr: float | None = None, weight_decay: float | None = None
) -> list[dict[str, object]]:
    """Return the parameter groups of ``model`` for a `torch.optim` optimizer: the network first, then the gates.

    A gate that was attached losslessly starts as the identity and moves slowly at the low learning rates of
    fine-tuning. So the gates have a learning rate of their own, and no weight decay, which would pull them back to the
    identity. Each trainable parameter is in one group, once. A parameter that the network shares with a gate belongs to
    the network. Frozen parameters are left out, and so is a group without parameters.

    Args:
        model: a network with attached or built-in attention, or without any. Every attention module counts as a gate.
        lr: learning rate of the network.
        gate_lr: learning rate of the gates; None means ``10 * lr``.
        weight_decay: weight decay of the network; None leaves it to the optimizer. The gates have none.

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> from ecanet.surgery import attach
    >>> groups = parameter_groups(attach(resnet18()), lr=0.01, weight_decay=1e-4)
    >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
    [(62, 0.01, 0.0001), (8, 0.1, 0.0)]
    >>> optimizer = torch.optim.SGD(groups, momentum=0.9)

    Raises:
        ConfigError: a number is negative or not finite, or no parameter can be trained.
        AttachError: an attached gate is no longer reachable, because a module was removed or replaced after `attach`.
    """
    gate_lr = 10 * _check_number("lr", lr) if gate_lr is None else gate_lr
    network: dict[str, object] = {"lr": lr}
    if weight_decay is not None:
        network["weight_decay"] = _check_number("weight_decay", weight_decay)
    gates: dict[str, object] = {"lr": _check_number("gate_lr", gate_lr), "weight_decay": 0.0}
    gate_parameters = _find_gate_parameters(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]  # a shared one stands once
    network["params"] = [parameter for parameter in trainable if id(parameter) not in gate_parameters]
    gates["params"] = [parameter for parameter in trainable if id(parameter) in gate_parameters]
    groups = [group for group in (network, gates) if group["params"]]
    if not groups:
        raise ConfigError(
            f"no parameter of this {type(model).__name__} can be trained: unfreeze some with requires_grad_(True)"
        )
    return groups


def _find_gate_parameters(model: nn.Module) -> set[int]:
    """Return the identities of the parameters that only the attention modules of ``model`` hold."""
    gates = [gate for _, gate, _ in find_gates(model)]
    for _, module in list_modules(model):
        if isinstance(module, Attention):
            gates.append(module)
        # A built-in gate may be of any class of the user's: the block names the child that is its gate.
        key: object = vars(module).get("gate_key")
        if isinstance(key, str):
            gates += [part for name, part in list_modules(module) if name == key]
    inside = {id(part) for gate in gates for _, part in list_modules(gate)}
    held_by_gates: set[int] = set()
    held_elsewhere: set[int] = set()
    for _, module in list_modules(model):
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        (held_by_gates if id(module) in inside else held_elsewhere).update(own)
    return held_by_gates - held_elsewhere


def _check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} must be a finite number of at least 0, got {value!r}")
    return cast(float, value)
