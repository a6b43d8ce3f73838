"""Find the channel attention in a network: watch one run of it, then probe the modules that may be attention."""

import functools
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, fx, nn

from ecanet.errors import summarize
from ecanet.surgery.conversion import Kernel, NoKernel, find_kernel
from ecanet.surgery.example import run_again
from ecanet.surgery.forms import split
from ecanet.surgery.modules import list_modules
from ecanet.surgery.probing import Probe, Run, Verdict, describe_taps
from ecanet.surgery.recording import Trace

CONVOLUTION = nn.modules.conv._ConvNd  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True)
class Candidate:
    """A module of the network, and what a probe found."""

    name: str
    run: Run
    probe: Probe | None
    verdict: Verdict
    kernel: Kernel | NoKernel

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.run.module

    @property
    def is_eca(self) -> bool:
        """True for an ECA, also one that cannot be converted."""
        return isinstance(self.kernel, Kernel) or self.kernel.is_eca

    @property
    def resembles_eca(self) -> bool:
        """True if it slides a kernel over the channels."""
        return self.is_eca or (self.probe is not None and bool(self.probe.operations.convolved))

    def describe(self) -> str:
        """Return the name and the class, for messages."""
        return f"{self.name!r} ({type(self.module).__name__})"


class Watcher:
    """The runs of modules in one run of the network: the first run of each, if it may be one of channel attention."""

    def __init__(self, chosen: Iterable[nn.Module]):
        self.chosen = set(chosen)
        self.runs: dict[nn.Module, Run] = {}
        self.rejected: set[nn.Module] = set()

    def call(
        self, module: nn.Module, forward: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """Run the forward of ``module`` and note it."""
        place = next((p for p, a in (*enumerate(args), *kwargs.items()) if isinstance(a, Tensor)), None)
        x = None if place is None else args[place] if isinstance(place, int) else kwargs[place]
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 3 or module in self.rejected:
            return forward(*args, **kwargs)
        if module in self.runs:
            self.runs[module].widths.add(x.shape[1])
            self.runs[module].count += 1
            return forward(*args, **kwargs)
        order = len(self.runs) + len(self.rejected)
        output = forward(*args, **kwargs)
        if module in self.chosen or may_scale(x, output):
            assert place is not None
            # The activation itself is not kept: the probe makes another one.
            rest = tuple(None if i == place else a for i, a in enumerate(args))
            keeps_shape = isinstance(output, Tensor) and output.shape == x.shape
            self.runs[module] = Run(
                module, order, rest, {**kwargs}, place, x.shape, x.device, keeps_shape, {x.shape[1]}
            )
        else:
            self.rejected.add(module)
        return output


def may_scale(x: Tensor, y: object) -> bool:
    """Return whether ``y`` may be ``x`` times a factor for each plane, or such a factor.

    A module that worked in place returns ``x`` itself, which may be so: the probe decides.
    """
    if x.is_meta or not x.isfinite().all() or x.shape[2:].numel() == 1:
        return True
    # One image is enough to reject a layer, and nearly all are rejected.
    return split(x[:1], y[:1]) is not None if isinstance(y, Tensor) and y.dim() else split(x, y) is not None


@contextmanager
def watch(modules: Iterable[nn.Module], chosen: Iterable[nn.Module]) -> Generator[Watcher]:
    """Note the runs of ``modules``; forward itself is wrapped, so a module that is not called by a call is seen too."""
    watcher = Watcher(chosen)
    wrapped: list[tuple[nn.Module, object]] = []
    try:
        for module in modules:
            wrapped.append((module, vars(module).get("forward")))
            vars(module)["forward"] = wrap(watcher, module, module.forward)
        yield watcher
    finally:
        for module, own in wrapped:
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own


def wrap(watcher: Watcher, module: nn.Module, forward: Callable[..., object]) -> Callable[..., object]:
    """Return ``forward``, watched."""

    @functools.wraps(forward)
    def run(*args: object, **kwargs: object) -> object:
        return watcher.call(module, forward, args, kwargs)

    return run


def may_be_attention(module: nn.Module) -> bool:
    """Return whether ``module`` is worth watching: no layer of PyTorch's own, no gate of ours, no k x k convolution."""
    leaf = type(module).__module__.startswith("torch.") and not any(True for _ in module.children())
    leaf = leaf and not isinstance(module, fx.GraphModule)
    return not leaf and not hasattr(module, "attachment") and find_spatial_convolution(module) is None


def find_spatial_convolution(module: nn.Module) -> str | None:
    """Return the kernel of a convolution over space inside ``module``, None without one.

    Along one axis, a kernel for one channel, or one for each channel, may slide over channels: the probe decides.
    """
    for part in module.modules():
        if isinstance(part, CONVOLUTION):
            taps = [k for k in part.kernel_size if k > 1]
            if len(taps) > 1 or (taps and part.in_channels > 1 and part.groups == 1):
                return describe_taps(part.kernel_size)
    return None


def recognise(model: nn.Module, trace: Trace, chosen: Iterable[nn.Module]) -> list[Candidate]:
    """Return the modules that scale channels, in running order; ``chosen`` are kept whatever they compute."""
    chosen = set(chosen)
    modules = list_modules(model)
    worth = [module for _, module in modules if may_be_attention(module) or module in chosen]
    with watch(worth, chosen) as watcher:
        run_again(model, trace)
    found: list[Candidate] = []
    for name, module in modules:
        if name and module in watcher.runs:
            candidate = examine(name, watcher.runs[module])
            if candidate.verdict.kind != "other" or module in chosen:
                found.append(candidate)
    return sorted(found, key=lambda c: c.run.order)


def examine(name: str, run: Run) -> Candidate:
    """Probe one module."""
    kernel = find_spatial_convolution(run.module)
    nothing = NoKernel("is no channel attention")
    if kernel is not None:
        return Candidate(
            name, run, None, Verdict("other", f"contains a {kernel} convolution", may_be_taken=False), nothing
        )
    try:
        probe = Probe(run)
    except Exception as error:  # copying runs code of the user's
        reason = summarize(error)
        return Candidate(name, run, None, Verdict("other", f"cannot be copied to be examined ({reason})"), nothing)
    verdict = probe.examine()
    return Candidate(name, run, probe, verdict, find_kernel(probe) if verdict.kind == "attention" else nothing)


def keep_innermost(found: Iterable[Candidate]) -> list[Candidate]:
    """Return the channel attention to replace: of modules inside each other, the innermost one that multiplies.

    A module that returns only its factor is a part of the module around it, which multiplies. But where only the inner
    one is ECA (x + x * eca(x)), it is the one to convert.
    """
    attention = [c for c in found if c.verdict.kind == "attention" and c.probe and c.probe.form]
    products = [c for c in attention if returns_product(c)]
    factors = [c for c in attention if not returns_product(c)]
    kept = [c for c in products if not any(is_inside(other, c) for other in products)]
    exact = [f for f in factors if isinstance(f.kernel, Kernel)]
    kept = [c for c in kept if isinstance(c.kernel, Kernel) or not any(is_inside(f, c) for f in exact)]
    free = [f for f in factors if not any(is_inside(f, c) for c in kept)]
    kept += [f for f in free if not any(is_inside(other, f) for other in (*free, *kept))]
    return sorted(kept, key=lambda c: c.run.order)


def returns_product(candidate: Candidate) -> bool:
    """Return whether the module multiplies its input itself."""
    return (
        candidate.probe is not None and candidate.probe.form is not None and candidate.probe.form.returns == "product"
    )


def is_inside(inner: Candidate, outer: Candidate) -> bool:
    """Return whether one module is a part of the other."""
    return inner.module is not outer.module and any(m is inner.module for m in outer.module.modules())
