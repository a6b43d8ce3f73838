"""Choose the modules that `replace=` means, and explain why others are left as they are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ecanet.attention import ECA
from ecanet.errors import AttachError, ConfigError
from ecanet.surgery.conversion import Kernel, NoKernel
from ecanet.surgery.modules import list_modules
from ecanet.surgery.recognition import Candidate, find_spatial_convolution, is_inside, keep_innermost, recognise
from ecanet.surgery.recording import PRODUCTS, RESHAPES, Call, Trace, Value
from ecanet.surgery.selection import Where, is_selected

Replace = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""The kind of modules to replace: "se", "eca", a class, or a function of (name, module)."""


@dataclass(frozen=True)
class LeftOut:
    """A module that cannot be replaced, and why."""

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what} {self.reason}"


@dataclass(frozen=True)
class Choice:
    """The modules to replace, and those that are left as they are though they are meant."""

    chosen: list[Candidate]
    left_out: list[LeftOut]
    others: list[Candidate]
    """Channel attention of the other kind."""
    inline: list[str]
    """Sentences about blocks that multiply by a factor in their own forward."""

    def explain(self, model: nn.Module, replace: Replace) -> str:
        """Return the message for a network in which nothing can be replaced."""
        kind, network = describe_kind(replace), type(model).__name__
        if self.left_out:
            return f"cannot replace the {kind} modules of {network}: {'; '.join(shorten(map(str, self.left_out)))}"
        message = f"found no {kind} modules to replace in {network}"
        if self.others:
            return f"{message}: {self.describe_others('se' if replace == 'eca' else 'eca')}"
        count = sum(hasattr(module, "attachment") for module in model.modules())
        if count:
            return f"{message}: its {count} gates were put in by attach(); detach() takes them out"
        if self.inline:
            return f"{message}: {self.inline[0]}"
        return f"{message}; attach without replace= adds gates"

    def describe_others(self, kind: str) -> str:
        """Return the sentence about channel attention that only ``replace=kind`` takes."""
        one, more = self.others[0], len(self.others) - 1
        subject = one.describe() + (f" and {more} more are" if more else " is")
        if isinstance(one.module, ECA):
            return f"{subject} this library's own ECA already"
        reason = f"no ECA ({one.kernel.reason})" if isinstance(one.kernel, NoKernel) else "ECA"
        return f"{subject} {reason}; replace={kind!r} takes {'them' if more else 'it'}"


def check_replace(replace: object) -> None:
    """Check the type of ``replace=``.

    Raises:
        ConfigError: it is no known name, no class and no function.
    """
    known = replace in ("se", "eca") if isinstance(replace, str) else callable(replace)
    if not known:
        raise ConfigError(
            f"replace= takes 'se', 'eca', a module class or a function of (name, module), got {replace!r}"
        )


def describe_kind(replace: Replace) -> str:
    """Return how messages name what is replaced.

    >>> describe_kind("se"), describe_kind(nn.Identity)
    ("'se'", "'Identity'")
    """
    return repr(replace if isinstance(replace, str) else getattr(replace, "__name__", type(replace).__name__))


def shorten(texts: Sequence[str] | Iterator[str]) -> list[str]:
    """Return the first three texts, and how many more there are."""
    texts = list(texts)
    return texts if len(texts) <= 3 else [*texts[:3], f"and {len(texts) - 3} more"]


def choose(model: nn.Module, trace: Trace, replace: Replace, where: Where | None, *, exactly: bool) -> Choice:
    """Return the modules that ``replace`` and ``where`` select; ``exactly`` asks for those that can be converted.

    Raises:
        AttachError: ``where`` selects none of the modules, or ``replace`` selects none of the network's.
    """
    selected = [] if isinstance(replace, str) else select(model, replace)
    found = recognise(model, trace, [module for _, module in selected])
    if isinstance(replace, str):
        choice = choose_kind(found, replace, exactly=exactly)
        choice.inline.extend(find_inline_products(model, trace))
    else:
        choice = choose_selected(found, selected)
    if where is None:
        return choice
    kept = [c for c in choice.chosen if is_meant(model, c.name, where)]
    if choice.chosen and not kept:
        raise AttachError(
            f"where={where!r} selects none of the {len(choice.chosen)} {describe_kind(replace)} modules, such as "
            f"{choice.chosen[0].name!r}"
        )
    return Choice(kept, choice.left_out if kept else [], choice.others, choice.inline)


