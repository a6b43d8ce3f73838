"""Put attention into a live network without changing its outputs, and take it out again."""

import inspect
import warnings
from typing import TypeVar

import torch
from torch import nn

from ecanet.attention import Attention, AttentionKind, AttentionLike, find_attention
from ecanet.errors import AttachError
from ecanet.models import KernelSizes, forget_gates, remember_gates
from ecanet.surgery.build import build_gates, check_kernel_options, isolate_building
from ecanet.surgery.choice import Replace
from ecanet.surgery.example import record_run
from ecanet.surgery.folding import fold
from ecanet.surgery.gates import find_gates
from ecanet.surgery.insertion import refuse_twice, remove
from ecanet.surgery.patterns import group_attention
from ecanet.surgery.proof import Insertion
from ecanet.surgery.replace import replace_modules
from ecanet.surgery.report import (
    AttachedSite,
    Report,
    describe,
    get_left_out,
    measure_change,
    remember_left_out,
)
from ecanet.surgery.selection import Where
from ecanet.surgery.sites import Finder
from ecanet.surgery.wrapped import refuse_quantized, refuse_wrapped

__all__ = ["AttachedSite", "Report", "attach", "attached", "detach", "fold"]

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    attention: AttentionLike = "eca",
    *,
    where: Where | None = None,
    replace: Replace | None = None,
    preserve: bool | None = None,
    example: object = None,
    verify: bool = True,
    kernel_sizes: KernelSizes = "adaptive",
    **options: object,
) -> Model:
    """Put ``attention`` at the end of every residual branch of ``model``, in place; return the same model.

    Outputs stay the same bit for bit, in training too, until the gates are trained. Make the optimizer *after* this
    call: an older one does not know the gates, so they would never train. No existing tensor, key or module changes.
    Each gate is a child of its block (``layer1.0.eca.conv.weight``). `attached` lists the gates, `detach` removes them.
    Random states are left as they were, so a seeded run sees the same data with and without gates.

    Args:
        model: any convolutional network that runs. Where there are no residual branches (VGG), the end of each stage
            gets a gate.
        attention: a name from `list_attentions`, a class, any callable from a channel count to a module, or the dotted
            path of a class ("package.module.Class"). A module that is no `ChannelAttention` needs ``preserve=False``.
        where: which modules get gates: a glob over names (``"layer4.*"``; ``*`` is one part of a name, ``**`` any
            number), a class, or a function of (name, module). A selected module stands for the residual branches
            inside it; one without branches gets a gate on its own output.
        replace: "se" puts the gates in the place of the network's squeeze-excite modules. "eca" converts its ECA
            modules into this library's, with their weights. Both go by what modules compute, not by names. A class, or
            a function of (name, module), selects modules itself.
        preserve: False leaves the gates as initialised (the paper's form), so outputs change. Their values follow from
            the random state, as those of any layer (``torch.manual_seed``). None means True, except where ``replace``
            removes a trained gate of another kind, which cannot be lossless.
        example: an input, a tuple of inputs or a dictionary of keyword inputs, for models that do not take a random
            image. The model runs once on it, in evaluation mode; training flags, buffers and random states are
            restored.
        verify: True runs the model once more on the example and proves that each gate acts as often as its place and
            that outputs are equal bit for bit. What cannot be proven is left out or refused, and the model is as it
            was. False saves that run.
        kernel_sizes: as in `ecanet.create_model`: "adaptive" (Eq. 12 on each block's output channels), "official" (the
            released checkpoints'; Eq. 12 where there is none), one integer, or one per stage.
        options: the attention's own (``kernel_size=3``, ``reduction=8``).

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> model, image = resnet18().eval(), torch.rand(1, 3, 64, 64)
    >>> before = model(image)
    >>> torch.equal(attach(model, "eca")(image), before)
    True

    Raises:
        AttachError: there is nowhere to attach, the model cannot take gates now (compiled, DDP, quantized), or
            ``preserve=True`` cannot be kept. The model is then as it was.
        ConfigError: the attention or an option does not exist or does not fit.
    """
    kind = check_arguments(model, attention, where, preserve)
    refuse_wrapped(model)
    refuse_quantized(model)
    kind.check(options, inspect.signature(attach).parameters)
    check_kernel_options(kind, kernel_sizes, options)
    lossless = preserve is not False
    origin = {
        "attention": kind.path or False,
        "kernel_sizes": kernel_sizes,
        "where": where if where is None or isinstance(where, str) else False,
        "replace": replace if replace is None or isinstance(replace, str) else False,
        "options": dict(options),
    }
    # Tensors made in inference mode can never be trained, and do not show that they were changed in place.
    with torch.inference_mode(False):
        trace = record_run(model, example)
        if replace is not None:
            with group_attention(model, trace, replace):
                replace_modules(model, trace, replace, kind, where, preserve, kernel_sizes, options, verify=verify)
            remember_gates(model, **origin)
            return model
        with isolate_building(model):
            finder = Finder(model, trace)
            sites = finder.find(where)
            refuse_twice(model, sites, kind)
            gates = build_gates(kind, sites, kernel_sizes, options, lossless=lossless)
        insertion = Insertion(model, trace, kind, lossless=lossless)
        insertion.place(sites, gates, verify=verify)
    remember_left_out(model, [*finder.left_out, *insertion.left_out])
    remember_gates(model, **origin)
    return model


