"""Put attention into a live network without changing what it computes, and take it off again."""

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from ecanet.attention import ATTENTIONS, Attention, attention_key, check_attention, make_attention, options_of
from ecanet.errors import AttachError, ConfigError
from ecanet.models import KernelSizes
from ecanet.surgery import hooks
from ecanet.surgery.example import watch
from ecanet.surgery.folding import fold, unfold
from ecanet.surgery.hooks import Record
from ecanet.surgery.kernels import kernel_sizes_at
from ecanet.surgery.replace import replace_modules
from ecanet.surgery.report import AttachedSite, Report, change, describe
from ecanet.surgery.sites import Finder, Site, Where

__all__ = ["AttachedSite", "Report", "attach", "attached", "detach", "fold"]

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    attention: str = "eca",
    *,
    where: Where | None = None,
    replace: str | None = None,
    preserve: bool | None = None,
    example: Any = None,
    kernel_sizes: KernelSizes = "adaptive",
    **options: object,
) -> Model:
    """Put ``attention`` at the end of every residual branch of ``model``, in place; returns the same model.

    Outputs stay the same bit for bit, in training too, until the gates are trained: make the optimizer *after* this
    call, or the gates are not in it and never train. No existing tensor, key or module changes; each gate is a child
    of its block (``layer1.0.eca.conv.weight``). `attached` lists them, `detach` takes them off.

    Args:
        model: any convolutional network that runs; without residual branches (VGG) each stage's end gets a gate.
        attention: a name from `list_attentions`.
        where: which modules: a glob over names (``"layer4.*"``; ``*`` is one part of a name, ``**`` any number), a
            class, or a function of (name, module). A selected module stands for the residual branches in it, any
            other for its own output.
        replace: "se" puts the gates in the place of the network's squeeze-excite modules; "eca" turns timm's, the
            authors' and pasted ECA modules into this library's, with their weights.
        preserve: False leaves the gates as initialised (the paper's form: outputs change). None means True, except
            where ``replace`` takes a different trained gate out, which cannot be lossless.
        example: an input, a tuple of inputs or a dictionary of keyword inputs, if a random image will not do. The
            model runs once on it, in evaluation mode; training flags, buffers and random states stay as they are.
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
        AttachError: nowhere to attach, a model that cannot take gates now (compiled, DDP), or ``preserve=True`` where
            it cannot be kept.
        ConfigError: the attention or an option does not exist or does not fit.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach takes a network (a torch.nn.Module), got {model!r}")
    if not (where is None or isinstance(where, str) or callable(where)):
        raise AttachError(f"where= takes a glob, a module class or a function of (name, module), got {where!r}")
    if preserve not in (True, False, None):
        raise AttachError(f"preserve= takes True, False or None, got {preserve!r}")
    if attention == "none":
        raise AttachError("attention 'none' is nothing to attach; detach() takes gates out")
    hooks.refuse_wrapped(model)
    check_attention(attention, options, beside=("where", "replace", "preserve", "example", "kernel_sizes"))
    check_kernel_options(attention, kernel_sizes, options)
    if replace is not None:
        trace = watch(model, example)
        replace_modules(model, trace, replace, attention, where, preserve, kernel_sizes, options)
        return model
    sites = Finder(model, watch(model, example)).find(where)
    refuse_twice(model, sites, attention)
    has_kernel = "kernel_size" in options_of(attention)
    sizes = kernel_sizes_at(sites, kernel_sizes) if has_kernel else [None] * len(sites)
    gates = [
        build(attention, site, size, preserve is not False, options) for site, size in zip(sites, sizes, strict=True)
    ]
    for site, gate in zip(sites, gates, strict=True):
        insert(model, site, attention, gate, lossless=preserve is not False)
    return model


def detach(model: Model) -> Model:
    """Take every attached gate out of ``model``, in place; returns the same model.

    `detach(attach(model))` is the model as it was: keys, hooks, tensors, outputs. Of a trained model every other
    tensor stays as trained; one warning then says how far the gates were from doing nothing. What `fold` doubled is
    halved; what ``replace=`` took out comes back.

    Raises:
        AttachError: nothing is attached, or a gate is no longer reachable.
    """
    hooks.refuse_wrapped(model)
    found = list(hooks.gates(model))
    if not found:
        raise AttachError(f"no attention is attached to this {type(model).__name__}")
    largest = max(change(gate, record) for _, gate, record in found)
    for name, gate, record in reversed(found):
        remove(model, name, gate, record)
    if largest > 0:
        warnings.warn(
            f"detached {len(found)} gates that were not neutral, so outputs change: the largest |gate - 1| was "
            f"{largest:.3g} (over channel means drawn from a standard normal distribution)",
            stacklevel=2,
        )
    return model


def attached(model: nn.Module) -> Report:
    """Every gate that `attach` put into ``model``: a list of `AttachedSite` that prints as a table.

    >>> from torchvision.models import resnet18
    >>> sites = attached(attach(resnet18(), kernel_sizes="official"))
    >>> len(sites), sites[0].name, sites[0].channels, sites[0].kernel_size, sum(s.parameters for s in sites)
    (8, 'layer1.0.eca', 64, 3, 44)

    Raises:
        AttachError: a gate is no longer reachable, because a module was removed or replaced after `attach`.
    """
    return Report(describe(name, gate, record) for name, gate, record in hooks.gates(model))


def check_kernel_options(attention: str, kernel_sizes: KernelSizes, options: dict[str, object]) -> None:
    """Raise ConfigError if ``kernel_sizes`` means nothing for ``attention``, or is said twice."""
    has_kernel = "kernel_size" in options_of(attention)
    if not has_kernel and kernel_sizes not in ("adaptive", "official"):
        raise ConfigError(
            f"attention {attention!r} has no kernel, so kernel_sizes={kernel_sizes!r} has no effect; leave it out"
        )
    if kernel_sizes != "adaptive" and "kernel_size" in options:
        raise ConfigError("give kernel_sizes= (per stage) or kernel_size= (for all), not both")


def refuse_twice(model: nn.Module, sites: Sequence[Site], attention: str) -> None:
    """Raise AttachError if a site already ends in this attention."""
    for site in sites:
        target = model.get_submodule(site.target)
        last = target[-1] if site.append and isinstance(target, nn.Sequential) else target
        if isinstance(last, Attention) and type(last) is ATTENTIONS[attention]:
            raise AttachError(f"{site.block or site.target!r} already has attention {attention!r}; detach first")


def build(attention: str, site: Site, size: int | None, lossless: bool, options: dict[str, object]) -> nn.Module:
    """The gate for ``site``, neutral if ``lossless``.

    Raises:
        AttachError: the attention cannot be neutral, or does not keep its input's shape.
        ConfigError: an option does not fit the site's channels.
    """
    own = options if size is None else {**options, "kernel_size": size}
    gate = make_attention(attention, site.channels, **own)
    if not isinstance(gate, Attention):
        raise AttachError(
            f"attention {attention!r} takes the place of a convolution, so it cannot follow {site.target!r}"
        )
    if lossless:
        gate.neutralize()
    return gate


def insert(model: nn.Module, site: Site, attention: str, gate: nn.Module, *, lossless: bool) -> None:
    """Put ``gate`` at ``site``, on the device, in the dtype and in the mode of its block."""
    block, target = model.get_submodule(site.block), model.get_submodule(site.target)
    like = next((p for p in (*target.parameters(), *block.parameters()) if p.is_floating_point()), None)
    gate = gate.to(device=site.device, dtype=None if like is None else like.dtype).train(block.training)
    keeper = site.target if site.append else site.block
    below = len(keeper) + 1 if keeper else 0
    record = Record(attention, site.target[below:], "hook", lossless=lossless)
    if site.append and isinstance(target, nn.Sequential):
        record.mode, record.target = "append", str(len(target) - 1)
        target.append(gate)
    else:
        hooks.install(block, free_key(block, attention_key(attention)), record.target, gate, site.axis)
    record.affine = None if site.affine is None else site.affine[below:]
    gate.attachment = record  # pyright: ignore[reportArgumentType]


def free_key(block: nn.Module, key: str) -> str:
    """``key``, or with a number behind it if ``block`` uses that name itself (timm's blocks have ``se``)."""
    count = 2
    free = key
    while hasattr(block, free):
        free, count = f"{key}{count}", count + 1
    return free


def remove(model: nn.Module, name: str, gate: nn.Module, record: Record) -> None:
    """Undo what `attach` and `fold` did for one gate."""
    keeper, _, key = name.rpartition(".")
    block = model.get_submodule(keeper)
    if hooks.is_folded(gate, record):
        unfold(block, record)
    if record.mode == "hook":
        hooks.uninstall(block, key, record.target)
    elif record.mode == "append":
        del block[int(key)]  # pyright: ignore[reportIndexIssue]
    elif record.replaced is not None:
        like = next(gate.parameters())
        block.add_module(key, record.replaced.to(like.device, like.dtype).train(block.training))
