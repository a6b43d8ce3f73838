"""Every gate against its equation in explicit loops, in value and gradient, shape by shape and dtype by dtype."""

import math

import pytest
import torch

import ecanet
from ecanet.attention import ATTENTIONS, ChannelAttention
from ecanet.attention.gates import ECA, ECANS, SE, SEGC, SEVar1, SEVar2, SEVar3, adaptive_kernel_size
from ecanet.errors import AttachError, ConfigError
from ecanet.testing import assert_within_budget
from tensors import to_layout, value_and_gradients

SHAPES = [(2, 17), (3, 5, 7), (2, 17, 9, 11), (1, 64, 7, 7), (2, 3, 2, 3, 4), (0, 8, 4, 4), (1, 1, 1, 1), (2, 16, 1, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def sigmoid(t):
    return 1 / (1 + torch.exp(-t))


def loop_eca(weight, circular=False, bias=0):
    """``sigmoid(sum_j w[j] p[c + j - r] + bias)``, tap by tap; outside the channels stands 0, or the other end."""
    taps = weight.flatten()
    r = len(taps) // 2

    def gate(p):
        channels = p.shape[1]
        columns = []
        for c in range(channels):
            total = torch.zeros_like(p[:, 0])
            for j in range(len(taps)):
                at = c + j - r
                if circular:
                    at %= channels
                if 0 <= at < channels:
                    total = total + taps[j] * p[:, at]
            columns.append(total + bias)
        return sigmoid(torch.stack(columns, 1))

    return gate


def loop_eca_ns(weight):
    r = weight.shape[-1] // 2

    def gate(p):
        columns = []
        for c in range(p.shape[1]):
            total = torch.zeros_like(p[:, 0])
            for j in range(weight.shape[-1]):
                if 0 <= c + j - r < p.shape[1]:
                    total = total + weight[c, 0, j] * p[:, c + j - r]
            columns.append(total)
        return sigmoid(torch.stack(columns, 1))

    return gate


def loop_matrix(p, rows):
    """``W p`` for each sample, row by row."""
    return torch.stack(
        [sum((rows[o][i] * p[:, i] for i in range(p.shape[1])), 0 * p[:, 0]) for o in range(len(rows))], 1
    )


def loop_gate(module, w):
    """The explicit-loop gate of ``module``, with the parameters ``w`` by name."""
    match module:
        case ECA():
            return loop_eca(w["conv.weight"], module.padding_mode == "circular", w.get("conv.bias", 0))
        case ECANS():
            return loop_eca_ns(w["conv.weight"])
        case SE():
            return lambda p: sigmoid(loop_matrix(loop_matrix(p, w["fc1.weight"]).clamp(min=0), w["fc2.weight"]))
        case SEVar1():
            return sigmoid
        case SEVar2():
            return lambda p: sigmoid(torch.stack([w["weight"][c] * p[:, c] for c in range(p.shape[1])], 1))
        case SEVar3():
            return lambda p: sigmoid(loop_matrix(p, w["fc.weight"]))
        case SEGC():
            return lambda p: sigmoid(loop_matrix(p, torch.block_diag(*w["weight"])))
    raise AssertionError(module)


def loop_attention(module, x, *parameters):
    """``x * gate(mean x)`` in the dtype of ``x`` with means by explicit sums."""
    names = [name for name, _ in module.named_parameters()]
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]
    p = sum((flat[..., i] for i in range(flat.shape[2])), torch.zeros_like(flat[..., 0])) / flat.shape[2]
    g = loop_gate(module, dict(zip(names, parameters, strict=True)))(p)
    return x * g.reshape(g.shape + (1,) * (x.dim() - 2))


def build(name, channels, seed=0):
    torch.manual_seed(seed)
    options = {"se": {"reduction": 4}, "se-gc": {"groups": 1 if channels % 2 else 2}}.get(name, {})
    return ecanet.make_attention(name, channels, **options)


def functional(module, *values):
    x, *parameters = values
    names = [name for name, _ in module.named_parameters()]
    return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))


def check_against_loops(module, shape, dtype, channels_last):
    g = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    parameters = [p.detach().to(dtype) for p in module.parameters()]
    values = [x, *parameters]
    oracle = value_and_gradients(lambda *v: loop_attention(module, *v), dy.double(), *(v.double() for v in values))
    plain = value_and_gradients(lambda *v: loop_attention(module, *v), dy.float(), *(v.float() for v in values))
    plain = [p.to(dtype) if dtype != torch.float64 else o for p, o in zip(plain, oracle, strict=True)]
    values[0] = to_layout(x, channels_last)
    actual = value_and_gradients(lambda *v: functional(module, *v), to_layout(dy, channels_last), *values)
    for what, a, p, o in zip(("y", "dx", *dict(module.named_parameters())), actual, plain, oracle, strict=True):
        assert a.dtype == dtype
        assert_within_budget(what, a, p, o, roundings=x.numel() if dtype == torch.float64 else 1)
    if channels_last and x.numel():
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()]
        assert actual[0].is_contiguous(memory_format=memory_format)
        assert actual[1].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eca_is_the_loops(shape, dtype):
    for k in (1, 3, 5):
        torch.manual_seed(k)
        module = ECA(shape[1], k)
        for channels_last in {False, len(shape) > 3}:
            check_against_loops(module, shape, dtype, channels_last)
    check_against_loops(ECA(shape[1], 3, bias=True), shape, dtype, False)


