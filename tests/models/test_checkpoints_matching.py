"""The entry and the prefix that are taken from a file, what is refused, and that a refusal changes nothing."""

import collections

import pytest
import torch
import torchvision
from torch import nn

import ecanet
from ecanet.errors import CheckpointError
from ecanet.models import checkpoints, matching
from published_networks import randomize


def make_network(**options):
    return ecanet.create_model("resnet8", num_classes=10, **options)


WEIGHTS = randomize(make_network()).state_dict()
OTHER = randomize(make_network(), seed=1).state_dict()


def add_prefix(prefix, state=WEIGHTS):
    return {prefix + name: tensor for name, tensor in state.items()}


def holds(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "encoder_q.",
        "module.encoder_q.",
        "_fsdp_wrapped_module.",
        "ema_model.",
        "net.",
        "model._orig_mod.backbone.",
        "a.name.nobody.listed.",
    ],
)
@pytest.mark.parametrize("wrapper", ["net", "params_ema", "generator", "some.thing", "a", ""])
def test_the_prefix_and_the_entry_that_fit_are_found(prefix, wrapper):
    content = add_prefix(prefix)
    for key in reversed(wrapper.split(".") if wrapper else []):
        content = {"epoch": 3, key: content, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}}
    model = make_network()
    assert ecanet.load_checkpoint(model, content).complete
    assert holds(model, WEIGHTS)


@pytest.mark.parametrize("segment", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"])
def test_wrappers_in_the_middle_of_names(segment):
    state = {name.replace("layer2.", f"layer2.{segment}."): tensor for name, tensor in WEIGHTS.items()}
    state = {name.replace(".conv2.", f".conv2.{segment}."): tensor for name, tensor in state.items()}
    model = make_network()
    assert ecanet.load_checkpoint(model, state).complete
    assert holds(model, WEIGHTS)


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential, torch.compile, lambda m: nn.Sequential(nn.ReLU(), m)])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_the_network_may_be_wrapped_too(wrap, prefix):
    model = make_network()
    assert ecanet.load_checkpoint(wrap(model), add_prefix(prefix)).complete
    assert holds(model, WEIGHTS)


def test_a_module_called_like_a_wrapper_keeps_its_name():
    model = nn.Sequential(collections.OrderedDict(module=nn.Linear(2, 2), weight=nn.Identity()))
    model.register_parameter("bias", nn.Parameter(torch.zeros(2)))
    state = {"bias": torch.ones(2), "module.bias": torch.full((2,), 2.0), "module.weight": torch.full((2, 2), 3.0)}
    assert ecanet.load_checkpoint(model, state).complete
    assert (model.bias[0], model.module.bias[0], model.module.weight[0, 0]) == (1, 2, 3)


def test_a_head_beside_the_backbone_is_found():
    state = {name if name.startswith("fc.") else f"backbone.{name}": tensor for name, tensor in WEIGHTS.items()}
    model = make_network()
    assert ecanet.load_checkpoint(model, {"state_dict": add_prefix("module.", state)}).complete
    assert holds(model, WEIGHTS)


@pytest.mark.parametrize(
    ("content", "entry", "other"),
    [
        ({"state_dict": OTHER, "state_dict_ema": WEIGHTS}, "state_dict_ema", "state_dict"),
        ({"model": OTHER, "model_ema": WEIGHTS}, "model_ema", "model"),
        ({"ema": WEIGHTS, "net": OTHER}, "ema", "net"),
        ({"params": OTHER, "params_ema": WEIGHTS}, "params_ema", "params"),
        ({"student": OTHER, "teacher": add_prefix("module.backbone.")}, "teacher: backbone.*", "student"),
        ({"modelEMA": WEIGHTS, "model": OTHER}, "modelEMA", "model"),
        ({**add_prefix("online_model.", OTHER), **add_prefix("ema_model.")}, "ema_model.*", "online_model.*"),
        ({"current_model_state": OTHER, "state_dict": WEIGHTS}, "state_dict", "current_model_state"),
        ({**add_prefix("encoder_q."), **add_prefix("encoder_k.", OTHER)}, "encoder_q.*", "encoder_k.*"),
        ({"first": WEIGHTS, "schema": OTHER}, "first", "schema"),
        ({"optimizer": {"exp_avg": OTHER}, "weights": WEIGHTS}, "weights", "optimizer.exp_avg"),
    ],
)
def test_averaged_weights_are_preferred_and_the_choice_is_said(content, entry, other):
    model = make_network()
    report = ecanet.load_checkpoint(model, content)
    assert holds(model, WEIGHTS)
    assert (report.entry, report.others) == (entry, (other,))
    assert f"taken from {entry}" in str(report)
    assert f"also in the file, not used: 1 ({other})" in str(report)


