"""The one table of attention names, and the one place where ``attention=`` becomes something that can be built."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import cast

from torch import nn

from ecanet.attention.frequencies import Fca
from ecanet.attention.gates import ECA, ECANS, SE, SEGC, SEVar1, SEVar2, SEVar3
from ecanet.attention.long_range import AugmentedConv2d, DoubleAttention, NonLocal
from ecanet.attention.moments import GCT, SRM
from ecanet.attention.others import CBAM, GlobalContext, GSoP
from ecanet.attention.positions import ELA, EMA, CoordinateAttention, SimAM
from ecanet.attention.statistics import ASR, ESE
from ecanet.errors import ConfigError, summarize

AttentionLike = str | Callable[..., nn.Module]
"""A name, a dotted path of a class, a class, or any callable from a channel count to a module."""


def _build_augmented(channels: int, heads: int = 8) -> nn.Module:
    return AugmentedConv2d(channels, channels, heads=heads)


def _build_nothing(channels: int) -> nn.Module:
    return nn.Identity()


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
    "aa": _build_augmented,
    "asr": ASR,
    "ese": ESE,
    "gct": GCT,
    "srm": SRM,
    "fca": Fca,
    "simam": SimAM,
    "coord": CoordinateAttention,
    "ela": ELA,
    "ema": EMA,
}

BLOCK_KEYS = frozenset(
    ["attention", "bn1", "bn2", "bn3", "conv", "conv1", "conv2", "conv3", "downsample", "gate_key", "relu", "training"]
)
"""Attributes of this library's and torchvision's blocks: a gate must not take the place of one of these."""


@dataclass(frozen=True)
class AttentionKind:
    """One kind of attention: its name, the attribute under which a block keeps it, and the callable that builds it."""

    name: str
    key: str
    factory: Callable[..., nn.Module]

    @property
    def is_builtin(self) -> bool:
        """True if this kind comes from the table of names."""
        return self.factory is _build_nothing or _unwrap(self.factory) in ATTENTIONS.values()

    @property
    def path(self) -> str | None:
        """The name of the table, or the dotted path of a class, by which a file can name this kind; else None."""
        if self.factory is _build_nothing or self.factory in ATTENTIONS.values():
            return self.name
        if not isinstance(self.factory, type) or self.factory.__module__ == "__main__":
            return None
        return None if "." in self.factory.__qualname__ else f"{self.factory.__module__}.{self.factory.__qualname__}"

    @property
    def options(self) -> list[str]:
        """Names of the options that the factory takes beside the channel count."""
        return [p.name for p in self._parameters()[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]

    def check(self, options: Mapping[str, object], arguments: Iterable[str] = ()) -> None:
        """Check the names of ``options``; ``arguments`` are the caller's own, one of which may have been meant.

        Raises:
            ConfigError: the factory does not take one of ``options``.
        """
        if any(p.kind is p.VAR_KEYWORD for p in self._parameters()):
            return
        for option in options:
            if option not in self.options:
                raise ConfigError(self._refusal(option, list(arguments)))

    def build(self, channels: int, **options: object) -> nn.Module:
        """Build the attention for ``channels`` channels.

        Raises:
            ConfigError: an option does not fit, or the factory returns no module.
        """
        self.check(options)
        for p in self._parameters()[1:]:
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in options:
                raise ConfigError(f"attention {self.name!r} needs the option {p.name!r}; give {p.name}=")
        module = cast(object, self.factory(channels, **options))
        if not isinstance(module, nn.Module):
            raise ConfigError(f"attention {self.name!r} must return a torch.nn.Module, got {type(module).__name__}")
        return module

    def _parameters(self) -> list[inspect.Parameter]:
        try:
            parameters = list(inspect.signature(self.factory).parameters.values())
        except ValueError:  # some callables written in C have no signature
            parameters = []
        if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
            raise ConfigError(f"attention {self.name!r} takes no channel count; its first argument must be one")
        return parameters

    def _refusal(self, option: str, arguments: list[str]) -> str:
        near = get_close_matches(option, [*self.options, *arguments], 1)
        # An option of another attention is no typing error.
        mistyped = near and not any(option in find_attention(other).options for other in ATTENTIONS)
        if mistyped and near[0] in arguments:
            return f"there is no argument {option!r}; did you mean {near[0]!r}?"
        remedy = f"did you mean {near[0]!r}?" if mistyped else f"it takes {', '.join(self.options) or 'no options'}"
        return f"attention {self.name!r} has no option {option!r}; {remedy}"


def find_attention(attention: AttentionLike) -> AttentionKind:
    """Return what ``attention=`` means: a name of the table, a dotted path, a class, or a callable.

    >>> find_attention("se-var1").key, find_attention(ECA).name
    ('se_var1', 'eca')

    Raises:
        ConfigError: the name is unknown, the path cannot be imported, or the value is of another type.
    """
    if isinstance(attention, str):
        if attention == "none":
            return AttentionKind("none", "no_attention", _build_nothing)
        if attention in ATTENTIONS:
            return AttentionKind(attention, attention.replace("-", "_"), ATTENTIONS[attention])
        if "." not in attention:
            raise ConfigError(f"unknown attention {attention!r}; choose one of {', '.join(list_attentions())}")
        return find_attention(_import_class(attention))
    given: object = attention
    if isinstance(given, nn.Module):
        raise ConfigError(
            f"attention must be built once per block: pass the class {type(given).__name__}, not an instance of it"
        )
    if not callable(given) or (isinstance(given, type) and not issubclass(given, nn.Module)):
        raise ConfigError(
            f"attention must be a name, a module class or a callable from a channel count to a module, got {given!r}"
        )
    known = next((name for name, factory in ATTENTIONS.items() if factory is _unwrap(attention)), None)
    if known is not None:
        return AttentionKind(known, known.replace("-", "_"), attention)
    name = getattr(_unwrap(attention), "__name__", type(attention).__name__)
    return AttentionKind(name, _key_of(name), attention)


def list_attentions() -> list[str]:
    """Return the names that ``attention=`` takes, ``"none"`` first.

    >>> list_attentions()[:3]
    ['none', 'eca', 'eca-ns']
    """
    return ["none", *ATTENTIONS]


def make_attention(attention: AttentionLike, channels: int, **options: object) -> nn.Module:
    """Build ``attention``, a name, a class or a callable, for ``channels`` channels.

    >>> make_attention("eca", 64, kernel_size=7)
    ECA(
      64, kernel_size=7
      (conv): Conv1d(1, 1, kernel_size=(7,), stride=(1,), padding=(3,), bias=False)
    )

    Raises:
        ConfigError: the name is unknown, or an option is not one of this attention's.
    """
    return find_attention(attention).build(channels, **options)


def options_of(attention: AttentionLike) -> list[str]:
    """Return the names of the options that ``attention`` takes beside its channel count.

    >>> options_of("se")
    ['reduction', 'bias']
    """
    return find_attention(attention).options


def _import_class(path: str) -> type[nn.Module]:
    """Return the module class at ``path``, such as ``"package.module.Class"``.

    Checkpoints and recipes hold such paths. A class of modules is harmless to build; an arbitrary function may not be
    harmless to call, so it has to be passed as an object.
    """
    module_name, _, name = path.rpartition(".")
    try:
        found: object = getattr(import_module(module_name), name, None)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"cannot import attention {path!r} ({summarize(error)}); its folder must be on Python's path (PYTHONPATH)"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"attention {path!r} is not a class of torch.nn.Module; give package.module.Class")
    return found


def _unwrap(attention: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return the function or class inside a `functools.partial`."""
    return cast("partial[nn.Module]", attention).func if isinstance(attention, partial) else attention


def _key_of(name: str) -> str:
    """Return the snake_case attribute for a class or function called ``name``.

    >>> _key_of("MyGate"), _key_of("SEPlus"), _key_of("<lambda>"), _key_of("Conv1")
    ('my_gate', 'se_plus', 'own_attention', 'conv1_attention')
    """
    if not name.isidentifier():
        return "own_attention"
    key = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().strip("_") or "own_attention"
    taken = key in BLOCK_KEYS or hasattr(nn.Module, key)
    return f"{key}_attention" if taken else key
