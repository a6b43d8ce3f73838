"""Count what a network costs: parameters, multiply-accumulates and bytes, in today's units and in the paper's.

The paper prints its columns in units of 2^20 and 2^30; `operations` has its rules.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ecanet.attention import Attention
from ecanet.errors import ConfigError, summarize
from ecanet.models import small_example
from ecanet.networks import find, image_size, is_ours
from ecanet.studies.operations import ModuleCounter, PoolCounter
from ecanet.studies.shapes import run_on_shapes
from ecanet.surgery import attach

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
    modules, pools = ModuleCounter(on_meta), PoolCounter()
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


def make_table(
    models: Sequence[str], *, attentions: Sequence[str] | None = None, side: int | None = None, **options: object
) -> list[CostRow]:
    """Return one row for each network and attention; for other libraries' networks, one more for the plain network.

    Args:
        models: Names as `ecanet.networks.find` reads them: ``resnet50``, ``timm:NAME``, ``torchvision:NAME``.
        attentions: Attention modules, built into this library's networks (default: none and eca), and attached to
            others (default: none).
        side: Height and width of the image in pixels (default: the size that the network is made for).
        options: Options of `ecanet.create_model` or `ecanet.attach`, used with every attention but none.

    >>> row = make_table(["resnet50"], attentions=["eca"])[0]
    >>> row["paper #Param"], row["paper FLOPs"]
    ('24.37M', '3.86G')

    Raises:
        ConfigError: a network, attention or option does not exist, or a network cannot process an image of ``side``.
        AttachError: a network has no place for gates.
    """
    if options and not attentions and not any(is_ours(name) for name in models):
        raise ConfigError(f"{', '.join(options)}: these are options of an attention; name it, such as eca")
    if options and set(attentions or ("eca",)) == {"none"}:
        raise ConfigError(f"attention 'none' has no options, got {', '.join(options)}; name another attention")
    rows: list[CostRow] = []
    for name in models:
        ours = is_ours(name)
        chosen = attentions or ("none", "eca") if ours else ("", *(a for a in attentions or () if a != "none"))
        rows += [_make_row(name, one, side, {} if one in ("", "none") else options) for one in chosen]
    return rows


def _make_row(name: str, attention: str, side: int | None, options: Mapping[str, object]) -> CostRow:
    if is_ours(name):
        with torch.device("meta"):  # counting needs only shapes
            model = find(name, attention=attention, **options)
    elif attention:
        model = attach_by_name(name, attention, **options)
    else:
        with torch.device("meta"):
            model = find(name)
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


def attach_by_name(name: str, attention: str, **options: object) -> nn.Module:
    """Return the network ``name`` with random weights and ``attention`` attached and proven.

    Raises:
        ConfigError: the network or the attention does not exist, or an option does not fit.
        AttachError: there is no place for gates.
    """
    model = find(name, **({"attention": "none"} if is_ours(name) else {}))
    insert = cast(Callable[..., nn.Module], attach)  # which checks the options itself
    with small_example(model) as example:
        return insert(model, attention, example=example, **options)


def format_operations(operations: int) -> str:
    """Return ``operations`` as the paper prints them: in 2^30 ("3.86G"), or below 2^29 in 2^20 ("319.4M").

    >>> format_operations(4142160896), format_operations(334940000)
    ('3.86G', '319.4M')
    """
    return f"{operations / 2**30:.2f}G" if operations >= 2**29 else f"{operations / 2**20:.1f}M"
