"""Replace a network's squeeze-excite modules, or the ECA modules of other libraries, by this library's gates."""

import copy
import re
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ecanet.attention import ECA, AttentionKind
from ecanet.errors import AttachError, ConfigError
from ecanet.models import KernelSizes
from ecanet.surgery.build import build_gates
from ecanet.surgery.modules import children_of, list_modules
from ecanet.surgery.placing import Site
from ecanet.surgery.recording import Trace
from ecanet.surgery.records import Record, keep_record
from ecanet.surgery.selection import Where, is_selected

KINDS = {
    "se": re.compile(
        r"^(\w*(SE|Se)(Module|Layer|Block|Attention)?|\w*SqueezeExcit(e|ation)(Layer|Module|Block)?|se_?(layer|block|module))$"
    ),
    "eca": re.compile(
        r"^(C?ECA|C?Eca|[Cc]?eca)_?([Mm]odule|[Ll]ayer|[Bb]lock|[Aa]ttention|NS)?$|^EfficientChannelAttention$"
    ),
}
"""Class names of torchvision's, timm's, Hugging Face's, the authors' and commonly pasted modules."""


def replace_modules(
    model: nn.Module,
    trace: Trace,
    kind: str,
    attention: AttentionKind,
    where: Where | None,
    preserve: bool | None,
    kernel_sizes: KernelSizes,
    options: dict[str, object],
) -> None:
    """Put ``attention`` in the place of every module of ``kind`` that ``where`` selects.

    Raises:
        ConfigError: ``kind`` is unknown, or options contradict weights that are taken over.
        AttachError: there is no such module, ``preserve=True`` is given for another kind of gate, or a module does not
            compute what its name says.
    """
    if kind not in KINDS:
        raise ConfigError(f"replace= takes {' or '.join(map(repr, KINDS))}, got {kind!r}")
    same = kind == attention.name == "eca"
    sites = find_modules(model, trace, KINDS[kind], where)
    if not sites and where is not None and (some := [s.target for s in find_modules(model, trace, KINDS[kind], None)]):
        raise AttachError(f"where={where!r} selects none of the {len(some)} {kind!r} modules, such as {some[0]!r}")
    if not sites:
        raise AttachError(
            f"found no {kind!r} modules to replace in {type(model).__name__}; attach without replace= adds gates"
        )
    if preserve and not same:
        old = type(model.get_submodule(sites[0].target)).__name__
        raise AttachError(
            f"putting {attention.name!r} in the place of {sites[0].target!r}, a {old}, changes outputs, "
            f"so preserve=True cannot be kept; leave preserve out"
        )
    if same and (options or kernel_sizes != "adaptive"):
        raise ConfigError("replace='eca' takes weights over, kernel sizes included; give no options")
    gates: Sequence[nn.Module]
    if same:
        gates = [convert(model.get_submodule(site.target), site) for site in sites]
    else:
        gates = build_gates(attention, sites, kernel_sizes, options, lossless=False)
    for site, gate in zip(sites, gates, strict=True):
        put(model, site, gate, attention, lossless=same)
    if not same:
        warnings.warn(
            f"{len(sites)} {kind!r} modules gave way to {attention.name!r}: outputs change until they are trained",
            stacklevel=3,
        )


def find_modules(model: nn.Module, trace: Trace, names: re.Pattern[str], where: Where | None) -> list[Site]:
    """Return the selected modules with such a class name that ran, in running order, as sites.

    Raises:
        AttachError: a module has its channels on another axis than 1.
    """
    called = {id(call.module): call for call in reversed(trace.calls)}
    sites: list[Site] = []
    for name, module in list_modules(model):
        if not names.match(type(module).__name__) or isinstance(module, nn.Sequential) or hasattr(module, "attachment"):
            continue
        if where is not None and not any(is_selected(where, *one) for one in iterate_enclosing(model, name, where)):
            continue
        call = called.get(id(module))
        if call is None or call.output is None or not call.inputs or call.inputs[0].shape != call.output.shape:
            continue
        value = call.output
        channels, shape = value.shape[value.axis], tuple(value.shape[2:])
        if value.axis != 1:
            raise AttachError(f"{name!r} has its channels on axis {value.axis}, not 1; a gate cannot take its place")
        parent = name.rpartition(".")[0]
        site = Site(
            block=parent, target=name, channels=channels, axis=1, index=value.index, shape=shape, device=value.device
        )
        sites.append(site)
    return sorted(sites, key=lambda s: s.index)


def iterate_enclosing(model: nn.Module, name: str, where: Where) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules by which ``where`` may select the module called ``name``: itself and the modules around it.

    A function decides for each module alone, so it gets the module itself only.
    """
    if not isinstance(where, str | type):
        yield name, model.get_submodule(name)
        return
    while name:
        yield name, model.get_submodule(name)
        name = name.rpartition(".")[0]


def convert(old: nn.Module, site: Site) -> ECA:
    """Return this library's ECA with the weights of ``old``, another library's.

    Raises:
        AttachError: ``old`` has parameters that ECA does not have (a bias, a second layer), or computes something else.
    """
    state = dict(old.named_parameters())
    conv = next((m for m in old.modules() if isinstance(m, nn.Conv1d)), None)
    if conv is None or conv.weight.shape[:2] != (1, 1) or len(state) != 1:
        raise AttachError(
            f"{site.target!r} ({type(old).__name__}) has more than one (1, 1, k) kernel, so it is not the paper's ECA"
        )
    names = {type(old).__name__, *(type(m).__name__ for m in old.modules())}
    circular = any(n.startswith("Ceca") for n in names) or conv.padding_mode == "circular"
    gate = ECA(site.channels, conv.weight.shape[-1], padding_mode="circular" if circular else "zeros")
    gate.load_state_dict({"conv.weight": conv.weight.detach()})
    check_equivalence(old, gate, site)
    return gate.to(conv.weight.device, conv.weight.dtype)


@torch.no_grad()
def check_equivalence(old: nn.Module, gate: ECA, site: Site) -> None:
    """Check that ``gate`` returns the same as ``old``, up to rounding.

    Raises:
        AttachError: it does not.
    """
    x = torch.randn((2, site.channels, 4, 4), generator=torch.Generator().manual_seed(0))
    theirs = copy.deepcopy(old).to("cpu", torch.float32).eval()(x)
    # Means of 16 numbers and sums of k products are rounded in another order: at most some 32 units in the last place.
    if (gate(x) - theirs).abs().max() > 32 * torch.finfo(torch.float32).eps * x.abs().max():
        raise AttachError(f"{site.target!r} ({type(old).__name__}) computes something else than the paper's ECA")


def put(model: nn.Module, site: Site, gate: nn.Module, attention: AttentionKind, *, lossless: bool) -> None:
    """Replace the module at ``site`` by ``gate``."""
    parent, key = model.get_submodule(site.block), site.target.rpartition(".")[2]
    old = model.get_submodule(site.target)
    like = next((p for p in old.parameters() if p.is_floating_point()), None)
    record = Record(attention.name, key, "replace", lossless=lossless, channels=site.channels)
    record.shape = site.shape
    record.replaced = old
    keep_record(gate, record)
    gate.to(device=site.device, dtype=None if like is None else like.dtype).train(parent.training)
    children_of(parent)[key] = gate
