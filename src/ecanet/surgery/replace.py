"""Replace a network's own channel attention by this library's gates; convert ECA modules with their weights."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from ecanet.attention import ECA, AttentionKind
from ecanet.errors import AttachError, ConfigError, summarize
from ecanet.models import KernelSizes
from ecanet.ops import hook_dictionaries
from ecanet.surgery.build import build_gates, isolate_building
from ecanet.surgery.choice import Choice, LeftOut, Replace, check_replace, choose, describe_kind, shorten
from ecanet.surgery.conversion import Kernel, convert, find_error, return_factor
from ecanet.surgery.example import run_again
from ecanet.surgery.modules import exchange_everywhere, list_modules
from ecanet.surgery.placing import Site
from ecanet.surgery.probing import computes_weights
from ecanet.surgery.recognition import Candidate, returns_product, watch
from ecanet.surgery.recording import Trace
from ecanet.surgery.records import Record, keep_record, read_record
from ecanet.surgery.selection import Where

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
"""Attributes of a module that say which hooks it has."""

DROPOUT = (nn.modules.dropout._DropoutNd,)  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True)
class Exchange:
    """A module and the gate that takes its place."""

    old: Candidate
    gate: nn.Module
    exact: bool
    """True if the gate computes the same: it has the weights of the module."""


def replace_modules(
    model: nn.Module,
    trace: Trace,
    replace: Replace,
    attention: AttentionKind,
    where: Where | None,
    preserve: bool | None,
    kernel_sizes: KernelSizes,
    options: Mapping[str, object],
    *,
    verify: bool,
) -> None:
    """Put ``attention`` in the place of every module that ``replace`` and ``where`` select.

    A module is recognised by what it computes, not by its name. ECA modules that give way to "eca" are converted: the
    gates get their weights. All others change outputs. ``verify`` runs the model again, to see that the gates run.

    Raises:
        ConfigError: ``replace`` is unknown, or options contradict weights that are taken over.
        AttachError: there is no such module, none of them can be replaced, ``preserve=True`` cannot be kept, or the
            model does not run its gates.
    """
    check_replace(replace)
    given = bool(options) or kernel_sizes != "adaptive"
    if replace == "eca" == attention.name and given:
        raise ConfigError("replace='eca' takes weights over, kernel sizes included; give no options")
    choice = choose(model, trace, replace, where, exactly=attention.name == "eca")
    convertible = [c for c in choice.chosen if attention.name == "eca" and isinstance(c.kernel, Kernel) and not given]
    others = [c for c in choice.chosen if c not in convertible]
    if preserve and others:
        raise AttachError(
            f"putting {attention.name!r} in the place of {others[0].describe()} changes outputs, so preserve=True "
            f"cannot be kept; leave preserve out"
        )
    with isolate_building(model):
        exchanges = convert_all(convertible, choice.left_out)
        exchanges += replace_all(others, attention, kernel_sizes, dict(options), choice.left_out)
    if not exchanges:
        raise AttachError(choice.explain(model, replace))
    notes = [note for exchange in exchanges for note in list_losses(exchange)]
    try:
        for exchange in exchanges:
            put(model, exchange, attention)
        if verify:
            prove(model, trace, exchanges)
    except BaseException:
        for exchange in exchanges:
            exchange_everywhere(model, exchange.gate, exchange.old.module)
        raise
    warn(exchanges, choice, notes, replace, attention)


def convert_all(candidates: Sequence[Candidate], left_out: list[LeftOut]) -> list[Exchange]:
    """Return ECA gates with the weights of these modules; add those that differ to ``left_out``."""
    made: dict[object, nn.Parameter] = {}
    exchanges: list[Exchange] = []
    for candidate in candidates:
        assert candidate.probe is not None
        assert isinstance(candidate.kernel, Kernel)
        gate = convert(candidate.probe, candidate.kernel, made)
        error = None if candidate.run.device.type == "meta" else find_error(candidate.probe, gate)
        if error:
            left_out.append(LeftOut(candidate.describe(), error))
        else:
            exchanges.append(Exchange(candidate, gate, exact=True))
    return exchanges


def replace_all(
    candidates: Sequence[Candidate],
    attention: AttentionKind,
    kernel_sizes: KernelSizes,
    options: dict[str, object],
    left_out: list[LeftOut],
) -> list[Exchange]:
    """Return new gates for these modules; add those whose place a gate cannot take to ``left_out``."""
    if not candidates:
        return []
    gates = build_gates(attention, [make_site(c) for c in candidates], kernel_sizes, options, lossless=False)
    exchanges: list[Exchange] = []
    for candidate, gate in zip(candidates, gates, strict=True):
        form = candidate.probe.form if candidate.probe else None
        if form is not None and not returns_product(candidate):
            if type(gate) is not ECA:
                reason = (
                    f"returns only the factor, which its parent multiplies by; 'eca' can do so, {attention.name!r} not"
                )
                left_out.append(LeftOut(candidate.describe(), reason))
                continue
            gate = return_factor(gate, form)
        exchanges.append(Exchange(candidate, gate, exact=False))
    return exchanges


def make_site(candidate: Candidate) -> Site:
    """Return the place of a module as the place of a gate."""
    run = candidate.run
    return Site(
        block=candidate.name.rpartition(".")[0],
        target=candidate.name,
        channels=run.shape[1],
        axis=1,
        index=run.order,
        shape=tuple(run.shape[2:]),
        device=run.device,
    )


def put(model: nn.Module, exchange: Exchange, attention: AttentionKind) -> None:
    """Replace a module by its gate, in every place where it stands.

    The gate takes the device, the dtype, the mode, the frozen state and the hooks of the module.
    """
    old, gate, run = exchange.old.module, exchange.gate, exchange.old.run
    like = next((p for p in old.parameters() if p.is_floating_point()), None)
    if not exchange.exact:
        gate.to(device=run.device, dtype=None if like is None else like.dtype)
        gate.requires_grad_(not is_frozen(old))
    gate.to(device=run.device).train(old.training)
    record = Record(
        attention.name, exchange.old.name.rpartition(".")[2], "replace", lossless=exchange.exact, channels=run.shape[1]
    )
    record.shape = tuple(run.shape[2:])
    record.replaced = old
    keep_record(gate, record)
    move_hooks(old, gate)
    exchange_everywhere(model, old, gate)


def prove(model: nn.Module, trace: Trace, exchanges: Sequence[Exchange]) -> None:
    """Run the model again; each gate must run as often as its module did.

    Raises:
        AttachError: a gate does not, because the model also keeps the module elsewhere, or the model fails.
    """
    with watch([e.gate for e in exchanges], [e.gate for e in exchanges]) as watcher:
        try:
            run_again(model, trace)
        except Exception as error:  # the parent of a module may read what a gate does not have
            raise AttachError(
                f"{type(model).__name__} does not run without {exchanges[0].old.describe()}; nothing was changed "
                f"({summarize(error)})"
            ) from error
    for exchange in exchanges:
        run, old = watcher.runs.get(exchange.gate), exchange.old
        runs = 0 if run is None else run.count
        if runs != old.run.count:
            raise AttachError(
                f"the gate in the place of {old.describe()} ran {runs} times, not {old.run.count}: the network also "
                f"keeps that module in another way; nothing was changed"
            )
        record = read_record(exchange.gate)
        assert record is not None
        record.runs = runs


def is_frozen(module: nn.Module) -> bool:
    """Return whether ``module`` has parameters and none of them trains."""
    trains = [p.requires_grad for p in module.parameters()]
    return bool(trains) and not any(trains)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the hooks that users registered on ``old``.

    It gets the dictionaries themselves, because the handle that a user keeps removes its hook from there. Hooks that
    compute weights belong to the old module, and then the others are copied.
    """
    theirs = cast("dict[str, dict[object, object] | bool | None]", vars(old))
    for kind in HOOKS:
        registered = theirs[kind]
        if isinstance(registered, dict) and any(computes_weights(hook) for hook in registered.values()):
            registered = {key: hook for key, hook in registered.items() if not computes_weights(hook)}
        vars(new)[kind] = registered


