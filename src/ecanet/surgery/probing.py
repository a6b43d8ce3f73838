"""Run a copy of a module on chosen numbers to learn what it computes.

A module is channel attention if its output is its input times a factor that is constant over each plane and depends on
the channel means alone. Inputs with the same means and other content give such a module the same factor; other means
give it another one.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecanet.errors import summarize
from ecanet.ops import hook_dictionaries
from ecanet.surgery.forms import Form, agree, split
from ecanet.surgery.recording import CONVOLUTIONS, iterate_tensors

LARGEST_GATE = 2.5
"""A factor stays below this for means of any size, unlike the output of a pooling or of a classifier."""

_OPERATIONS = ((r"(^|_)a?max(_|$)", "max pooling"), (r"(^|_)(std|var|norm)", "the spread within a plane"))


@dataclass(eq=False)
class Run:
    """How the network ran a module: the arguments, one of which is a tensor x (N, C, ...)."""

    module: nn.Module
    order: int
    """Position in the run."""
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    place: int | str
    """Position or name of x among the arguments, where the stored value is None."""
    shape: torch.Size
    device: torch.device
    keeps_shape: bool
    """True if the module returned one tensor of the shape of x."""
    widths: set[int] = field(default_factory=set[int])
    """Channel counts of x in all runs of the module."""
    count: int = 1
    """How often the module ran."""


@dataclass(frozen=True)
class Verdict:
    """What a probe found."""

    kind: Literal["attention", "similar", "other"]
    """"similar": it scales channels or returns a factor for each, but is not channel attention for the given reason."""
    reason: str = ""
    may_be_taken: bool = True
    """False if no gate can take its place, even if the user selects it."""


OTHER = Verdict("other", "does not multiply each channel by a factor")


class Operations(TorchFunctionMode):
    """While active, note the names of all operations, and the inputs of convolutions with more than one tap."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.convolved: list[tuple[Tensor, tuple[int, ...]]] = []
        """Input and kernel shape of each convolution that reaches over several positions."""
        self.drops = False
        """True after a dropout that has a probability, also where it does nothing in evaluation."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Note the operation and run it."""
        kwargs = kwargs or {}
        self.names.append(func.__name__)
        if "dropout" in func.__name__:
            p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            self.drops |= isinstance(p, float) and p > 0
        if func.__name__ in CONVOLUTIONS:
            x, weight = list(iterate_tensors((args, kwargs)))[:2]
            if max(weight.shape[2:], default=1) > 1:
                self.convolved.append((x.clone(), tuple(weight.shape[2:])))
        return func(*args, **kwargs)


