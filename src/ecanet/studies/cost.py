"""What a network costs: parameters, multiply-accumulates and bytes, in today's units and in the paper's.

The paper's columns are in units of 2^20 and 2^30 and follow a 2019 operation counter, whose rules `operations`
restates: one per multiply-accumulate of a convolution, 4 per element of a batch norm, 1 per element of the *last*
call of each ReLU module, 2 * in - 1 per output of a linear layer, H W + 1 per output of an average pool (however it is
written), and nothing for sigmoids, products and additions. ResNet-18 and 34 were counted in 2020, when a ReLU counted
nothing.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ecanet.attention import ECANS, SEGC, Attention, ChannelAttention, SEVar2
from ecanet.errors import ConfigError
from ecanet.networks import find, image_size, is_ours

PEERS = {
    "torchvision": {"SqueezeExcitation"},
    "timm": {
        "SEModule",
        "SqueezeExcite",
        "EffectiveSEModule",
        "EcaModule",
        "CecaModule",
        "CbamModule",
        "GlobalContext",
    },
}
"""Attention modules of other libraries, by package and class: counted as attention parameters too."""

WHY = (
    "The paper counts parameters in units of 2^20 and operations in units of 2^30, with the rules of a 2019 counter "
    "(batch norms, ReLUs and pools count too), so its ResNet-50 is 24.37M / 3.86G where today's tools say "
    "25.56M / 4.1G (4.09 G multiply-accumulates): the same network."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one network costs for one image."""

    parameters: int
    attention_parameters: int
    """Those inside attention modules."""
    macs: int
    """Multiply-accumulates of convolutions, linear layers and matrix products."""
    bytes: int
    """Of parameters and buffers: the size of a checkpoint."""
    operations: int
    """As counted for the paper's tables, in 2019."""
    operations_2020: int
    """As counted for ResNet-18 and 34, in 2020: a ReLU counts nothing."""


def count(model: nn.Module, size: Sequence[int] = (3, 224, 224)) -> Cost:
    """The cost of ``model`` for one image of ``size`` (channels, height, width).

    Only shapes are computed, on the meta device: no memory, no arithmetic, and ``model`` is left as it was.

    >>> from ecanet import create_model
    >>> cost = count(create_model("resnet50"))
    >>> cost.parameters, cost.attention_parameters, round(cost.macs / 1e9, 2)
    (25557112, 80, 4.09)
    >>> round(cost.parameters / 2**20, 2), round(cost.operations / 2**30, 2)
    (24.37, 3.86)

    Raises:
        ConfigError: the network does not take an image of ``size``.
    """
    if min(size) < 1:
        raise ConfigError(f"an image's size must be positive, got {tuple(size)}")
    shadow = copy.deepcopy(model).to("meta").eval()
    image = torch.empty(1, *size, device="meta", dtype=next((p.dtype for p in shadow.parameters()), None))
    counter, pools = _Modules(shadow), _Pools()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as flops, pools:
            shadow(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"the network cannot be counted on an image of size {tuple(size)}: {reason}") from error
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    inside = {id(p): p.numel() for module in attention_modules(model) for p in module.parameters()}
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        attention_parameters=sum(inside.values()),
        macs=flops.get_total_flops() // 2 + counter.elementwise_macs,
        bytes=sum(t.numel() * t.element_size() for t in tensors),
        operations=counter.total() + pools.operations,
        operations_2020=counter.total(relu=False) + pools.operations,
    )


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of ``model``: this library's, torchvision's and timm's."""
    return [m for m in model.modules() if isinstance(m, Attention) or _is_peer(m)]


def _is_peer(module: nn.Module) -> bool:
    package = type(module).__module__.partition(".")[0]
    return type(module).__name__ in PEERS.get(package, ())