def list_losses(exchange: Exchange) -> Iterator[str]:
    """Yield the parts and properties of a module that its gate does not have, or shares unexpectedly."""
    old, name, probe = exchange.old.module, exchange.old.name, exchange.old.probe
    for inner, part in list_modules(old):
        if inner and any(not computes_weights(hook) for hooks in hook_dictionaries(part) for hook in hooks.values()):
            yield f"hooks on '{name}.{inner}' are gone"
    if any(isinstance(m, DROPOUT) and m.p > 0 for m in old.modules()) or (probe and probe.drops):
        yield f"the dropout in {name!r} is gone"
    if isinstance(exchange.old.kernel, Kernel) and exchange.exact and exchange.old.kernel.computed:
        yield f"the kernel of {name!r} is a parameter now, no longer computed from others"
    if not exchange.exact and is_frozen(old):
        yield f"{name!r} is frozen, as before"


def warn(
    exchanges: Sequence[Exchange], choice: Choice, notes: list[str], replace: Replace, attention: AttentionKind
) -> None:
    """Say in one warning that outputs change, what is lost, and which modules were left as they are."""
    parts: list[str] = []
    count = sum(not exchange.exact for exchange in exchanges)
    if count:
        parts.append(
            f"{count} {describe_kind(replace)} modules gave way to {attention.name!r}: outputs change until they are "
            f"trained"
        )
    parts += shorten(notes)
    parts += [f"left as it is: {text}" for text in shorten([str(one) for one in choice.left_out])]
    if parts:
        warnings.warn("; ".join(parts), stacklevel=4)
