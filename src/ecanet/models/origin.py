"""What a network was made from, kept with it as plain values, so that a file can say how to make it again."""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

__all__ = ["forget_gates", "get_origin", "remember_gates", "remember_network"]

ORIGIN = "_origin"
"""Attribute of a network: copied with it, and no part of its state dict."""


def remember_network(model: nn.Module, **settings: object) -> None:
    """Keep in ``model`` the arguments that `ecanet.create_model` made it from."""
    vars(model)[ORIGIN] = {"network": settings, "gates": []}


def remember_gates(model: nn.Module, **settings: object) -> None:
    """Keep the arguments of one call of `ecanet.attach`, too; False stands for what no file can name."""
    origin = cast("dict[str, Any]", vars(model).get(ORIGIN, {}))
    vars(model)[ORIGIN] = {"network": origin.get("network", {}), "gates": [*origin.get("gates", []), settings]}


def forget_gates(model: nn.Module) -> None:
    """Remove the arguments of `ecanet.attach` from what ``model`` keeps."""
    network = cast("dict[str, Any]", vars(model).pop(ORIGIN, {})).get("network", {})
    if network:
        remember_network(model, **network)


def get_origin(model: nn.Module) -> tuple[Mapping[str, object], list[Mapping[str, object]]]:
    """Return the arguments of `ecanet.create_model`, none for another library's network, and of each `attach`."""
    origin = cast("dict[str, Any]", vars(model).get(ORIGIN, {}))
    return origin.get("network", {}), origin.get("gates", [])
