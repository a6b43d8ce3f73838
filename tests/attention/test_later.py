"""The attentions of later papers: ASR, eSE, GCT, SRM, FcaNet, SimAM, coordinate attention, ELA and EMA.

Each is held to its equation written as loops over single numbers, in value and in every gradient.
"""

import copy
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import ecanet
from drawn_modules import check_padding, image
from ecanet.attention import ATTENTIONS, GCT, Fca, SimAM
from ecanet.attention.base import GatedAttention
from ecanet.attention.moments import compute_styles
from ecanet.errors import AttachError, ConfigError
from later_attentions import BUILD, LOOPS, PAIRS, PLANES, cosine, made
from tensors import to_layout


def check_against_loops(name: str, x: Tensor, train: bool = False) -> None:
    module = made(name).train(train)
    leaves = [x.requires_grad_(), *module.parameters()]
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    expected = LOOPS[name](module, x)
    actual = module(x)
    # 1e-9 is far above float64's rounding in sums of some hundred terms and far below any change of a term
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(actual, x, rtol=1e-2)
    found = (torch.autograd.grad((y * dy).sum(), leaves) for y in (actual, expected))
    for key, a, b in zip(["x", *dict(module.named_parameters())], *found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


SHAPES = {name: (2, made(name).channels, 3, 4) for name in BUILD} | {"ema": (1, 64, 2, 3)}
CASES = [(name, shape, False) for name, shape in SHAPES.items()]
CASES += [("fca", (1, 20, 15, 2), False), ("fca", (1, 20, 1, 1), False)]  # frequencies as of a 7 x 7 map, and none
CASES += [("srm", (3, 5, 2, 3), True), ("coord", (2, 5, 2, 3), True), ("simam", (1, 5, 1, 1), False)]


@pytest.mark.parametrize(("name", "shape", "train"), CASES)
def test_the_equation_as_loops(name, shape, train):
    check_against_loops(name, image(*shape), train)


def test_every_new_name_is_in_the_table_and_here():
    assert {type(made(name)) for name in BUILD} == {ATTENTIONS[name] for name in BUILD}
    assert list(ATTENTIONS)[-len(BUILD) :] == list(BUILD) == list(LOOPS)


@pytest.mark.parametrize("side", [7, 14, 28, 56])
def test_the_components_are_orthonormal_on_the_papers_maps(side):
    """On maps of 7, 14, 28 and 56 each pair is one component of the transform, and no two are the same."""
    basis = torch.tensor([[cosine(k, at, side) for at in range(side)] for k in range(7)], dtype=torch.float64)
    torch.testing.assert_close(basis @ basis.T / side, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-12)
    measured = Fca(16).measure(torch.einsum("ch,cw->chw", *(basis[list(k)] for k in zip(*PAIRS, strict=True)))[None])
    torch.testing.assert_close(measured, torch.ones(1, 16, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in BUILD if name != "asr"])  # which no value of the input has
def test_padding_has_no_influence(name):
    module = made(name)
    x, mask = check_padding(module, module.channels)
    x.requires_grad_()
    module(torch.where(mask[:, None], x, 0), mask=mask)[:, :, :3, :5].sum().backward()
    assert not x.grad[:, :, 3:].any()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(BUILD.keys() - {"simam"}))
def test_neutral_is_the_identity_bit_for_bit_and_learns(name, dtype, train):
    module = made(name, dtype)
    x = image(3, module.channels, 3, 5, dtype=dtype)
    assert not torch.equal(module(x), x)
    module.neutralize()
    assert module.gain == (1 if name == "gct" else 2)
    y = module.train(train)(x)
    assert torch.equal(y, x)
    assert y.dtype == dtype
    (y.float() * image(*y.shape, dtype=torch.float32)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.last_parameters())
    again = BUILD[name]().to(dtype).eval()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), x)  # the state dict carries the neutral form


def test_a_new_gct_is_the_identity_and_simam_cannot_be():
    x = image(2, 8, 3, 3)
    assert torch.equal(GCT(8).double()(x), x)
    with pytest.raises(AttachError, match=r"SimAM has no parameter to zero, .*pass preserve=False"):
        SimAM(8).neutralize()


@pytest.mark.parametrize("name", BUILD)
def test_constant_and_empty_inputs_have_finite_gradients(name):
    """Channels that a ReLU shut are constant: the deviation has no derivative there."""
    module = made(name, torch.float32)
    for shape in ((2, module.channels, 3, 4), (2, module.channels, 1, 1), (0, module.channels, 3, 4)):
        x = torch.zeros(shape).requires_grad_()
        module(x).sum().backward()
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", BUILD)
def test_layouts_half_precision_and_copies(name):
    module = made(name, torch.float32)
    x = image(2, module.channels, 4, 3, dtype=torch.float32)
    y = module(x)
    last = module(to_layout(x, channels_last=True))
    assert y.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y, rtol=1e-5, atol=1e-5)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), y)
    if name == "simam":  # test_base exports the attentions that have a gain
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), y, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (module(x) - y).abs().max() < 0.1 * y.abs().max()
    half = copy.deepcopy(module).half()
    assert (half(x.half()).float() - y).abs().max() < 0.02 * y.abs().max()