class _Pools(TorchDispatchMode):
    """Counts average pools, as modules or as means over the spatial axes: window + 1 for each output."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func is aten.mean.dim:
            spatial = set(range(2, args[0].dim()))
            pooled = bool(spatial) and {axis % args[0].dim() for axis in args[1]} == spatial
        else:
            pooled = func is aten._adaptive_avg_pool2d.default
        if pooled:
            self.operations += args[0].numel() + out.numel()  # where windows do not overlap
        return out


class _Modules:
    """Forward hooks that count what each module does, pools aside."""

    def __init__(self, model: nn.Module):
        self.operations: dict[nn.Module, int] = {}
        self.elementwise_macs = 0
        for module in model.modules():
            if isinstance(module, ChannelAttention) or not any(True for _ in module.children()):
                module.register_forward_hook(self._count)

    def total(self, *, relu: bool = True) -> int:
        """Operations of one forward pass, with or without the ReLUs'."""
        return sum(n for module, n in self.operations.items() if relu or not isinstance(module, nn.ReLU | nn.ReLU6))

    def _count(self, module: nn.Module, args: tuple, out: object) -> None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(out, Tensor):
            return
        if isinstance(module, ECANS | SEVar2):  # one product per parameter, elementwise: no matrix product to see
            self.elementwise_macs += x.shape[0] * sum(p.numel() for p in module.parameters())
        self.operations[module] = operations(module, x, out)  # a second call of the same module replaces the first


def operations(module: nn.Module, x: Tensor, out: Tensor) -> int:
    """Operations of one call of ``module``, from ``x`` to ``out``, by the rules of 2019; global pools are not here.

    >>> operations(nn.Linear(10, 2), torch.zeros(1, 10), torch.zeros(1, 2))
    38
    """
    match module:
        case ChannelAttention():
            return x.shape[0] * gate_operations(module)
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


def gate_operations(module: ChannelAttention) -> int:
    """Operations of a gate on one image's channel means, by the same rules for its layers."""
    total = module.weight.numel() if isinstance(module, SEGC) else 0
    for layer in module.children():
        match layer:
            case nn.Linear():
                total += (2 * layer.in_features - 1) * layer.out_features
            case nn.Conv1d():  # ECA slides its kernel over the channels, ECA-NS has one row of taps a channel
                total += module.channels * layer.kernel_size[0]
    return total


def table(
    models: Sequence[str], *, attentions: Sequence[str] | None = None, side: int | None = None, **options: Any
) -> list[dict[str, Any]]:
    """One row for each network and, for this library's own, each attention (default: none and eca): its `Cost`, and
    the paper's two columns.

    ``side`` is the image's height and width (default: what the network is made for). ``options`` go to
    `create_model`, for every attention but none.

    >>> row = table(["resnet50"], attentions=["eca"])[0]
    >>> row["paper #Param"], row["paper FLOPs"]
    ('24.37M', '3.86G')

    Raises:
        ConfigError: a network, attention or option does not exist, or a network cannot take an image of ``side``.
    """
    if (attentions or options) and not any(is_ours(name) for name in models):
        raise ConfigError("attention and its options are for this library's networks; attach() puts it into others'")
    chosen_attentions = attentions or ("none", "eca")
    if options and set(chosen_attentions) == {"none"}:
        raise ConfigError(f"attention 'none' has no options, got {', '.join(options)}")
    rows = []
    for name in models:
        ours = is_ours(name)
        for attention in chosen_attentions if ours else ("",):
            chosen = {} if attention == "none" else options
            with torch.device("meta"):  # shapes are enough
                model = find(name, attention=attention, **chosen) if ours else find(name)
            size = image_size(name, model)
            size = size if side is None else (size[0], side, side)
            cost = count(model, size)
            relu = name not in ("resnet18", "resnet34")
            rows.append(
                {
                    "model": name,
                    "attention": attention,
                    "size": "x".join(map(str, size)),
                    "parameters": cost.parameters,
                    "MACs": cost.macs,
                    "attention parameters": cost.attention_parameters,
                    "bytes": cost.bytes,
                    "paper #Param": f"{cost.parameters / 2**20:.2f}M",
                    "paper FLOPs": paper_unit(cost.operations if relu else cost.operations_2020),
                }
            )
    return rows


def paper_unit(operations: int) -> str:
    """Operations as the paper prints them: in 2^30 ("3.86G"), below half of that in 2^20 ("319.4M").

    >>> paper_unit(4142160896), paper_unit(334940000)
    ('3.86G', '319.4M')
    """
    return f"{operations / 2**30:.2f}G" if operations >= 2**29 else f"{operations / 2**20:.1f}M"