class Probe:
    """A copy of a module, in evaluation mode and without users' hooks, that runs on numbers of our choice."""

    def __init__(self, run: Run):
        self.run = run
        self.module = copy_module(run.module)
        self.own = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        planes = run.shape[2:]
        # With one position a plane, any elementwise product would look like channel attention.
        self.shape = run.shape if planes.numel() > 1 else torch.Size((*run.shape[:2], *(3 for _ in planes)))
        self.dtype = torch.float64
        self.form: Form | None = None
        self.operations = Operations()

    @property
    def drops(self) -> bool:
        """True if the module has a dropout."""
        return self.operations.drops

    def examine(self) -> Verdict:
        """Return whether the module is channel attention, and if it is not, why."""
        self.draw(0)
        reason = self.start()
        if reason:
            return Verdict("other", reason)
        if self.form is None:
            return OTHER
        for seed in range(3):  # a drawn ReLU may be dead
            verdict = self.compare(seed)
            if verdict is not None:
                return verdict
        return Verdict("other", "multiplies by constants")

    def start(self) -> str | None:
        """Find a batch size and a dtype that the module takes, and its `form`; return the error if there is none.

        Two images show whether one image influences another. But a module may take its own batch size only, or
        contain constants in float32.
        """
        error: Exception | None = None
        for dtype in (torch.float64, torch.float32):
            self.dtype = dtype
            self.module.to(dtype)
            for n in dict.fromkeys((2, self.run.shape[0])):
                self.shape = torch.Size((n, *self.shape[1:]))
                x = self.noise(self.shape, 0) + self.noise((n, self.shape[1], *(1 for _ in self.shape[2:])), 1)
                try:
                    y = self.call(x)
                except Exception as failed:  # a user's forward may raise anything
                    error = error or failed
                    continue
                found = split(x, y)
                self.form = found[0] if found else None
                return None
        return f"does not run by itself ({summarize(cast(Exception, error))})"

    def compare(self, seed: int) -> Verdict | None:
        """Compare factors for equal means and for other means; return None if they do not depend on the means."""
        assert self.form is not None
        self.draw(seed)
        channels = self.shape[self.form.axis]
        means, others = (1.5 * self.noise((self.shape[0], channels), 10 * seed + i) for i in range(2))
        others[: self.shape[0] - 1] = means[: self.shape[0] - 1]
        first, before = self.read(means, 0), self.operations.convolved
        second, after = self.read(means, 1, spread=3.0), self.operations.convolved
        third = self.read(others, 0)
        if first is None or second is None or third is None:
            return OTHER
        if not agree(first, second):
            return Verdict("similar", f"computes {self.describe_operations()}")
        for (a, taps), (b, _) in zip(before, after, strict=False):
            if sum(t > 1 for t in taps) > 1 or not agree(a, b):
                return Verdict("similar", f"contains a {describe_taps(taps)} convolution", may_be_taken=False)
        if not agree(first[:-1], third[:-1]):
            return Verdict("similar", "mixes the images of a batch")
        if agree(first, third):
            return None
        return self.judge_form(means)

    def judge_form(self, means: Tensor) -> Verdict:
        """Return the verdict on a module whose factor depends on the channel means alone."""
        assert self.form is not None
        if self.form.returns != "product":
            far = self.read(1000 * means, 0)
            if far is None or float(far.abs().max()) > LARGEST_GATE:
                return Verdict("other", "returns a number for each channel that is no factor")
        if self.form.in_tuple:
            return Verdict("similar", "returns several values, and a gate returns one tensor", may_be_taken=False)
        if len(self.run.args) + len(self.run.kwargs) > 1 or self.run.place not in (0, "x"):
            return Verdict(
                "similar", "is called with other arguments than x, and a gate takes x alone", may_be_taken=False
            )
        if self.form.axis != 1:
            return Verdict("similar", f"has its channels on axis {self.form.axis}, not 1", may_be_taken=False)
        if len(self.run.widths) > 1:
            widths = " and ".join(map(str, sorted(self.run.widths)))
            return Verdict("similar", f"runs with {widths} channels, and a gate has one number", may_be_taken=False)
        return Verdict("attention")

    def describe_operations(self) -> str:
        """Return what the factor depends on besides the channel means."""
        for pattern, text in _OPERATIONS:
            if any(re.search(pattern, name) and name != "clamp_max" for name in self.operations.names):
                return f"{text} too"
        return "with more than the channel means"

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Give every parameter random values, so that zeroed and neutral layers show what they are."""
        for i, parameter in enumerate(p for p in self.module.parameters() if p.is_floating_point()):
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(self.noise(parameter.shape, 1000 * (seed + 1) + i) / max(fan_in, 1) ** 0.5)

    @torch.no_grad()
    def restore(self) -> None:
        """Give every parameter its own values again."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(self.own[name])

    def make_input(self, means: Tensor, seed: int, spread: float = 1.0) -> Tensor:
        """Return an input with exactly these channel means (N, C)."""
        assert self.form is not None
        axis = self.form.axis
        planes = self.noise(self.shape, 100 + seed)
        inner = tuple(i for i in range(planes.dim()) if i not in (0, axis))
        shape = [n if i in (0, axis) else 1 for i, n in enumerate(self.shape)]
        return spread * (planes - planes.mean(inner, keepdim=True)) + means.reshape(shape)

    def read(self, means: Tensor, seed: int, spread: float = 1.0) -> Tensor | None:
        """Return the factor (N, C) for an input with these channel means; None if there is none."""
        x = self.make_input(means, seed, spread)
        found = split(x, self.call(x))
        return found[1] if found and found[0] == self.form else None

    @torch.no_grad()
    def call(self, x: Tensor) -> object:
        """Return what the module returns for ``x``, the other arguments being those of the run."""
        args = [self.cast(a) for a in self.run.args]
        kwargs = {name: self.cast(a) for name, a in self.run.kwargs.items()}
        if isinstance(self.run.place, int):
            args[self.run.place] = x.clone()  # the module may change its input in place
        else:
            kwargs[self.run.place] = x.clone()
        self.operations = Operations()
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), self.operations:  # pyright: ignore[reportUnknownMemberType]
            return self.module(*args, **kwargs)

    def cast(self, argument: object) -> object:
        """Return a tensor argument in the dtype of this probe, anything else as it is."""
        if isinstance(argument, Tensor) and argument.is_floating_point():
            return argument.to(self.dtype)
        return argument

    def noise(self, shape: Sequence[int], seed: int) -> Tensor:
        """Return standard normal numbers."""
        generator = torch.Generator().manual_seed(seed)
        device = torch.device("cpu") if self.run.device.type == "meta" else self.run.device
        return torch.randn(tuple(shape), generator=generator, device="cpu").to(device, self.dtype)


def copy_module(module: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, on the CPU if the module has no data, without the hooks of users.

    Hooks that compute weights (old weight norm) stay. A user's hook is not even copied: it may hold a whole recorder.
    """
    memo: dict[int, object] = {}
    for part in module.modules():
        for hooks in hook_dictionaries(part):
            memo[id(hooks)] = {key: copy.deepcopy(hook) for key, hook in hooks.items() if computes_weights(hook)}
        for value in cast("dict[str, object]", vars(part)).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # old weight norm's weight, which cannot be copied
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(module, memo)
    if any(p.is_meta for p in copied.parameters()):
        copied.to_empty(device="cpu")
        for buffer in copied.buffers():
            buffer.fill_(1)
    return copied.eval()


def computes_weights(hook: object) -> bool:
    """Return whether ``hook`` belongs to PyTorch's weight norm, spectral norm or pruning."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def describe_taps(taps: Sequence[int]) -> str:
    """Return the shape of a kernel as text.

    >>> describe_taps((3, 3))
    '3 x 3'
    """
    return " x ".join(map(str, taps))