def detach(model: Model) -> Model:
    """Take every attached gate out of ``model``, in place; return the same model.

    `detach(attach(model))` is the model as it was: keys, hooks, tensors, outputs. In a trained model every other
    tensor stays as trained, and one warning says how far the gates were from neutral. `detach` halves again what
    `fold` doubled, and puts back what ``replace=`` took out.

    Raises:
        AttachError: nothing is attached, or a gate is no longer reachable.
    """
    refuse_wrapped(model)
    found = list(find_gates(model))
    if not found:
        raise AttachError(f"no attention is attached to this {type(model).__name__}; {describe_builtin(model)}")
    largest = max(measure_change(gate, record) for _, gate, record in found)
    for name, gate, record in reversed(found):
        remove(model, name, gate, record)
    remember_left_out(model, [])
    forget_gates(model)
    if largest > 0:
        warnings.warn(
            f"detached {len(found)} gates that were not neutral, so outputs change: the largest |gate - 1| was "
            f"{largest:.3g} (over channel means drawn from a standard normal distribution)",
            stacklevel=2,
        )
    return model


def attached(model: nn.Module) -> Report:
    """Return every gate that `attach` put into ``model``: a list of `AttachedSite` that prints as a table.

    >>> from torchvision.models import resnet18
    >>> sites = attached(attach(resnet18(), kernel_sizes="official"))
    >>> len(sites), sites[0].name, sites[0].channels, sites[0].kernel_size, sum(s.parameters for s in sites)
    (8, 'layer1.0.eca', 64, 3, 44)

    Raises:
        AttachError: a gate is no longer reachable, because a module was removed or replaced after `attach`.
    """
    found = [describe(model, name, gate, record) for name, gate, record in find_gates(model)]
    return Report(found, get_left_out(model))


def describe_builtin(model: nn.Module) -> str:
    """Return the remedy for a model without attached gates, which may have some that it was built with."""
    gates = [module for module in model.modules() if isinstance(module, Attention)]
    if not gates:
        return "attach() puts it in"
    return (
        f"its {len(gates)} {type(gates[0]).__name__} modules were built in and stay; build it with attention='none' to "
        f"have none"
    )


def check_arguments(model: object, attention: AttentionLike, where: object, preserve: object) -> AttentionKind:
    """Check the types of `attach`'s arguments; return the kind of attention.

    Raises:
        AttachError: an argument has another type.
        ConfigError: the attention does not exist.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach takes a network (a torch.nn.Module), got {model!r}")
    if not (where is None or isinstance(where, str) or callable(where)):
        raise AttachError(f"where= takes a glob, a module class or a function of (name, module), got {where!r}")
    if preserve not in (True, False, None):
        raise AttachError(f"preserve= takes True, False or None, got {preserve!r}")
    kind = find_attention(attention)
    if kind.name == "none":
        raise AttachError("attention 'none' is nothing to attach; detach() takes gates out")
    return kind
