"""Attention modules, and the one table of their names."""

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from torch import nn

from ecanet.attention.base import Attention
from ecanet.attention.gates import ECA, ECANS, SE, SEGC, ChannelAttention, SEVar1, SEVar2, SEVar3, adaptive_kernel_size
from ecanet.attention.long_range import AugmentedConv2d, DoubleAttention, NonLocal
from ecanet.attention.others import CBAM, GlobalContext, GSoP
from ecanet.errors import ConfigError

__all__ = [
    "ATTENTIONS",
    "CBAM",
    "ECA",
    "ECANS",
    "SE",
    "SEGC",
    "Attention",
    "AugmentedConv2d",
    "ChannelAttention",
    "DoubleAttention",
    "GSoP",
    "GlobalContext",
    "NonLocal",
    "SEVar1",
    "SEVar2",
    "SEVar3",
    "adaptive_kernel_size",
    "attention_key",
    "check_attention",
    "list_attentions",
    "make_attention",
    "options_of",
]


def _augmented(channels: int, heads: int = 8) -> nn.Module:
    return AugmentedConv2d(channels, channels, heads=heads)


ATTENTIONS: dict[str, Callable[..., nn.Module]] = {
    "eca": ECA,
    "eca-ns": ECANS,
    "se": SE,
    "se-var1": SEVar1,
    "se-var2": SEVar2,
    "se-var3": SEVar3,
    "se-gc": SEGC,
    "cbam": CBAM,
    "gc": GlobalContext,
    "gsop": GSoP,
    "a2": DoubleAttention,
    "non-local": NonLocal,
    "aa": _augmented,
}


def list_attentions() -> list[str]:
    """Names that ``attention=`` takes, ``"none"`` first.

    >>> list_attentions()[:3]
    ['none', 'eca', 'eca-ns']
    """
    return ["none", *ATTENTIONS]


def make_attention(name: str, channels: int, **options: object) -> nn.Module:
    """Build the attention called ``name`` for ``channels`` channels.

    >>> make_attention("eca", 64, kernel_size=7)
    ECA(
      64, kernel_size=7
      (conv): Conv1d(1, 1, kernel_size=(7,), stride=(1,), padding=(3,), bias=False)
    )

    Raises:
        ConfigError: the name is unknown, or an option is not one of this attention's.
    """
    check_attention(name, options)
    return nn.Identity() if name == "none" else ATTENTIONS[name](channels, **options)


def check_attention(name: str, options: dict[str, object], beside: Sequence[str] = ()) -> None:
    """Raise ConfigError unless ``name`` is known and takes every one of ``options``.

    ``beside`` are the caller's own arguments, of which one may have been meant.
    """
    if name not in list_attentions():
        raise ConfigError(f"unknown attention {name!r}; choose one of {', '.join(list_attentions())}")
    for option in options:
        if option in options_of(name):
            continue
        near = get_close_matches(option, beside, 1)
        if near and not any(option in options_of(other) for other in ATTENTIONS):
            raise ConfigError(f"there is no argument {option!r}; did you mean {near[0]!r}?")
        takes = ", ".join(options_of(name)) or "no options"
        raise ConfigError(f"attention {name!r} has no option {option!r}; it takes {takes}")


def options_of(name: str) -> list[str]:
    """Names of the options that the attention called ``name`` takes beside its channel count."""
    return [] if name == "none" else list(inspect.signature(ATTENTIONS[name]).parameters)[1:]


def attention_key(name: str) -> str:
    """The attribute, and so the state-dict key, under which a block keeps the attention called ``name``.

    >>> attention_key("eca"), attention_key("se-var1")
    ('eca', 'se_var1')
    """
    return "no_attention" if name == "none" else name.replace("-", "_")