@pytest.mark.parametrize("name", ["gct", "srm", "simam", "ese"])
def test_statistics_do_not_overflow_in_half_precision(name):
    """The squares of 300, and sums over 4096 positions, are more than float16 holds."""
    module = made(name).to(torch.float16)
    y = module(torch.full((2, 5, 64, 64), 300, dtype=torch.float16))
    assert y.isfinite().all()


@pytest.mark.parametrize("name", sorted(BUILD.keys() - set(PLANES)))
def test_any_number_of_axes(name):
    module = made(name)
    x = image(2, 5, 12)
    flat = module(x)
    for shape in ((2, 5, 3, 4), (2, 5, 2, 3, 2)):
        torch.testing.assert_close(module(x.reshape(shape)).flatten(2), flat, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(x[..., 0]), module(x[..., :1])[..., 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLANES)
def test_planes_are_needed_where_rows_and_columns_are(name):
    module = made(name, torch.float32)
    with pytest.raises(ConfigError, match=rf"{type(module).__name__} takes \(N, C, H, W\), got shape"):
        module(torch.zeros(1, module.channels, 5))


@pytest.mark.parametrize("value", [0, -1.0, True, "big", math.inf, math.nan])
def test_a_lambda_that_is_no_positive_number_is_refused(value):
    with pytest.raises(ConfigError, match="e_lambda must be a positive number, got"):
        SimAM(8, e_lambda=value)


@pytest.mark.parametrize("name", BUILD)
def test_attached_and_created_networks_have_the_same_keys(name):
    """The plain network with gates attached, and the one built with them, take each other's weights."""
    created = ecanet.create_model("resnet8", attention=name, num_classes=3).eval()
    plain = ecanet.create_model("resnet8", attention="none", num_classes=3).eval()
    x = image(2, 3, 32, 32, dtype=torch.float32)
    before = plain(x)
    attached = ecanet.attach(plain, name, preserve=name != "simam", example=x)
    if name != "simam":
        assert torch.equal(attached(x), before)
    state = {key: tensor for key, tensor in attached.state_dict().items() if not key.endswith(".gain")}
    assert state.keys() == created.state_dict().keys()
    created.load_state_dict(attached.state_dict())
    torch.testing.assert_close(created(x), attached(x))
    assert [site.attention for site in ecanet.attached(attached)] == [name] * 3
    with pytest.warns(UserWarning, match="gates that were not neutral") if name == "simam" else nullcontext():
        assert ecanet.attached(ecanet.detach(attached)) == []


@pytest.mark.parametrize("name", BUILD)
def test_networks_learn_with_it(name):
    """Two steps: after them the loss is finite, and every parameter of the gates has moved."""
    torch.manual_seed(0)
    # With one hidden unit for 16 channels, as by default, a ReLU may shut it for good: ASR's input is a constant.
    options = {"reduction": 1} if name == "asr" else {}
    model = ecanet.create_model("resnet8", attention=name, num_classes=4, in_channels=1, **options)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, labels = image(8, 1, 16, 16, dtype=torch.float32), torch.arange(8) % 4
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    gates = {name for name, module in model.named_modules() if isinstance(module, (GatedAttention, SimAM))}
    assert len(gates) == 3
    still = [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])]
    assert [key for key in still if not key.endswith("coord.reduce.bias")] == []  # a norm cancels that bias


def test_srm_needs_two_images_in_training():
    module, x = made("srm", torch.float32), image(1, 5, 3, 3, dtype=torch.float32)
    assert module(x).shape == x.shape
    with pytest.raises(ConfigError, match=r"^SRM trains on batches of two or more images, got 1; .*eval\(\)$"):
        module.train()(x)


@pytest.mark.parametrize(("n", "value"), [(64, 300.0), (256, 3.0)])
def test_styles_of_half_precision_are_summed_in_float(n, value):
    """The mean and the deviation of n x n values: a tenth is above ``value``, the others are below it."""
    x = torch.full((1, 1, n, n), value, dtype=torch.float16)
    x[..., : n // 10 * 2, : n // 2] *= 2
    found = compute_styles(x, None)[0, 0]
    assert found.dtype == torch.float32
    exact = x.double()
    expected = torch.stack([exact.mean(), exact.std(correction=0)]).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["ese", "asr"])
def test_a_folded_gate_computes_the_same(name):
    """The first weights of eSE scale with the means, so a doubled norm is undone there; ASR does not see the norm."""
    model, x = ecanet.create_model("resnet8", attention="none", num_classes=3).eval(), torch.randn(2, 3, 16, 16)
    ecanet.attach(model, name, example=x)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            nn.init.normal_(parameter, std=0.1)
    before = model(x)
    torch.testing.assert_close(ecanet.fold(model)(x), before)
    assert not [key for key in model.state_dict() if key.endswith("gain")]
