"""Count what a network costs: parameters, multiply-accumulates and bytes, in today's units and in the paper's.

The paper prints its columns in units of 2^20 and 2^30, and its authors used an operation counter of 2019. Its rules,
which `count_operations` restates, are:

- a convolution counts 1 for each multiply-accumulate
- a batch norm counts 4 for each element
- a ReLU counts 1 for each element, but only in the *last* call of each ReLU module
- a linear layer counts 2 * in - 1 for each output
- an average pool counts H W + 1 for each output, also where it is written as a mean
- sigmoids, products and additions count nothing

ResNet-18 and 34 were counted in 2020 with another version, in which a ReLU counts nothing.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ecanet.attention import ECANS, GCT, SEGC, SRM, Attention, ChannelAttention, SEVar2, StatisticsAttention
from ecanet.errors import ConfigError, summarize
from ecanet.networks import find, image_size, is_ours
from ecanet.studies.shapes import run_on_shapes

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
"""Attention modules of other libraries, by package and class name. Their parameters count as attention parameters."""

WHY = (
    "The paper counts parameters in units of 2^20 and operations in units of 2^30, with the rules of a 2019 counter "
    "(batch norms, ReLUs and pools count too), so its ResNet-50 is 24.37M / 3.86G where today's tools say "
    "25.56M / 4.1G (4.09 G multiply-accumulates): the same network."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The cost of one network for one image."""

    parameters: int
    attention_parameters: int
    """Parameters inside attention modules."""
    macs: int
    """Multiply-accumulates of convolutions, linear layers and matrix products, and of the weights of gates."""
    bytes: int
    """Bytes of parameters and buffers: the size of a checkpoint."""
    operations: int
    """Operations by the rules of 2019, as in the paper's tables."""
    operations_2020: int
    """Operations by the rules of 2020, as the paper counts ResNet-18 and 34: a ReLU counts nothing."""


CostRow = TypedDict(
    "CostRow",
    {
        "model": str,
        "attention": str,
        "size": str,
        "parameters": int,
        "MACs": int,
        "attention parameters": int,
        "bytes": int,
        "paper #Param": str,
        "paper FLOPs": str,
    },
)
"""One row of `make_table`: the network, its cost in today's units, and the paper's two columns as text."""


def count(model: nn.Module, size: Sequence[int] = (3, 224, 224)) -> Cost:
    """Return the cost of ``model`` for one image of ``size`` (channels, height, width).

    A copy of the model runs on the meta device, where PyTorch computes only shapes. It takes no memory and no
    arithmetic, and ``model`` is left as it was. A detector resizes the image, and is counted with as many regions as it
    looks at most at.

    >>> from ecanet import create_model
    >>> cost = count(create_model("resnet50"))
    >>> cost.parameters, cost.attention_parameters, round(cost.macs / 1e9, 2)
    (25557118, 86, 4.09)
    >>> round(cost.parameters / 2**20, 2), round(cost.operations / 2**30, 2)
    (24.37, 3.86)

    Raises:
        ConfigError: the network cannot process an image of ``size``.
    """
    if min(size) < 1:
        raise ConfigError(f"the image size must be positive, got {tuple(size)}; use for example (3, 224, 224)")
    on_meta = copy.deepcopy(model).to("meta").eval()
    dtype = next((p.dtype for p in on_meta.parameters()), None)
    modules, pools = _ModuleCounter(on_meta), _PoolCounter()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as flops, pools:
            run_on_shapes(on_meta, size, dtype)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"the network cannot be counted on an image of size {tuple(size)}: {summarize(error)}"
        ) from error
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    attention = {id(p): p.numel() for module in find_attention_modules(model) for p in module.parameters()}
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        attention_parameters=sum(attention.values()),
        macs=flops.get_total_flops() // 2 + modules.elementwise_macs,
        bytes=sum(t.numel() * t.element_size() for t in tensors),
        operations=modules.total() + pools.operations,
        operations_2020=modules.total(relu=False) + pools.operations,
    )


def find_attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the attention modules of ``model``: this library's, torchvision's and timm's."""
    return [m for m in model.modules() if isinstance(m, Attention) or _is_peer(m)]


def _is_peer(module: nn.Module) -> bool:
    package = type(module).__module__.partition(".")[0]
    return type(module).__name__ in PEERS.get(package, ())


class _PoolCounter(TorchDispatchMode):
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


class _ModuleCounter:
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


def make_table(
    models: Sequence[str], *, attentions: Sequence[str] | None = None, side: int | None = None, **options: object
) -> list[CostRow]:
    """Return one row for each network; for this library's own networks, one for each of ``attentions``.

    Args:
        models: Names as `ecanet.networks.find` reads them: ``resnet50``, ``timm:NAME``, ``torchvision:NAME``.
        attentions: Attention modules of this library's networks (default: none and eca).
        side: Height and width of the image in pixels (default: the size that the network is made for).
        options: Options of `ecanet.create_model`, used with every attention but none.

    >>> row = make_table(["resnet50"], attentions=["eca"])[0]
    >>> row["paper #Param"], row["paper FLOPs"]
    ('24.37M', '3.86G')

    Raises:
        ConfigError: a network, attention or option does not exist, or a network cannot process an image of ``side``.
    """
    if (attentions or options) and not any(is_ours(name) for name in models):
        raise ConfigError("attention and its options are for this library's networks; attach() puts it into others'")
    chosen_attentions = attentions or ("none", "eca")
    if options and set(chosen_attentions) == {"none"}:
        raise ConfigError(f"attention 'none' has no options, got {', '.join(options)}; name another attention")
    rows: list[CostRow] = []
    for name in models:
        if not is_ours(name):
            rows.append(_make_row(name, "", side, {}))
            continue
        for attention in chosen_attentions:
            chosen = {} if attention == "none" else options
            rows.append(_make_row(name, attention, side, {"attention": attention, **chosen}))
    return rows


def _make_row(name: str, attention: str, side: int | None, options: dict[str, object]) -> CostRow:
    with torch.device("meta"):  # counting needs only shapes
        model = find(name, **options)
    size = image_size(name)
    size = size if side is None else (size[0], side, side)
    cost = count(model, size)
    return {
        "model": name,
        "attention": attention,
        "size": "x".join(map(str, size)),
        "parameters": cost.parameters,
        "MACs": cost.macs,
        "attention parameters": cost.attention_parameters,
        "bytes": cost.bytes,
        "paper #Param": f"{cost.parameters / 2**20:.2f}M",
        "paper FLOPs": format_operations(cost.operations_2020 if name in ("resnet18", "resnet34") else cost.operations),
    }


def format_operations(operations: int) -> str:
    """Return ``operations`` as the paper prints them: in 2^30 ("3.86G"), or below 2^29 in 2^20 ("319.4M").

    >>> format_operations(4142160896), format_operations(334940000)
    ('3.86G', '319.4M')
    """
    return f"{operations / 2**30:.2f}G" if operations >= 2**29 else f"{operations / 2**20:.1f}M"