@pytest.mark.parametrize("name", ["eca-ns", "se", "se-var1", "se-var2", "se-var3", "se-gc"])
@pytest.mark.parametrize(
    "shape", [(2, 6), (3, 5, 7), (2, 16, 5, 3), (2, 3, 2, 3, 4), (0, 8, 4, 4), (1, 1, 1, 1)], ids=str
)
def test_other_gates_are_the_loops(name, shape):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_against_loops(build(name, shape[1]), shape, dtype, channels_last=len(shape) == 4)


@pytest.mark.parametrize("k", [3, 5, 7])
def test_circular_padding_is_the_loops(k):
    module = ECA(7, k, padding_mode="circular")
    check_against_loops(module, (2, 7, 3, 3), torch.float64, channels_last=False)
    constant = module(torch.ones(1, 7, 2, 2))
    assert (constant == constant[0, 0, 0, 0]).all()  # no edge: every channel sees k neighbours
    assert not (ECA(7, k)(torch.ones(1, 7, 2, 2)) == constant).all()


@pytest.mark.parametrize(("attention", "shape"), [("eca", (2, 8, 5, 5)), ("se", (2, 8, 5)), ("se-var3", (2, 8))])
def test_autocast_changes_nothing_inside(attention, shape):
    module, x = build(attention, 8), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, module(x))


def test_fp16_gradients_do_not_overflow():
    """The gate's gradient sums 512 x 512 products of 300: more than float16 holds."""
    x = torch.full((1, 2, 512, 512), 300, dtype=torch.float16, requires_grad=True)
    module = ECA(2, 1)
    torch.nn.init.zeros_(module.conv.weight)
    y = module(x)
    y.backward(torch.full_like(y, 1e-3))
    assert x.grad is not None
    assert x.grad.isfinite().all()
    # dg = 512 * 512 * 300 * dy; sigmoid'(0) = 1/4; the mean is 300; two channels
    expected = 2 * 512 * 512 * 300 * float(torch.tensor(1e-3, dtype=torch.float16)) / 4 * 300
    torch.testing.assert_close(module.conv.weight.grad.item(), expected, rtol=1e-4, atol=0)


def test_gradcheck_and_second_derivative():
    module = ECA(5, 3).double()
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: functional(module, x, w), (x, module.conv.weight))
    assert torch.autograd.gradgradcheck(lambda x, w: functional(module, x, w), (x, module.conv.weight))


def test_one_and_three_axes_give_the_numbers_of_two():
    module, x = ECA(16, 3), torch.randn(2, 16, 6, 1, generator=torch.Generator().manual_seed(0))
    y = module(x)
    torch.testing.assert_close(module(x[..., 0]), y[..., 0])
    torch.testing.assert_close(module(x[..., None]), y[..., None])
    torch.testing.assert_close(module(x[:, :, :1, 0]), module(x[:, :, 0, 0])[..., None])


def test_mask_makes_padding_count_for_nothing():
    module = ECA(6)
    x = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([x, torch.full((1, 6, 3), math.nan)], 2)
    mask = (torch.arange(8) < 5)[None]
    torch.testing.assert_close(module(padded, mask)[..., :5], module(x), rtol=1e-6, atol=1e-7)
    assert module(padded).isnan().all()


def paper_rule(channels, gamma, b):
    """Nearest odd number to (log2 C + b) / gamma by search, ties upward; exact, with no logarithm for gamma 2."""
    target = abs((math.log2(channels) + b) / gamma)
    odd = range(1, 99, 2)
    return min(odd, key=lambda k: (abs(k - target), -k))


def test_adaptive_kernel_size_for_every_channel_count():
    assert {c: adaptive_kernel_size(c) for c in (16, 24, 32, 64, 96, 128, 160, 256, 320, 512, 1024, 2048)} == {
        16: 3, 24: 3, 32: 3, 64: 3, 96: 3, 128: 5, 160: 5, 256: 5, 320: 5, 512: 5, 1024: 5, 2048: 7,
    }  # fmt: skip
    for channels in range(1, 8193):
        assert adaptive_kernel_size(channels) == paper_rule(channels, 2, 1), channels
    for gamma, b in ((1, 1), (2, 5), (3, 0.5), (-2, 1)):
        assert adaptive_kernel_size(300, gamma, b) == paper_rule(300, gamma, b)
        assert ECA(300, gamma=gamma, b=b).kernel_size == paper_rule(300, gamma, b)


