"""Count operations by the rules of the paper's authors, whose counter is of 2019.

Its rules, which `count_operations` restates, are:

- a convolution counts 1 for each multiply-accumulate
- a batch norm counts 4 for each element
- a ReLU counts 1 for each element, but only in the *last* call of each ReLU module
- a linear layer counts 2 * in - 1 for each output
- an average pool counts H W + 1 for each output, also where it is written as a mean
- sigmoids, products and additions count nothing

ResNet-18 and 34 were counted in 2020 with another version, in which a ReLU counts nothing.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ecanet.attention import ECANS, GCT, SEGC, SRM, ChannelAttention, SEVar2, StatisticsAttention

__all__ = ["ModuleCounter", "PoolCounter", "count_operations"]


class PoolCounter(TorchDispatchMode):
    """Counts average pools, as modules or as means over the spatial axes: window + 1 for each output."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.operations = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and args and isinstance(args[0], Tensor) and self._is_pool(func, args[0], args[1:]):
            self.operations += args[0].numel() + out.numel()  # right because the windows do not overlap
        return out

    @staticmethod
    def _is_pool(func: Callable[..., object], x: Tensor, rest: tuple[object, ...]) -> bool:
        if func is torch.ops.aten.mean.dim:
            spatial = set(range(2, x.dim()))
            return bool(spatial) and {axis % x.dim() for axis in cast(Sequence[int], rest[0])} == spatial
        return func is torch.ops.aten._adaptive_avg_pool2d.default


class ModuleCounter:
    """Forward hooks that count the operations of each module, except of pools."""

    def __init__(self, model: nn.Module) -> None:
        self.operations: dict[nn.Module, int] = {}
        self.elementwise_macs = 0
        for module in model.modules():
            is_gate = isinstance(module, ChannelAttention | StatisticsAttention)
            if is_gate or not any(True for _ in module.children()):
                module.register_forward_hook(self._count)

    def total(self, *, relu: bool = True) -> int:
        """Return the operations of one forward pass, with or without those of the ReLUs."""
        return sum(n for module, n in self.operations.items() if relu or not isinstance(module, nn.ReLU | nn.ReLU6))

    def _count(self, module: nn.Module, args: tuple[object, ...], out: object) -> None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(out, Tensor):
            return
        self.elementwise_macs += x.shape[0] * count_elementwise_macs(module)
        self.operations[module] = count_operations(module, x, out)  # a second call of a module replaces the first


def count_operations(module: nn.Module, x: Tensor, out: Tensor) -> int:
    """Return the operations of one call of ``module`` with input ``x`` and output ``out``, by the rules of 2019.

    Global pools are not included: they may be written without a module.

    >>> count_operations(nn.Linear(10, 2), torch.zeros(1, 10), torch.zeros(1, 2))
    38
    """
    match module:
        case ChannelAttention() | StatisticsAttention():
            return x.shape[0] * count_gate_operations(module)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            taps = prod(module.kernel_size) + (module.bias is not None)
            return module.in_channels * out.numel() * taps // module.groups
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
            return 4 * x.numel()
        case nn.ReLU() | nn.ReLU6() | nn.LeakyReLU():
            return x.numel()
        case nn.AvgPool1d() | nn.AvgPool2d() | nn.AvgPool3d():
            side = module.kernel_size
            window = side ** (x.dim() - 2) if isinstance(side, int) else prod(side)
            return out.numel() * (window + 1)
        case nn.Linear():
            return (2 * module.in_features - 1) * out.numel()
        case _:
            return 0


def count_elementwise_macs(module: nn.Module) -> int:
    """Return the multiply-accumulates of a gate's own products for one image, where there is no matrix product.

    PyTorch's counter does not see them: one for each weight.
    """
    match module:
        case ECANS() | SEVar2():
            return sum(p.numel() for p in module.parameters())
        case SRM():
            return module.weight.numel()
        case GCT():
            return module.alpha.numel() + module.gamma.numel()
        case _:
            return 0


def count_gate_operations(module: ChannelAttention | StatisticsAttention) -> int:
    """Return the operations of a gate on the channel means of one image, by the rules of 2019 for its layers."""
    total = module.weight.numel() if isinstance(module, SEGC) else 0
    for layer in module.children():
        match layer:
            case nn.Linear():
                total += (2 * layer.in_features - 1) * layer.out_features
            case nn.Conv1d():  # ECA slides its kernel over the channels; ECA-NS has one kernel for each channel
                total += module.channels * layer.kernel_size[0]
            case _:
                pass
    return total
