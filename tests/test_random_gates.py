"""Every gate on random inputs, held to explicit loops over Python numbers: value, shape, dtype and memory layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from ecanet.attention import CBAM, ECA, ECANS, SE, SEGC, GlobalContext, SEVar1, SEVar2, SEVar3

pytestmark = pytest.mark.random_cases

Numbers = list[float]
"""Means, or weights, of the channels of one image."""


@dataclass(frozen=True)
class Input:
    """A random tensor (N, C, ...), and how it lies in memory."""

    batch: int
    channels: int
    sizes: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    masked: bool
    seed: int

    def build(self) -> tuple[Tensor, Tensor | None]:
        """Return the tensor, and a mask of positions that count or None."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.channels, *self.sizes)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        mask = None
        if self.masked and self.sizes:
            mask = torch.rand((self.batch, *self.sizes), generator=generator) < 0.6
        match self.layout:
            case "channels_last" if len(shape) > 3:
                formats = {4: torch.channels_last, 5: torch.channels_last_3d}
                return noise(*shape).contiguous(memory_format=formats[len(shape)]), mask
            case "transposed":
                return noise(*reversed(shape)).permute(*reversed(range(len(shape)))), mask
            case "stepped":
                return noise(*shape[:-1], 2 * shape[-1])[..., ::2], mask
            case "offset":
                return noise(shape[0], shape[1] + 3, *shape[2:])[:, 1:-2], mask
            case "expanded":
                return noise(1, *shape[1:-1], 1).expand(shape), mask
            case _:
                return noise(*shape), mask


@st.composite
def inputs(
    draw: st.DrawFn,
    ranks: tuple[int, ...] = (2, 3, 4, 5),
    channels: tuple[int, int] = (1, 9),
    least_batch: int = 0,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16),
) -> Input:
    """Draw an input of one of ``ranks``: odd sizes, single positions and empty batches among them."""
    rank = draw(st.sampled_from(ranks))
    return Input(
        batch=draw(st.integers(least_batch, 3)),
        channels=draw(st.integers(*channels)),
        sizes=tuple(draw(st.integers(1, 5 if rank < 5 else 3)) for _ in range(rank - 2)),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "transposed", "stepped", "offset", "expanded"])),
        dtype=draw(st.sampled_from(dtypes)),
        masked=draw(st.sampled_from([False, False, True])),
        seed=draw(st.integers(0, 10_000)),
    )


VOLUME = Input(2, 3, (3, 2, 3), "channels_last", torch.float32, masked=False, seed=0)
"""A case that random draws meet rarely: three spatial axes, channels last."""


def sigmoid(x: float) -> float:
    """Return the logistic function of ``x``."""
    return 1 / (1 + math.exp(-x))


def product(matrix: list[Numbers], p: Numbers) -> Numbers:
    """Return the matrix-vector product."""
    return [sum(w * v for w, v in zip(row, p, strict=True)) for row in matrix]


def numbers(tensor: Tensor) -> list:
    """Return the values of ``tensor`` as nested lists of Python numbers."""
    return tensor.detach().double().tolist()


def eca_by_loops(module: ECA, p: Numbers) -> Numbers:
    """Equation 9: a kernel that all channels share."""
    (((*kernel,),),) = numbers(module.conv.weight)
    reach, count = len(kernel) // 2, len(p)
    logits = [0.0] * count
    for c in range(count):
        for tap, weight in enumerate(kernel):
            neighbour = c + tap - reach
            if module.padding_mode == "circular":
                logits[c] += weight * p[neighbour % count]
            elif 0 <= neighbour < count:
                logits[c] += weight * p[neighbour]
    return [sigmoid(x) for x in logits]


def ecans_by_loops(module: ECANS, p: Numbers) -> Numbers:
    """Equation 7: each channel has a kernel of its own."""
    logits = [0.0] * len(p)
    for c, ((*kernel,),) in enumerate(numbers(module.conv.weight)):
        for tap, weight in enumerate(kernel):
            neighbour = c + tap - len(kernel) // 2
            if 0 <= neighbour < len(p):
                logits[c] += weight * p[neighbour]
    return [sigmoid(x) for x in logits]


def se_by_loops(module: SE, p: Numbers) -> Numbers:
    """Equations 1 and 2: two layers with a ReLU between them."""
    hidden = add_bias(product(numbers(module.fc1.weight), p), module.fc1)
    return [
        sigmoid(x) for x in add_bias(product(numbers(module.fc2.weight), [max(0.0, h) for h in hidden]), module.fc2)
    ]


def add_bias(values: Numbers, layer: nn.Linear) -> Numbers:
    """Add the bias of ``layer``, if it has one."""
    return values if layer.bias is None else [v + b for v, b in zip(values, numbers(layer.bias), strict=True)]