def test_what_fits_is_more_than_a_name():
    """Averages of the parameters alone lack the norms' statistics; a discriminator fits nowhere."""
    averaged = {name: tensor for name, tensor in OTHER.items() if "running" not in name}
    for content in ({"ema": averaged, "net": WEIGHTS}, {"ema": {"conv1.weight": torch.ones(2)}, "net": WEIGHTS}):
        model = make_network()
        assert ecanet.load_checkpoint(model, content).entry == "net"
        assert holds(model, WEIGHTS)
    backbone = {name: tensor for name, tensor in WEIGHTS.items() if not name.startswith("fc.")}
    wider = {name: tensor if tensor.dim() == 1 else torch.ones(9) for name, tensor in OTHER.items()}
    assert ecanet.load_checkpoint(make_network(), {"wider": wider, "net": backbone}).entry == "net"
    without_counters = {name: tensor for name, tensor in WEIGHTS.items() if "num_batches" not in name}
    assert ecanet.load_checkpoint(make_network(), {"net": OTHER, "ema": without_counters}).entry == "ema"


class Name(str):
    """A name that counts how often it is compared."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other):
        Name.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_time_grows_in_proportion_to_the_number_of_names():
    Name.compared, extra = 0, 100_000
    one = torch.ones(1)
    state = {Name(f"heads.{i}.block.{i % 7}.weight"): one for i in range(extra)}
    report = ecanet.load_checkpoint(make_network(), {**state, **WEIGHTS})
    assert len(report.unexpected) == extra
    assert len(str(report)) < 400
    assert Name.compared < 10 * extra


def test_the_report_is_short_and_printable():
    state = {**WEIGHTS, "two\nlines": torch.ones(1), "x" * 10_000: torch.ones(1), "\ud800": torch.ones(1)}
    text = str(ecanet.load_checkpoint(make_network(), state))
    assert "two\\nlines" in text
    assert len(text.splitlines()) == 2
    assert len(text.encode()) < 300
    kept = ecanet.load_checkpoint(make_network(), {**WEIGHTS, 7: torch.ones(1), (1, "a"): torch.ones(1)})
    assert kept.unexpected == [f"<int key {len(WEIGHTS)}>", f"<tuple key {len(WEIGHTS) + 1}>"]


def replace_one(change, name="conv1.weight"):
    return {**WEIGHTS, name: change(WEIGHTS[name])}


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of sparse and quantized tensors
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: replace_one(lambda t: t.to_sparse()), "'conv1.weight' has the layout torch.sparse_coo; save its to_d"),
        (lambda: replace_one(lambda t: t.to_sparse_csr(), "fc.weight"), "'fc.weight' has the layout torch.sparse_csr"),
        (lambda: replace_one(lambda t: t.to("meta")), "'conv1.weight' is on the meta device"),
        (
            lambda: replace_one(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
            "'conv1.weight' is quantized; save its dequantize()",
        ),
        (lambda: replace_one(lambda t: (t * 100).to(torch.int8)), "has the dtype torch.int8 where the network has"),
        (lambda: replace_one(lambda t: t.to(torch.complex64)), "has the dtype torch.complex64 where the network has"),
        (lambda: replace_one(lambda t: t.tolist()), "'conv1.weight' is list and not a plain tensor"),
        (lambda: replace_one(lambda t: t.numpy()), "'conv1.weight' is ndarray and not a plain tensor"),
        (
            lambda: replace_one(lambda t: torch.nested.nested_tensor([t[0], t[1]])),
            "'conv1.weight' is a nested tensor and not a plain tensor",
        ),
        (lambda: {name: tensor.tolist() for name, tensor in WEIGHTS.items()}, "holds no state dict"),
        (lambda: {0: torch.ones(1), (1, 2): torch.ones(2)}, "shares no tensor name with this network"),
        (lambda: [WEIGHTS], r"holds no state dict.*\(it is list\)"),
        (make_network, r"holds no state dict.*\(it is ResNet\)"),
        (lambda: None, r"holds no state dict.*\(it is NoneType\)"),
        (lambda: torchvision.models.vgg11(num_classes=2).features.state_dict(), "shares no tensor name"),
        (
            lambda: {name: torch.ones(1, 1, 1, 1, 1) for name in WEIGHTS},
            r"no tensor that fits this network: all \d+ with its names have other shapes, first 'conv1.weight' \(1,",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(content, says):
    model = randomize(make_network(), seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=says) as caught:
        ecanet.load_checkpoint(model, content())
    assert "\n" not in str(caught.value)
    assert holds(model, before)


def test_networks_without_values_are_refused():
    with pytest.raises(CheckpointError, match=r"on the meta device and holds no values.*to_empty"):
        ecanet.load_checkpoint(make_network().to("meta"), WEIGHTS)
    with pytest.raises(CheckpointError, match="lazy layers without shapes; run it once"):
        ecanet.load_checkpoint(nn.Sequential(nn.LazyLinear(3)), {"0.weight": torch.ones(3, 2)})


@pytest.mark.parametrize("taps", [2**33 + 1, 2**33, 4097])
@pytest.mark.parametrize("attention", ["eca", "eca-ns"])
def test_an_absurd_kernel_is_not_built(taps, attention):
    """A tensor may repeat one number without end (stride 0); a kernel as long would fill the memory."""
    model = make_network(attention=attention)
    name, weight = next((name, tensor) for name, tensor in model.state_dict().items() if tensor.dim() == 3)
    state = {**model.state_dict(), name: torch.zeros(1).expand(*weight.shape[:2], taps)}
    report = ecanet.load_checkpoint(model, state)
    assert report.mismatched == [name]
    assert report.resized == {}


def test_a_single_gate_takes_its_kernel_from_the_file():
    gate, source = ecanet.ECA(64), ecanet.ECA(64, 9)
    assert ecanet.load_checkpoint(gate, source.state_dict()).complete
    assert torch.equal(gate.conv.weight, source.conv.weight)
    assert float(gate.gain) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_that_are_not_finite_are_said(value, dtype):
    state = replace_one(lambda t: torch.full_like(t, value, dtype=dtype), "bn1.weight")
    report = ecanet.load_checkpoint(make_network(), state)
    assert report.not_finite == ["bn1.weight"]
    assert "not finite (NaN or infinity): 1 (bn1.weight)" in str(report)
    assert ecanet.load_checkpoint(make_network(), WEIGHTS).not_finite == []


def test_loading_that_fails_half_way_changes_nothing(monkeypatch):
    """A module of the user's raises after most tensors, a kernel size and the neutral gates have changed."""
    model = make_network(kernel_sizes=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kernels = [gate.conv for gate in checkpoints.find_gates(model).values()]
    monkeypatch.setattr(model.fc, "_load_from_state_dict", lambda *_: 1 / 0)
    state = {name: tensor for name, tensor in WEIGHTS.items() if "layer3" not in name or "eca" not in name}
    with pytest.raises(CheckpointError, match="was not loaded, and the network is as it was before: division by zero"):
        ecanet.load_checkpoint(model, state)
    assert holds(model, before)
    assert all(a is b.conv for a, b in zip(kernels, checkpoints.find_gates(model).values(), strict=True))
    monkeypatch.undo()
    report = ecanet.load_checkpoint(model, state)
    assert (len(report.resized), report.neutral) == (2, ["layer3.0.eca"])


def test_prefixes_are_tried_from_the_inside():
    assert matching.outer_prefixes("a.b.") == ["a.b.", "a.", ""]
    assert list(matching.split_name("a.b.c")) == [("", "a.b.c"), ("a.", "b.c"), ("a.b.", "c")]
    assert len(list(matching.split_name("a." * 1000))) == matching.LONGEST_PREFIX + 1
