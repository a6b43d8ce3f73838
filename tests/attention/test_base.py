"""A gate's gain is a plain number: nothing that happens to tensors changes it, and files hold it when it is not 1."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ecanet
from ecanet.attention import ATTENTIONS, ECA, SE, make_attention
from ecanet.attention.base import GatedAttention
from ecanet.errors import CheckpointError

GATED = [name for name in ATTENTIONS if isinstance(make_attention(name, 32), GatedAttention)]
GAINS = [1.0, 2.0, 0.75]


def make(name, gain=2.0, seed=0):
    """A module in evaluation mode with random numbers in every tensor."""
    module = make_attention(name, 32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1, generator=generator)
    if isinstance(module, GatedAttention):
        module.gain = gain
    return module


def image():
    return torch.randn(2, 32, 6, 5, generator=torch.Generator().manual_seed(1))


def test_the_gain_is_in_the_state_dict_only_when_it_is_not_one():
    neutral, fresh = ECA(8), ECA(8)
    neutral.neutralize()
    assert isinstance(neutral.gain, float)
    assert sorted(neutral.state_dict()) == ["conv.weight", "gain"]
    assert sorted(fresh.state_dict()) == ["conv.weight"]
    reader = ECA(8)
    reader.load_state_dict(neutral.state_dict())
    assert reader.gain == 2
    assert sorted(reader.state_dict()) == ["conv.weight", "gain"]
    reader.load_state_dict(fresh.state_dict())  # weights without a gain mean the paper's form
    assert reader.gain == 1
    assert sorted(reader.state_dict()) == ["conv.weight"]
    reader.load_state_dict(neutral.state_dict())
    missing = reader.load_state_dict({}, strict=False).missing_keys  # neither: left as it is
    assert missing == ["conv.weight"]
    assert reader.gain == 2
    assert "gain=2" in repr(reader)


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("name", GATED)
def test_a_strict_load_takes_the_gain_and_nothing_else(name, gain):
    writer, reader = make(name, gain), make(name, 5.0, seed=2)
    state = writer.state_dict()
    assert ("gain" in state) == (gain != 1)
    assert set(state) - {"gain"} == set(dict(writer.named_parameters())) | set(dict(writer.named_buffers()))
    if gain != 1:
        assert (state["gain"].dtype, state["gain"].shape, state["gain"].device.type) == (torch.float32, (), "cpu")
    before = dict(state)
    result = reader.load_state_dict(state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert dict(state) == before  # the caller's dictionary stays whole
    if list(writer.parameters()) or gain != 1:  # a file of SE-Var1 in the paper's form says nothing about the gate
        assert reader.gain == gain
        assert torch.equal(reader(image()), writer(image()))


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_a_module_of_the_meta_device_takes_every_tensor_from_a_file(name, gain):
    writer = make(name, gain)
    with torch.device("meta"):
        reader = make_attention(name, 32).eval()
    assert {tensor.device.type for tensor in reader.state_dict().values()} <= {"meta", "cpu"}
    assert "meta" not in repr(reader)
    reader.load_state_dict(writer.state_dict(), assign=True)
    assert torch.equal(reader(image()), writer(image()))


@pytest.mark.parametrize("name", GATED)
def test_a_file_from_the_meta_device_holds_the_gain(name):
    with torch.device("meta"):
        gate = make_attention(name, 32)
        gate.gain = 1.5
        state = gate.state_dict()
    assert float(state["gain"]) == 1.5


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_memory_that_holds_anything_is_overwritten_by_a_strict_load(name, gain):
    writer = make(name, gain)
    with torch.device("meta"):
        reader = make_attention(name, 32).eval().to_empty(device="cpu")
    if isinstance(reader, GatedAttention):
        reader.gain = gain if name == "se-var1" else 1.0  # no parameter of SE-Var1 shows that a file is about it
    for tensor in (*reader.parameters(), *reader.buffers()):
        tensor.data.fill_(1e9 if tensor.is_floating_point() else 7)
    reader.load_state_dict(writer.state_dict())
    assert torch.equal(reader(image()), writer(image()))


@pytest.mark.parametrize("name", GATED)
def test_emptied_gates_keep_their_gain_and_start_at_random(name):
    """What sharded training does: shapes first, then memory, then `reset_parameters` of every module that has one."""
    with torch.device("meta"):
        gate = make_attention(name, 32)
    gate.gain = 2.0
    gate.to_empty(device="cpu")
    for tensor in (*gate.parameters(), *gate.buffers()):
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 7)
    for module in gate.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert gate.gain == 2
    assert all(tensor.isfinite().all() for tensor in gate.state_dict().values())
    drawn = [parameter for parameter in gate.parameters() if parameter.dim() > 1 and parameter.numel() > 1]
    assert all(parameter.std() > 0 for parameter in drawn)
    if name != "se-var1":
        gate.neutralize()
        assert torch.equal(gate.eval()(image()), image())


@pytest.mark.parametrize(("name", "spread"), [("se-var2", 3**-0.5), ("se-gc", 60**-0.5), ("aa", 20**-0.5)])
def test_parameters_of_the_modules_own_are_drawn_anew(name, spread):
    """Uniform from ±1; uniform from ±1/sqrt(20) for groups of 20 channels; normal for keys of 20 numbers."""
    torch.manual_seed(3)
    module = make_attention(name, 320)
    for tensor in module.parameters(recurse=False):
        tensor.detach().fill_(9)
    module.reset_parameters()
    for tensor in module.parameters(recurse=False):
        torch.testing.assert_close(tensor.detach().std().item(), spread, rtol=0.1, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gain_that_is_no_finite_number_is_refused(value):
    with pytest.raises(CheckpointError, match=r"'gain' must be one finite number, got tensor\(-?(nan|inf)\)"):
        ECA(8).load_state_dict({**ECA(8).state_dict(), "gain": torch.tensor(value)})


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(2, 3), torch.empty((), device="meta"), "two"])
def test_a_gain_that_is_no_number_is_refused(value):
    model = torch.nn.Sequential(SE(8))
    with pytest.raises(CheckpointError, match=r"'0\.gain' must be one finite number") as raised:
        model.load_state_dict({**model.state_dict(), "0.gain": value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", GATED)
def test_copies_and_pickles_keep_the_gain(name):
    gate = make(name)
    stored = io.BytesIO()
    torch.save(gate, stored)
    stored.seek(0)
    for copied in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), torch.load(stored, weights_only=False)):
        assert copied.gain == 2
        assert torch.equal(copied(image()), gate(image()))


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_conversions_leave_the_gain_alone(convert):
    gate = ECA(8)
    gate.gain = 1.7
    assert getattr(gate, convert)().gain == 1.7


def test_an_averaged_model_takes_the_gates_with_their_gain():
    model = ecanet.create_model("resnet8", num_classes=3).eval()
    for gate in model.modules():
        if isinstance(gate, ECA):
            gate.neutralize()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    x = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        averaged.update_parameters(model)
    assert torch.equal(averaged.eval()(x), model(x))
    assert averaged.module.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["eca", "se", "cbam", "gsop"])
def test_functions_of_the_parameters(name):
    gate = make(name)
    tensors = {**dict(gate.named_parameters()), **dict(gate.named_buffers())}
    assert torch.equal(torch.func.functional_call(gate, tensors, (image(),)), gate(image()))
    stacked, buffers = torch.func.stack_module_state([make(name, seed=seed) for seed in (0, 1)])
    x = image()
    run = torch.vmap(lambda p, b: torch.func.functional_call(gate, (p, b), (x,)))
    for y, seed in zip(run(stacked, buffers), (0, 1), strict=True):
        torch.testing.assert_close(y, make(name, seed=seed)(image()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GATED)
def test_exported_and_traced_gates_hold_the_gain_as_a_constant(name):
    gate = make(name, 1.5)
    torch.testing.assert_close(torch.export.export(gate, (image(),)).module()(image()), gate(image()))
    torch.testing.assert_close(torch.fx.symbolic_trace(gate)(image()), gate(image()))


def test_compiling_again_only_for_another_gain():
    gates = [make("eca", gain, seed) for seed, gain in enumerate((2.0, 2.0, 2.0, 1.0, 2.0, 1.0, 3.0, 4.0, 3.0))]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda gate, x: gate(x), backend=count, fullgraph=True)
    for gate in gates:
        torch.testing.assert_close(compiled(gate, image()), gate(image()))
    assert len(graphs) <= 4