def segc_by_loops(module: SEGC, p: Numbers) -> Numbers:
    """SE-GC: a matrix for each group of channels."""
    blocks, logits = numbers(module.weight), Numbers()
    for number, block in enumerate(blocks):
        logits += product(block, p[number * len(block) : (number + 1) * len(block)])
    return [sigmoid(x) for x in logits]


GATES: dict[str, tuple[Callable[[int], nn.Module], Callable[..., Numbers]]] = {
    "eca": (lambda channels: ECA(channels, 5), eca_by_loops),
    "eca adaptive": (ECA, eca_by_loops),
    "eca circular": (lambda channels: ECA(channels, 3, padding_mode="circular"), eca_by_loops),
    "eca-ns": (lambda channels: ECANS(channels, 3), ecans_by_loops),
    "se": (lambda channels: SE(channels, 2), se_by_loops),
    "se with biases": (lambda channels: SE(channels, 4, bias=True), se_by_loops),
    "se-var1": (SEVar1, lambda module, p: [sigmoid(v) for v in p]),
    "se-var2": (
        SEVar2,
        lambda module, p: [sigmoid(w * v) for w, v in zip(numbers(module.weight), p, strict=True)],
    ),
    "se-var3": (SEVar3, lambda module, p: [sigmoid(v) for v in product(numbers(module.fc.weight), p)]),
    "se-gc": (lambda channels: SEGC(channels, 2 - channels % 2), segc_by_loops),
}
"""Each gate of one vector: how to make it, and its equation as loops."""


def make(factory: Callable[[int], nn.Module], at: Input) -> nn.Module:
    """Return the module for ``at``, with parameters from its seed that leave no gate near a constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(at.seed + 1)
        module = factory(at.channels)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.uniform_(-1, 1)
    return module.to(at.dtype)


def check_form(x: Tensor, y: Tensor) -> None:
    """Hold shape, dtype and memory layout of the output ``y`` to those of the input ``x``."""
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    if not x.numel():
        return
    for memory_format in {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.dim(), []):
        if x.is_contiguous(memory_format=memory_format):
            assert y.is_contiguous(memory_format=memory_format), "channels_last is lost"
    if x.is_contiguous():
        assert y.is_contiguous(), "a contiguous input gives an output that is not"
    assert not torch._debug_has_internal_overlap(y), "elements of the output share memory"


def check_values(actual: Tensor, oracle: Tensor, error: float) -> None:
    """Hold ``actual`` to one rounding of each value of ``oracle`` plus ``error``, in its own dtype."""
    info = torch.finfo(actual.dtype)
    allowed = info.eps / 2 * oracle.abs() + info.smallest_normal * info.eps + error
    excess = (actual.double() - oracle).abs() - allowed
    assert actual.isfinite().all()
    assert not oracle.numel() or excess.max() <= 0, f"an error exceeds its bound by {excess.max():.2e}"


@pytest.mark.parametrize("name", GATES)
def test_squeeze_gate_scale_is_the_equation(name):
    factory, by_loops = GATES[name]

    @given(inputs(), st.sampled_from([1.0, 2.0]))
    @example(VOLUME, 2.0)
    def check(at: Input, gain: float) -> None:
        (x, mask), module = at.build(), make(factory, at)
        module.gain = gain
        y = module(x, mask)
        check_form(x, y)
        oracle = torch.zeros(x.shape, dtype=torch.float64)
        for n in range(at.batch):
            p = [mean_where(x[n, c], None if mask is None else mask[n]) for c in range(at.channels)]
            for c, weight in enumerate(by_loops(module, p)):
                oracle[n, c] = x[n, c].double() * gain * weight
        # Sums run in float32 or float64: at most 125 positions, then 9 and 9 products of numbers up to 1 and 4.
        wide = torch.finfo(torch.promote_types(at.dtype, torch.float32)).eps
        largest = float(x.abs().max()) if x.numel() else 0.0
        check_values(y, oracle, 150 * wide * gain * (1 + largest) ** 2)

    check()


def mean_where(plane: Tensor, mask: Tensor | None) -> float:
    """Return the mean of the values of ``plane`` that count; 0 without any."""
    values = numbers((plane if mask is None else plane[mask]).flatten())
    return math.fsum(values) / len(values) if values else 0.0


def cbam_by_loops(module: CBAM, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the two equations of CBAM on one image (C, H, W), position by position."""
    channels, height, width = x.shape
    values = numbers(x)
    counts = [[True] * width for _ in range(height)] if mask is None else mask.tolist()
    places = [(i, j) for i in range(height) for j in range(width) if counts[i][j]]
    mean = [math.fsum(plane[i][j] for i, j in places) / max(1, len(places)) for plane in values]
    highest = [max((plane[i][j] for i, j in places), default=0.0) for plane in values]

    def mlp(p: Numbers) -> Numbers:
        return product(numbers(module.fc2.weight), [max(0.0, h) for h in product(numbers(module.fc1.weight), p)])

    gate = [sigmoid(a + b) for a, b in zip(mlp(mean), mlp(highest), strict=True)]
    maps = [[[0.0] * width for _ in range(height)] for _ in range(2)]
    for i, j in places:
        column = [plane[i][j] * g for plane, g in zip(values, gate, strict=True)]
        maps[0][i][j], maps[1][i][j] = math.fsum(column) / channels, max(column)
    (kernels,) = numbers(module.spatial.weight)
    y = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            logit = 0.0
            for kernel, plane in zip(kernels, maps, strict=True):
                for a in range(max(0, 3 - i), min(7, height + 3 - i)):
                    for b in range(max(0, 3 - j), min(7, width + 3 - j)):
                        logit += kernel[a][b] * plane[i + a - 3][j + b - 3]
            for c in range(channels):
                y[c, i, j] = values[c][i][j] * gate[c] * sigmoid(logit)
    return y


