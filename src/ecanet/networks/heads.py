"""The head of a classifier: the layer that gives the logits, exchanged where a network was made for other classes."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from ecanet.errors import ConfigError, summarize

__all__ = ["exchange_head", "find_head", "run_on_zeros"]


def run_on_zeros(model: nn.Module, name: str, image: tuple[int, int, int]) -> Tensor:
    """Return the logits (1, K) of ``model``, the network called ``name``, for a black image (channels, height, width).

    Raises:
        ConfigError: it does not run on such an image, or returns something else than logits.
    """
    training = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            output = cast(object, model.eval()(torch.zeros(1, *image, device=device)))
    except Exception as error:  # a forward may raise anything
        raise ConfigError(f"{name} does not run on images of {image}: {summarize(error)}") from error
    finally:
        model.train(training)
    if isinstance(output, Tensor) and output.dim() == 2:
        return output
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ConfigError(f"{name} is no classifier: for an image it must return logits (1, K), got {shape}")


def find_head(model: nn.Module, name: str, image: tuple[int, int, int]) -> tuple[str, int]:
    """Return the name of the layer that gives the logits, and their number K.

    It is the last linear layer or convolution that runs with K outputs.

    Raises:
        ConfigError: there is none, or see `run_on_zeros`.
    """
    found: list[tuple[str, int]] = []
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def make_hook(layer: str, width: int) -> Callable[..., None]:
        return lambda *_: found.append((layer, width))

    for layer, module in cast(Iterable[tuple[str, nn.Module]], model.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            handles.append(module.register_forward_hook(make_hook(layer, width)))
    try:
        classes = run_on_zeros(model, name, image).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    layers = [layer for layer, width in found if width == classes]
    if not layers:
        raise ConfigError(f"{name} has no linear layer or convolution that gives its {classes} logits")
    return layers[-1], classes


def exchange_head(model: nn.Module, head: str, classes: int) -> None:
    """Replace the layer ``head`` of ``model`` by one with ``classes`` outputs, all zero.

    With zeros the first logits are equal, the first gradients reach the head alone, and the start does not depend on
    the random state: the arms of a comparison begin alike.
    """
    old = model.get_submodule(head)
    bias = cast(Tensor | None, old.bias) is not None
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, classes, bias=bias)
    else:
        assert isinstance(old, nn.Conv2d)
        new = nn.Conv2d(
            old.in_channels, classes, cast(tuple[int, int], old.kernel_size), cast(tuple[int, int], old.stride),
            cast("tuple[int, int] | str", old.padding), cast(tuple[int, int], old.dilation), bias=bias,
        )  # fmt: skip
    new = new.to(next(old.parameters()))
    zero(new)
    parent, _, child = head.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(old.training))


@torch.no_grad()
def zero(layer: nn.Module) -> None:
    """Set the parameters of ``layer`` to zero."""
    for parameter in layer.parameters():
        parameter.zero_()