@pytest.mark.parametrize("attention", [ECA, ECANS])
def test_explicit_kernel_size_wins(attention):
    for k in (1, 3, 5, 7, 9, 11):
        assert attention(64, kernel_size=k).kernel_size == k
        assert attention(64, k)(torch.randn(1, 64, 2, 2)).shape == (1, 64, 2, 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ECA(64, 4), "kernel_size must be odd, got 4; try 5"),
        (lambda: ECANS(64, 2), "kernel_size must be odd, got 2; try 3"),
        (lambda: ECA(64, 0), "kernel_size must be a positive integer, got 0"),
        (lambda: ECA(64, 3.0), "kernel_size must be a positive integer, got 3.0"),
        (lambda: ECA(0), "channels must be a positive integer, got 0"),
        (lambda: ECA("64"), "channels must be a positive integer, got '64'"),
        (lambda: ECA(64, padding_mode="reflect"), "'zeros' or 'circular', got 'reflect'"),
        (lambda: ECA(2, 7, padding_mode="circular"), "wraps more than once around 2 channels"),
        (lambda: ECA(64, gamma=0), "gamma must not be 0"),
        (lambda: SE(64, 0), "reduction must be a positive integer, got 0"),
        (lambda: SE(64, 16.0), "reduction must be a positive integer, got 16.0"),
        (lambda: ECA(64, gamma="2"), "gamma must be a number, got '2'"),
        (lambda: SEGC(64, 3), "groups must divide the 64 channels, got 3"),
        (lambda: ECA(64)(torch.randn(1, 3, 8, 8)), "ECA(channels=64) got 3 channels"),
        (lambda: ECA(8)(torch.randn(8)), "got shape (8,)"),
        (lambda: ECA(8)(torch.ones(1, 8, dtype=torch.int64)), "expected a floating-point tensor, got torch.int64"),
        (lambda: ECA(8)(torch.ones(1, 8), torch.ones(1, dtype=torch.bool)), "mask= needs spatial axes"),
        (lambda: ECA(8)(torch.ones(1, 8, 4), torch.ones(1, 5, dtype=torch.bool)), "mask must have shape (1, 4)"),
        (lambda: ECA(8)(torch.ones(1, 8, 4), torch.ones(1, 4)), "mask must be boolean"),
        (lambda: ecanet.make_attention("ecca", 8), "unknown attention 'ecca'; choose one of none, eca"),
        (lambda: ecanet.make_attention("eca", 8, kernel=3), "has no option 'kernel'; did you mean 'kernel_size'?"),
        (lambda: ecanet.make_attention("none", 8, kernel_size=3), "it takes no options"),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ConfigError) as error:
        make()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_parameter_counts_are_the_papers():
    count = {
        n: sum(p.numel() for p in build(n, 64).parameters()) for n in ("eca", "eca-ns", "se-var1", "se-var2", "se-var3")
    }
    assert count == {"eca": 3, "eca-ns": 3 * 64, "se-var1": 0, "se-var2": 64, "se-var3": 64 * 64}
    assert sum(p.numel() for p in SE(256, 16).parameters()) == 2 * 256 * 256 // 16
    for groups in (16, 256 // 16, 256 // 8):
        assert sum(p.numel() for p in SEGC(256, groups).parameters()) == 256 * 256 // groups
    assert sum(p.numel() for p in SE(64, bias=True).parameters()) == 2 * 64 * 4 + 64 + 4
    assert list(ECA(64).state_dict()) == ["conv.weight"]
    assert ECA(64, 7).conv.weight.shape == (1, 1, 7)


def test_every_gate_works_from_one_channel_up():
    gates = [name for name, kind in ATTENTIONS.items() if isinstance(kind, type) and issubclass(kind, ChannelAttention)]
    for name in set(gates) - {"se-gc"}:
        for channels in (1, 2, 8, 15):
            module = ecanet.make_attention(name, channels)
            assert module(torch.randn(2, channels, 3, 3)).shape == (2, channels, 3, 3)


def test_default_initialisation_is_torchs():
    """U(-1/sqrt k, 1/sqrt k), as in the authors' code, which leaves the kernel to torch."""
    torch.manual_seed(0)
    for k in (1, 3, 9):
        weights = torch.cat([ECA(64, k).conv.weight.flatten() for _ in range(400)])
        bound = 1 / math.sqrt(k)
        assert weights.abs().max() <= bound
        assert weights.abs().max() > 0.95 * bound
        torch.testing.assert_close(weights.std().item(), bound / math.sqrt(3), rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted({"eca", "eca-ns", "se", "se-var2", "se-var3", "se-gc", "ese"}))
def test_neutral_gate_is_the_identity_bit_for_bit_and_learns(name, dtype):
    module = build(name, 8).to(dtype)
    module.neutralize()
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    dy = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = module(x)
    y.backward(dy)
    assert torch.equal(y, x)
    assert torch.equal(x.grad, dy)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.last_parameters())


def test_se_var1_cannot_be_neutral():
    with pytest.raises(AttachError, match="no parameter to zero"):
        SEVar1(8).neutralize()


@pytest.mark.parametrize("name", ["eca", "se", "se-gc"])
def test_compiles_whole_and_deterministic(name):
    module = build(name, 8)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), module(x))
    torch.use_deterministic_algorithms(True)
    try:
        runs = [value_and_gradients(module, x, x) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