def global_context_by_loops(module: GlobalContext, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the equation of the global context block on one image (C, ...)."""
    values = numbers(x.flatten(1) if x.dim() > 1 else x[:, None])
    length = len(values[0])
    counts = [True] * length if mask is None else mask.flatten().tolist()
    places = [at for at in range(length) if counts[at]]
    ((*key,),) = [[w for (w,) in row] for row in numbers(module.key.weight)]
    logits = {at: sum(w * plane[at] for w, plane in zip(key, values, strict=True)) for at in places}
    total = math.fsum(math.exp(logit) for logit in logits.values())
    context = [math.fsum(math.exp(logits[at]) / total * plane[at] for at in places) for plane in values]
    hidden = add_bias(product(numbers(module.fc1.weight), context), module.fc1)
    mean = math.fsum(hidden) / len(hidden)
    variance = math.fsum((h - mean) ** 2 for h in hidden) / len(hidden)
    scale, shift = numbers(module.norm.weight), numbers(module.norm.bias)
    normed = [
        s * (h - mean) / math.sqrt(variance + module.norm.eps) + b for h, s, b in zip(hidden, scale, shift, strict=True)
    ]
    update = add_bias(product(numbers(module.fc2.weight), [max(0.0, h) for h in normed]), module.fc2)
    return x.double() + torch.tensor(update, dtype=torch.float64).reshape(-1, *(1,) * (x.dim() - 1))


BLOCKS = {
    "cbam": (lambda channels: CBAM(channels, 2), cbam_by_loops, (4,), (1, 6)),
    "gc": (lambda channels: GlobalContext(channels, 1), global_context_by_loops, (2, 3, 4, 5), (2, 6)),
}
"""Attentions that need more than channel means: how to make them, their equations, ranks and channels."""


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_their_equations(name):
    factory, by_loops, ranks, channels = BLOCKS[name]

    @given(inputs(ranks, channels))
    def check(at: Input) -> None:
        (x, mask), module = at.build(), make(factory, at)
        y = module(x, mask)
        check_form(x, y)
        oracle = torch.zeros(x.shape, dtype=torch.float64)
        for n in range(at.batch):
            oracle[n] = by_loops(module, x[n], None if mask is None else mask[n])
        # These two compute in the input's dtype. The layer norm divides by a standard deviation that may be small,
        # which magnifies roundings, so only float64 and float32 are held to the value.
        if at.dtype in (torch.float64, torch.float32):
            largest = float(x.abs().max()) if x.numel() else 0.0
            check_values(y, oracle, 1000 * torch.finfo(at.dtype).eps * (1 + largest) ** 2)
        else:
            assert y.isfinite().all()

    check()


SMOOTH = ("eca", "eca circular", "eca-ns", "se-var1", "se-var2", "se-var3", "se-gc")
"""Gates without a ReLU: their differences do not depend on which side of a kink they fall."""


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_the_limits_of_differences(name):
    @given(inputs(ranks=(3, 4), least_batch=1, dtypes=(torch.float64,)))
    def check(at: Input) -> None:
        (x, mask), module = at.build(), make(GATES[name][0], at)
        leaf = x.detach().requires_grad_()
        generator = torch.Generator().manual_seed(at.seed + 2)
        direction, weight = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))
        (gradient,) = torch.autograd.grad((module(leaf, mask) * weight).sum(), leaf)
        step = 1e-5
        with torch.no_grad():
            ahead, behind = ((module(x + s * direction, mask) * weight).sum() for s in (step, -step))
        # The error is the third derivative times step^2, and the sums' rounding divided by the step.
        assert float((gradient * direction).sum()) == pytest.approx(
            float((ahead - behind) / (2 * step)), rel=1e-6, abs=1e-5
        )

    check()
