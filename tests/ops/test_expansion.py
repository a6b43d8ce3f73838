"""The kernel of a block's last convolution against float64. It runs in Triton's interpreter."""

import sys
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import ecanet
from ecanet import ops
from ecanet.attention import find_attention
from ecanet.errors import ConfigError
from ecanet.inference.blocks import InferenceBlock
from ecanet.models.resnet import BOTTLENECK, ResNet
from ecanet.models.slots import Slot
from ecanet.ops import dispatch, proof
from ecanet.studies.bench import traffic
from ecanet.testing import bound_sums, find_elementwise_excess
from tensors import DEVICE, draw, surround_with_nan, to_layout

pytest.importorskip("triton")

from ecanet.ops.triton import expansion, expansion_proof

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = torch.channels_last

# N, K, C, H, W: sizes that are no multiple of a tile, of one element, without samples, larger than a tile
SHAPES = [
    (0, 3, 17, 7, 7),
    (1, 1, 1, 1, 1),
    (5, 17, 3, 1, 1),
    (1, 64, 256, 7, 7),
    (5, 3, 70, 7, 7),
    (2, 65, 17, 17, 19),
]


def case(shape, dtype, seed=0):
    """Return h, weight, bias, gate and shortcut, each surrounded by NaN; the gate is float32, as in networks."""
    n, inner, channels, *plane = shape
    generator = torch.Generator("cpu").manual_seed(seed)

    def random(*size):
        return draw(size, generator)

    h, shortcut = (surround_with_nan(to_layout(random(n, c, *plane), True).to(dtype)) for c in (inner, channels))
    weight, bias = (surround_with_nan(x.to(dtype)) for x in (random(channels, inner), 2 * random(channels)))
    return h, weight, bias, surround_with_nan(random(n, channels).sigmoid() + 0.5), shortcut


def oracle(h, weight, bias, gate, shortcut, activation, offset=None):
    """Return the result in float64 by PyTorch's convolution, and the largest error that rounding explains.

    A float32 sum of K products errs by at most K roundings of their absolute sum; bias, gate, shortcut and offset add
    four. Then follows one rounding to the output's dtype, to nearest. The interpreter truncates bfloat16 instead.
    """
    h, weight, dtype = h.double(), weight.double(), h.dtype
    y, terms = F.conv2d(h, weight[..., None, None]), F.conv2d(h.abs(), weight.abs()[..., None, None])
    if bias is not None:
        y, terms = y + bias.double()[:, None, None], terms + bias.double().abs()[:, None, None]
    if gate is not None:
        y, terms = y * gate.double()[..., None, None], terms * gate.double().abs()[..., None, None]
    if shortcut is not None:
        y, terms = y + shortcut.double(), terms + shortcut.double().abs()
    if offset is not None:
        y, terms = y + offset.double()[:, None, None], terms + offset.double().abs()[:, None, None]
    y = {"relu": y.relu(), "relu6": F.relu6(y), None: y}[activation]
    truncates = expansion.INTERPRETED and dtype == torch.bfloat16
    return y, bound_sums(y, terms, (h.shape[1] + 4) / 2, dtype, truncates=truncates)