def select(
    model: nn.Module, replace: type[nn.Module] | Callable[[str, nn.Module], bool]
) -> list[tuple[str, nn.Module]]:
    """Return the names and modules that a class or a function selects, the innermost where they are nested.

    Raises:
        AttachError: there are none.
    """
    chosen = [(name, module) for name, module in list_modules(model) if name and is_selected(replace, name, module)]
    if not chosen:
        raise AttachError(f"replace={describe_kind(replace)} selects no module of {type(model).__name__}")
    return [
        (name, m) for name, m in chosen if not any(other is not m and other in set(m.modules()) for _, other in chosen)
    ]


def choose_selected(found: list[Candidate], selected: list[tuple[str, nn.Module]]) -> Choice:
    """Return the choice among the modules that the user selected: all that return one tensor of their input's shape."""
    candidates = {c.module: c for c in found}
    choice = Choice([], [], [], [])
    for name, module in selected:
        candidate = candidates.get(module)
        what = f"{name!r} ({type(module).__name__})"
        if candidate is None:
            choice.left_out.append(LeftOut(what, "was not run with the example on a tensor (N, C, ...)"))
        elif candidate.verdict.kind == "attention" or (candidate.run.keeps_shape and candidate.verdict.may_be_taken):
            choice.chosen.append(candidate)
        else:
            taken = candidate.verdict.may_be_taken
            reason = "returns no tensor of its input's shape" if taken else candidate.verdict.reason
            choice.left_out.append(LeftOut(what, reason))
    return choice


def choose_kind(found: list[Candidate], replace: str, *, exactly: bool) -> Choice:
    """Return the choice for "se" or "eca"."""
    own = [c for c in found if isinstance(c.module, ECA)] if exactly else []
    innermost = [c for c in keep_innermost(found) if c not in own]
    meant = [c for c in innermost if c.is_eca == (replace == "eca")]
    others = [c for c in innermost if c not in meant] or (own if replace == "eca" else [])
    chosen = [c for c in meant if isinstance(c.kernel, Kernel)] if replace == "eca" and exactly else meant
    left_out: list[LeftOut] = []
    for c in found:
        similar = c.verdict.kind == "similar" and c.resembles_eca == (replace == "eca")
        unlike = replace == "eca" and exactly and c.verdict.kind == "attention" and c.resembles_eca
        nested = any(is_inside(c, other) or is_inside(other, c) for other in (*chosen, *others, *own))
        if (similar or unlike) and c not in (*chosen, *own) and not nested:
            assert similar or not isinstance(c.kernel, Kernel)
            reason = c.verdict.reason if similar else getattr(c.kernel, "reason", "")
            left_out.append(LeftOut(c.describe(), reason))
    return Choice(chosen, left_out, others, [])


def is_meant(model: nn.Module, name: str, where: Where) -> bool:
    """Return whether ``where`` selects the module called ``name``: it or, by a pattern or a class, a module around it.

    A function decides for each module alone, so it gets the module itself only.
    """
    if not isinstance(where, str | type):
        return is_selected(where, name, model.get_submodule(name))
    while name:
        if is_selected(where, name, model.get_submodule(name)):
            return True
        name = name.rpartition(".")[0]
    return False


def find_inline_products(model: nn.Module, trace: Trace) -> list[str]:
    """Return a sentence for each module whose own forward multiplies planes by one number each, made from the input."""
    names = {module: name for name, module in list_modules(model)}
    found: dict[str, None] = {}
    for value in trace.values:
        if value.op not in PRODUCTS or len(value.parents) != 2 or len(value.shape) < 3:
            continue
        small, large = sorted(value.parents, key=lambda v: v.shape.numel())
        factors = small.shape[:2] == large.shape[:2] and small.shape[2:].numel() == 1 < large.shape[2:].numel()
        if factors and len(small.shape) == len(large.shape) and is_sigmoid(small):
            inner: Call | None = max(
                (c for c in trace.calls if c.start <= value.index < c.end), key=lambda c: c.depth, default=None
            )
            if inner is not None and inner.module in names:
                name, kernel = names[inner.module], find_spatial_convolution(inner.module)
                found[
                    (f"{name!r} ({type(inner.module).__name__})" if name else "the network itself")
                    + " scales channels in its own forward"
                    + (f" and contains a {kernel} convolution, so it is not replaced" if kernel else "")
                ] = None
    return list(found)


def is_sigmoid(value: Value) -> bool:
    """Return whether ``value`` is a (hard) sigmoid, perhaps in another shape."""
    while "sigmoid" not in value.op and value.op in RESHAPES and value.parents:
        value = value.parents[0]
    return "sigmoid" in value.op
