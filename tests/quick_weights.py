"""Draw the weights of large layers from few numbers: most of the time in which a network is made goes to drawing."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import init

PERIOD = 65521
"""How many numbers a layer draws at most: a prime, so that no two filters begin at the same of them."""


def speed_up_drawing() -> None:
    """Let the functions of `torch.nn.init` draw `PERIOD` numbers and repeat them, where a tensor has more."""
    for name, draw in {"_no_grad_uniform_": draw_uniform, "_no_grad_normal_": draw_normal}.items():
        setattr(init, name, draw)
    for name, draw in {"kaiming_uniform_": draw_kaiming_uniform, "kaiming_normal_": draw_kaiming_normal}.items():
        setattr(init, name, keep_small(getattr(init, name), draw))


def is_large(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.numel() > 2 * PERIOD and x.is_contiguous()


def keep_small(draw: Callable[..., Tensor], draw_large: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``draw``, or ``draw_large`` for tensors that are large."""

    @functools.wraps(draw)
    def choose(tensor: Tensor, *values: object, **options: object) -> Tensor:
        return (draw_large if is_large(tensor) else draw)(tensor, *values, **options)

    return choose


def repeat(tensor: Tensor, draw: Callable[[Tensor], object]) -> Tensor:
    with torch.no_grad():
        flat = tensor.view(-1)
        whole = len(flat) // PERIOD * PERIOD
        draw(flat[:PERIOD])
        flat[PERIOD:whole].view(-1, PERIOD).copy_(flat[:PERIOD])
        flat[whole:].copy_(flat[: len(flat) - whole])
    return tensor


def draw_uniform(tensor: Tensor, a: float, b: float, generator: torch.Generator | None = None) -> Tensor:
    if is_large(tensor):
        return repeat(tensor, lambda part: part.uniform_(a, b, generator=generator))
    with torch.no_grad():
        return tensor.uniform_(a, b, generator=generator)


def draw_normal(tensor: Tensor, mean: float, std: float, generator: torch.Generator | None = None) -> Tensor:
    if is_large(tensor):
        return repeat(tensor, lambda part: part.normal_(mean, std, generator=generator))
    with torch.no_grad():
        return tensor.normal_(mean, std, generator=generator)


def find_std(tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    return init.calculate_gain(nonlinearity, a) / math.sqrt(init._calculate_correct_fan(tensor, mode))


def draw_kaiming_uniform(tensor, a=0, mode="fan_in", nonlinearity="leaky_relu", generator=None):
    bound = math.sqrt(3) * find_std(tensor, a, mode, nonlinearity)
    return draw_uniform(tensor, -bound, bound, generator)


def draw_kaiming_normal(tensor, a=0, mode="fan_in", nonlinearity="leaky_relu", generator=None):
    return draw_normal(tensor, 0, find_std(tensor, a, mode, nonlinearity), generator)