def assert_within_rounding(actual, given, activation, offset=None):
    expected, allowed = oracle(*given, activation, offset)
    assert find_elementwise_excess("y", actual, expected, allowed) is None
    assert actual.dtype == given[0].dtype
    assert actual.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_within_rounding(shape, dtype):
    h, weight, *rest = case(shape, dtype)
    forms = [("bgs", "relu"), ("b", "relu6"), ("gs", None), ("", None), ("bs", "relu")]
    for parts, activation in forms[: 2 if shape[2] > 100 or shape[3] > 10 else None]:
        given = (h, weight, *(x if name in parts else None for name, x in zip("bgs", rest, strict=True)))
        assert_within_rounding(expansion.expand(*given, activation), given, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_offset_is_added_after_the_gate(dtype):
    """It is the bias of the shortcut's own convolution, so the gate does not scale it."""
    given = case((3, 5, 70, 5, 3), dtype)
    offset = surround_with_nan(3 * draw((70,), torch.Generator("cpu").manual_seed(1)).to(dtype))
    assert_within_rounding(expansion.expand(*given, "relu", offset), given, "relu", offset)
    alone = (*given[:2], None, None, None)
    assert_within_rounding(expansion.expand(*alone, None, offset), alone, None, offset)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_large_tiles_are_within_rounding(dtype, monkeypatch):
    monkeypatch.setattr(expansion, "PROGRAMS", 1)
    assert expansion.choose_tiles(338, 70, 130, dtype) == (128, 128, 64, 8)
    given = case((2, 70, 130, 13, 13), dtype)  # planes longer than a tile
    assert_within_rounding(expansion.expand(*given, "relu"), given, "relu")
    given = case((3, 20, 19, 5, 11), dtype)  # and shorter
    assert_within_rounding(expansion.expand(*given, "relu"), given, "relu")


def test_far_offsets_give_the_same(monkeypatch):
    given = case((2, 65, 70, 9, 11), torch.float32)
    near = expansion.expand(*given)
    monkeypatch.setattr(expansion, "NEAR", 0)
    assert torch.equal(expansion.expand(*given), near)


def test_bands_cover_every_tile_once(monkeypatch):
    """There are more tiles of rows than a band has, the last band has fewer, there are several tiles of channels."""
    given = case((1, 1, 70, 41, 17), torch.float32)  # 11 times 2
    assert_within_rounding(expansion.expand(*given, "relu"), given, "relu")


def test_nan_passes_the_activation():
    h, *rest = case((1, 3, 5, 2, 2), torch.float32)
    h[0, 0, 1, 1] = float("nan")
    for activation in ("relu", "relu6"):
        y = expansion.expand(h, *rest, activation)
        assert y[0, :, 1, 1].isnan().all()
        assert y.isnan().sum() == 5


def test_shortcut_may_be_wider_than_the_branch():
    """Under autocast a shortcut may be wider than the branch."""
    given = (*case((2, 17, 5, 3, 3), torch.bfloat16)[:4], to_layout(torch.randn(2, 5, 3, 3), True))
    assert_within_rounding(expansion.expand(*given, "relu"), given, "relu")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_reads_and_writes_as_few_bytes_as_possible(dtype):
    """Shortcut and y move once, the weight once for each tile of rows, h once for each tile of channels."""
    for channels, times in ((64, 1), (100, 2)):
        given = case((2, 40, channels, 13, 11), dtype)
        h, weight, _, _, shortcut = given
        with traffic.count_interpreted_accesses() as counted:
            y = expansion.expand(*given, "relu")
        one = h.element_size()
        rows = -(-2 * 13 * 11 // 64)
        assert counted.written == y.numel() * one
        assert counted.read == (times * h.numel() + shortcut.numel() + rows * weight.numel()) * one


def test_operator_is_whole_and_counted():
    given = case((2, 17, 5, 3, 3), torch.float32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ecanet.expansion, (*given, "relu"), test_utils=checks)
    torch.library.opcheck(torch.ops.ecanet.expansion, (*given[:2], None, None, None, None), test_utils=checks)
    expected = expansion.expand(*given, "relu")
    with FlopCounterMode(display=False) as flops:
        assert torch.equal(expansion.expand(*given, "relu"), expected)
    assert flops.get_total_flops() == 2 * (2 * 9) * 17 * 5


def test_operator_is_compiled():
    given, names = case((2, 17, 5, 3, 3), torch.float32), []
    expected = expansion.expand(*given, "relu")

    def backend(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    assert torch.equal(torch.compile(expansion.expand, backend=backend, fullgraph=True)(*given, "relu"), expected)
    assert [name for name in names if "expansion" in name] == ["ecanet.expansion"]


def test_errors_name_what_does_not_fit(monkeypatch):
    h, weight, bias, gate, shortcut = case((2, 3, 5, 4, 4), torch.float32)
    for arguments, why in {
        (h[0], weight): r"h must be \(N, K, H, W\), got shape \(3, 4, 4\)",
        (h, weight[:, :2]): r"weight must be \(5, 3\) for h \(2, 3, 4, 4\), got \(5, 2\)",
        (h, weight, bias[:4]): r"bias must be \(5,\)",
        (h, weight, bias, gate[:1]): r"gate must be \(2, 5\)",
        (h, weight, bias, gate, shortcut[:, :, :2]): r"shortcut must be \(2, 5, 4, 4\)",
        (h, weight.bfloat16()): "h is torch.float32 and weight torch.bfloat16",
        (h.double(), weight.double()): "it takes float32, bfloat16 and float16, got torch.float64",
        (h.contiguous(), weight): r"h is not channels-last; use h.contiguous\(memory_format",
        (h, weight, bias, gate, shortcut.contiguous()): "shortcut is not channels-last",
        (h, weight.to("meta")): f"tensors are on {h.device} and meta",
        (h, weight.clone().requires_grad_()): "it has no gradient; use it under torch.no_grad",
        (h, weight, bias, gate, shortcut, None, bias[:4]): r"offset must be \(5,\)",
        (h, weight, bias, gate, shortcut, "gelu"): "unknown activation 'gelu'; choose 'relu', 'relu6' or None",
    }.items():
        with pytest.raises(ConfigError, match=f"expand does not apply: {why}"):
            expansion.expand(*arguments)
    monkeypatch.setattr(expansion, "INTERPRETED", False)
    with pytest.raises(ConfigError, match="it needs CUDA tensors, got one on cpu"):
        expansion.expand(h.cpu(), weight.cpu())


# in blocks


def randomize(model):
    """Return ``model`` in evaluation mode, with random norms and no parameter at zero."""
    for name, x in model.state_dict().items():
        if name.endswith("running_var"):
            x.uniform_(0.5, 2)
        elif x.is_floating_point() and x.dim() == 1:
            x.normal_(0.3, 0.2)
        elif x.is_floating_point() and not x.any():
            x.normal_(0, 0.2)
    return model.eval()


def bottleneck(attention):
    slot = Slot(kind=find_attention(attention))
    return ResNet(BOTTLENECK, (1,), slot, num_classes=2, in_channels=3).get_submodule("layer1.0")


def make_shortcut(stride, *before):
    return nn.Sequential(*before, nn.Conv2d(6, 16, 1, stride, bias=False), nn.BatchNorm2d(16))


BLOCKS = {
    "eca": (lambda: bottleneck("eca"), 64, 2),
    "se": (lambda: bottleneck("se"), 64, 2),
    "none": (lambda: bottleneck("none"), 64, 2),
    "torchvision": (lambda: torchvision.models.resnet.Bottleneck(16, 4), 16, 2),
    "shortcut": (lambda: torchvision.models.resnet.Bottleneck(6, 4, 2, make_shortcut(2)), 6, 2),
    "shortcut of three": (
        lambda: torchvision.models.resnet.Bottleneck(6, 4, 1, make_shortcut(1, nn.AvgPool2d(3, 1, 1))),
        6,
        2,
    ),
    "inverted": (lambda: torchvision.models.mobilenetv2.InvertedResidual(5, 5, 1, 6), 5, 2),
    "inverted, nothing added": (lambda: torchvision.models.mobilenetv2.InvertedResidual(5, 7, 1, 6), 5, 2),
    "cbam": (lambda: bottleneck("cbam"), 64, 1),
    "basic": (lambda: torchvision.models.resnet.BasicBlock(5, 5), 5, 0),
}


def make_optimized(name):
    """Return a block as `optimize` makes it, and an input for it."""
    torch.manual_seed(0)
    make, channels, _ = BLOCKS[name]
    block = randomize(make())
    channels = block.get_submodule("conv1").in_channels if hasattr(block, "conv1") else channels
    x = to_layout(torch.randn(2, channels, 3, 5), True)
    optimized = ecanet.optimize(nn.Sequential(block), example=x)[0]
    assert isinstance(optimized, InferenceBlock)
    return optimized, x


@pytest.fixture
def ran(monkeypatch):
    """Return a list that records the arguments of the kernel's launches."""
    launches, launch = [], expansion.run_expansion
    monkeypatch.setattr(expansion, "run_expansion", lambda *args: launches.append(args) or launch(*args))
    return launches


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_block_gives_the_same_with_and_without_the_kernel(name, ran):
    block, x = make_optimized(name)
    expected = block(x)
    with ops.prefer_impl("fused"):
        actual = block(x)
    assert len(ran) == BLOCKS[name][2]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("name", ["eca", "shortcut", "shortcut of three", "inverted"])
@torch.no_grad()
def test_the_kernel_takes_the_bias_of_the_shortcut(name, ran):
    """PyTorch would add it in a pass of its own. The shortcut without a convolution has none."""
    block, x = make_optimized(name)
    with ops.prefer_impl("fused"):
        block(x)
    offset = ran[-1][6]
    assert (offset is None) == (name == "inverted")
    if offset is not None:
        assert any(offset is one.bias for one in block.shortcut if isinstance(one, nn.Conv2d))


@torch.no_grad()
def test_autocast_keeps_the_gate_in_float32(ran):
    block, x = make_optimized("eca")
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = block(x)
        with ops.prefer_impl("fused"):
            actual = block(x)
    *_, (h, weight, bias, gate, shortcut, _, offset) = ran
    assert h.dtype == weight.dtype == actual.dtype == expected.dtype == torch.bfloat16
    assert gate.dtype == torch.float32
    assert shortcut.dtype in (torch.float32, torch.bfloat16)
    given = (h, weight.flatten(1), bias, gate.flatten(1), shortcut)
    assert_within_rounding(actual, given, "relu", offset)
    # each of the three convolutions, gate, product and sum rounds once; the interpreter truncates
    assert (actual - expected).norm() <= 6 * torch.finfo(torch.bfloat16).eps * expected.norm()


@torch.no_grad()
def test_a_bfloat16_copy_needs_no_casts(ran):
    """Every 1x1 convolution of the copy takes its tensors as they are; gates are float32, as in the network itself."""
    block, x = make_optimized("eca")
    block, x = block.bfloat16(), x.bfloat16()
    with ops.prefer_impl("fused"):
        actual = block(x)
    assert actual.dtype == torch.bfloat16
    for (h, weight, bias, gate, shortcut, end, offset), y in zip(ran, [None, actual], strict=True):
        assert {t.dtype for t in (h, weight, bias) if t is not None} == {torch.bfloat16}
        if y is not None:
            assert gate.dtype == torch.float32
            assert_within_rounding(y, (h, weight.flatten(1), bias, gate.flatten(1), shortcut), end, offset)


def test_kernel_does_not_run_where_it_does_not_apply(ran):
    """Gradients, other layouts and dtypes, hooks, and a preference for the lean passes."""
    block, x = make_optimized("eca")
    with ops.prefer_impl("fused"):
        block(x)
        with torch.no_grad():
            block.double()(x.double())
            block.float()(x)
            heard = []
            handle = block.branch[-1].register_forward_hook(lambda *args: heard.append(args))
            block(x)
            handle.remove()
            assert len(heard) == 1
            block.branch[:-1].to(memory_format=torch.contiguous_format)
            block(x.contiguous())
    with torch.no_grad(), ops.prefer_impl("lean"):
        block(x)
    assert len(ran) == 2  # both 1x1 convolutions of the one allowed call


@pytest.mark.parametrize("record", ["trace", "compile"])
@torch.no_grad()
def test_kernel_does_not_run_in_a_recorded_block(record, ran):
    block, x = make_optimized("eca")
    with ops.prefer_impl("fused"):
        if record == "trace":
            torch.jit.trace(block, x, check_trace=False)
        else:
            torch.compile(block, backend="eager")(x)
    assert ran == []


# proof


@pytest.fixture
def gpu(monkeypatch, interpreter):
    """Treat the CPU as a GPU on which nothing has run yet and convolutions do not round to TF32; shorten the proof."""
    for room in (ops, dispatch):
        monkeypatch.setattr(room, "runs_on_gpu", lambda x: True)
    monkeypatch.setattr(proof, "_passed", {})
    # a 3x3 convolution asks for the kernels of the tails, too
    monkeypatch.setattr(proof, "SHAPES", ((2, 9, 5, 3),))
    monkeypatch.setattr(proof, "CASES", proof.CASES[:1])
    monkeypatch.setattr(expansion_proof, "TRIED", dict([next(iter(expansion_proof.TRIED.items()))]))
    monkeypatch.setattr(ops, "rounds_to_tf32", lambda: False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_passes_its_proof(dtype, gpu):
    assert proof.find_expansion_failure(CPU, dtype) is None


@torch.no_grad()
def test_kernel_is_used_after_one_proof(gpu, ran, monkeypatch):
    proofs, failure = [], proof.find_expansion_failure
    monkeypatch.setattr(proof, "find_expansion_failure", lambda *args: proofs.append(args) or failure(*args))
    block, x = make_optimized("torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)
        tried = len(ran)
        block(x)
    assert proofs == [(CPU, torch.float32)]
    assert len(ran) == tried + 2
    monkeypatch.setattr(ops, "rounds_to_tf32", lambda: True)
    block(x)  # PyTorch's convolution uses tensor cores there, the kernel does not
    assert len(ran) == tried + 2


WRONG = {
    "a gate 0.1 % off": lambda f: lambda h, w, b, g, *rest: f(h, w, b, None if g is None else 1.001 * g, *rest),
    "no bias": lambda f: lambda h, w, b, *rest: f(h, w, None, *rest),
    "no shortcut": lambda f: lambda h, w, b, g, s, *rest: f(h, w, b, g, None, *rest),
    "no offset": lambda f: lambda *args: f(*args[:6]),
    "relu for relu6": lambda f: lambda *args: f(*args[:5], "relu" if args[5] else None, *args[6:]),
    "no number": lambda f: lambda *args: f(*args) * float("nan"),
}


@pytest.mark.parametrize("bug", WRONG)
@torch.no_grad()
def test_wrong_kernel_is_found_and_warned_of_once(bug, gpu, monkeypatch):
    monkeypatch.setattr(expansion_proof, "GATES", {})  # those are `test_predicted_gates`'
    block, x = make_optimized("torchvision")
    with ops.prefer_impl("lean"):
        expected = block(x)
    monkeypatch.setattr(expansion, "run_expansion", WRONG[bug](expansion.run_expansion))
    with pytest.warns(
        UserWarning, match=r"expansion kernels are not used on cpu: y is (off by|not finite).*convolution and"
    ):
        assert torch.equal(block(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(block(x), expected)


@torch.no_grad()
def test_missing_triton_warns_and_falls_back(gpu, monkeypatch):
    block, x = make_optimized("torchvision")
    monkeypatch.setitem(sys.modules, "ecanet.ops.triton.expansion_proof", None)
    monkeypatch.delattr(ops.triton, "expansion_proof")
    with pytest.warns(UserWarning, match="Triton cannot be imported"):
        block(x)
