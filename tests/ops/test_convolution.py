"""A convolution with bias, addition and ReLU in cuDNN's kernel: where it is chosen, and that nothing depends on it.

There is no cuDNN on a CPU, so a reference stands in for its operator, or something that is wrong.
"""

import contextlib
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet

import ecanet
from ecanet import ops
from ecanet.ops import choices, convolution, dispatch, proof_records
from lively import images, lively
from tensors import to_layout


def compute(given, geometry):
    """Return the result in float64, rounded once."""
    x, weight, bias, shortcut = (None if t is None else t.double() for t in given)
    y = F.conv2d(x, weight, bias, *geometry)
    y = F.relu(y if shortcut is None else y + shortcut)
    return y.to(given.x.dtype).contiguous(memory_format=torch.channels_last)


class Operator:
    """A stand-in for cuDNN's operator: what it was called with, and what it computes."""

    def __init__(self, function=compute):
        self.calls, self.function = [], function

    def __call__(self, given, geometry):
        self.calls.append((given, geometry))
        return self.function(given, geometry)


@pytest.fixture
def gpu(monkeypatch):
    """Treat the CPU as a GPU where cuDNN's operator is right and faster, nothing was tried, and Triton is missing."""
    operator = Operator()
    for room in (ops, dispatch):
        monkeypatch.setattr(room, "runs_on_gpu", lambda x: True)
    monkeypatch.setattr(ops.proof, "is_proven", lambda *key: False)
    monkeypatch.setattr(choices, "_choices", {})
    monkeypatch.setattr(choices, "compare_forms", lambda *forms: choices.FASTER)
    monkeypatch.setattr(convolution, "run_operator", operator)
    return operator


def run_both(network, x, **autocast):
    """Return the network's results with the operator and by PyTorch's operations."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        actual = network(x)
        with ops.prefer_impl("lean"):
            return actual, network(x)


COMPARE = choices.compare_forms


def chain(*layers):
    return nn.Sequential(*layers)


NETWORKS = {
    "basic blocks": (lambda: ecanet.create_model("resnet8", attention="none"), 3, 7),
    "gates": (lambda: ecanet.create_model("resnet8"), 3, 4),  # a gate after the last 3x3 convolution of a block
    "bottlenecks": (lambda: chain(resnet.Bottleneck(8, 2), resnet.Bottleneck(8, 2)), 8, 6),
    "groups": (lambda: chain(nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU()), 8, 1),
    "dilation": (lambda: chain(nn.Conv2d(3, 8, 3, dilation=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()), 3, 1),
    "uneven": (lambda: chain(nn.Conv2d(3, 8, (1, 5), (2, 1), (0, 2)), nn.BatchNorm2d(8), nn.ReLU()), 3, 1),
    "no bias": (lambda: chain(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU()), 3, 1),
    "1x1": (lambda: chain(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()), 3, 1),
    "relu6": (lambda: chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6()), 3, 0),
    "circular": (
        lambda: chain(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(8), nn.ReLU()), 3, 0,
    ),
    "same": (lambda: chain(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU()), 3, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_copy_gives_the_same_with_the_operator(name, gpu):
    torch.manual_seed(0)
    make, channels, count = NETWORKS[name]
    network = ecanet.optimize(lively(make()), example=torch.randn(1, channels, 24, 24))
    x = torch.randn(2, channels, 24, 24, generator=torch.Generator().manual_seed(1))
    run_both(network, x)
    gpu.calls.clear()
    actual, expected = run_both(network, x)
    assert len(gpu.calls) == count
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("size", [(24, 24), (17, 31)])
def test_autocast_and_odd_sizes(size, gpu):
    torch.manual_seed(0)
    network = ecanet.optimize(lively(ecanet.create_model("resnet8", attention="none")))
    x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    actual, expected = run_both(network, x, autocast=True)
    assert {t.dtype for given, _ in gpu.calls for t in given if t is not None} == {torch.bfloat16}
    assert sum(given.shortcut is not None for given, _ in gpu.calls) >= 3
    # each of 9 convolutions rounds twice in PyTorch's operations, once in the operator
    assert (actual - expected).norm() <= 9**0.5 * torch.finfo(torch.bfloat16).eps * expected.norm()


def lose(**parts):
    return lambda given, geometry: compute(given._replace(**parts), geometry)


def refuse(given, geometry):
    raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ...\nimport torch")


WRONG = {
    "no bias": (lose(bias=None), "it is off by"),
    "no shortcut": (lose(shortcut=None), "it is off by"),
    "no relu": (lambda given, geometry: -compute(given, geometry), "it is off by"),
    "another stride": (lambda g, geometry: compute(g, geometry)[:, :, 1:], "it returns"),
    "another dtype": (lambda *args: compute(*args).double(), "it returns"),
    "3 % off": (lambda *args: 1.03 * compute(*args), "it is off by"),
    "wrong in the last image": (lambda *args: compute(*args).index_fill_(0, torch.tensor(-1), 0), "it is off by"),
    "NaN becomes 0": (lambda *args: compute(*args).nan_to_num(0), "it turns NaN into a number"),
    "refuses": (refuse, "it does not run: cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
}


def basic_block():
    torch.manual_seed(0)
    block = resnet.BasicBlock(8, 8)
    x = to_layout(torch.randn(4, 8, 9, 7), True)
    return ecanet.optimize(nn.Sequential(lively(block)), example=x), x


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_operator_is_not_used(name, gpu):
    network, x = basic_block()
    gpu.function, reason = WRONG[name]
    actual, expected = run_both(network, x)
    used = sum(choice == choices.FASTER for choice in ops.list_choices().values())
    assert used == (name == "no shortcut")  # the first of the two convolutions has none
    assert any(choice.startswith(reason) for choice in ops.list_choices().values())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    tried = len(gpu.calls)
    run_both(network, x)
    assert len(gpu.calls) - tried == used  # and it is not tried again


def test_a_size_that_is_refused_later_runs_by_pytorch(gpu):
    """Two sizes of the same octave share one trial."""
    network, x = basic_block()
    run_both(network, x)

    def refuse_others(given, geometry):
        return compute(given, geometry) if given.x.shape == x.shape else refuse(given, geometry)

    gpu.function = refuse_others
    actual, expected = run_both(network, x[:, :, :, :6].contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert all("CUDNN_STATUS_NOT_SUPPORTED" in choice for choice in ops.list_choices().values())


def test_an_error_of_memory_is_an_error(gpu):
    network, x = basic_block()
    run_both(network, x)

    def fail(given, geometry):
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.function = fail
    with pytest.raises(torch.OutOfMemoryError):
        run_both(network, x)


def test_where_it_is_not_used(gpu, monkeypatch):
    """Gradients, float64, hooks, dispatch modes, deterministic algorithms, empty inputs, and no GPU."""
    network, x = basic_block()
    network(x)
    with torch.no_grad():
        network.double()(x.double())
        network.float()(x[:0])
        with FlopCounterMode(display=False) as counter:
            network(x)
        assert counter.get_total_flops() == 2 * 2 * x.numel() * 8 * 9
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cudnn, "deterministic", True)
            network(x)
            patch.setattr(ops, "runs_on_gpu", lambda x: False)
            patch.setattr(torch.backends.cudnn, "deterministic", False)
            network(x)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            network(x)
        handle = network[0].branch[1].register_forward_hook(lambda *args: None)
        network(x)
        handle.remove()
        assert gpu.calls == []
        network(x)
    assert gpu.calls != []


def delay(seconds, function):
    return lambda *args: time.sleep(seconds) or function(*args)


@pytest.mark.parametrize("slow", ["run_operator", "run_plain"])
def test_a_slow_operator_is_not_used(slow, gpu, monkeypatch):
    monkeypatch.setattr(choices, "compare_forms", COMPARE)
    monkeypatch.setattr(choices, "CALLS", 1)
    monkeypatch.setattr(convolution, slow, delay(0.02, getattr(convolution, slow)))
    network, x = basic_block()
    run_both(network, x)
    for choice in ops.list_choices().values():
        assert (choice == choices.FASTER) == (slow == "run_plain")
        assert (" ms, PyTorch's operations take " in choice) == (slow == "run_operator")


# what is remembered


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return the folder of records of a machine with a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proof_records, "describe_gpu", lambda device: ["H200"])
    return tmp_path / "ecanet" / "proofs"


def test_the_next_process_makes_the_same_choice_without_a_trial(gpu, machine):
    network, x = basic_block()
    run_both(network, x)
    first = ops.list_choices()
    assert len(list(machine.iterdir())) == len(first) == 2
    for choice in (choices.FASTER, "it takes 2 ms, PyTorch's operations take 1 ms"):
        for path in machine.iterdir():
            head, _, _ = path.read_bytes().partition(b"\n")
            path.write_bytes(head + f"\n{choice}\n".encode())
        choices._choices.clear()
        gpu.calls.clear()
        run_both(network, x)
        assert ops.list_choices() == dict.fromkeys(first, choice)
        assert len(gpu.calls) == (2 if choice == choices.FASTER else 0)


@pytest.mark.parametrize("rest", [b"", b"\n", b"\nfas", b"\n\n"])
def test_a_damaged_record_of_a_choice_asks_for_a_new_trial(rest, gpu, machine):
    network, x = basic_block()
    run_both(network, x)
    for path in machine.iterdir():
        path.write_bytes(path.read_bytes().partition(b"\n")[0] + rest)
    choices._choices.clear()
    gpu.calls.clear()
    run_both(network, x)
    assert len(gpu.calls) > 2
    assert set(ops.list_choices().values()) == {choices.FASTER}


def test_no_memory_for_the_trial_is_not_recorded(gpu, machine):
    def fail(given, geometry):
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.function = fail
    network, x = basic_block()
    actual, expected = run_both(network, x)
    assert torch.equal(actual, expected)
    assert set(ops.list_choices().values()) == {"there was no memory to compare the two forms"}
    assert not machine.exists()


def test_nothing_is_tried_while_a_graph_is_captured(gpu, monkeypatch):
    network, x = basic_block()
    with monkeypatch.context() as patch:
        patch.setattr(ops.proof, "is_capturing", lambda device: True)
        run_both(network, x)
    assert gpu.calls == []
    assert ops.list_choices() == {}
    run_both(network, x)
    assert set(ops.list_choices().values()) == {choices.FASTER}


def test_the_trial_leaves_no_trace(gpu):
    """Neither in the random state, nor in the tensors of the network, nor by gradients."""
    network, x = basic_block()
    state, before = torch.get_rng_state(), x.clone()
    with torch.inference_mode():
        network(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)


def test_images_of_many_sizes_are_few_trials(gpu):
    network, _ = basic_block()
    with torch.no_grad():
        for side in range(16, 40):
            network(images(1, side)[:, [0] * 8].contiguous(memory_format=torch.channels_last))
    assert len(ops.list_choices()) == 2 * 3  # from 256 to 1,521 positions


# one pass behind the convolution


@pytest.fixture
def with_triton(gpu, monkeypatch):
    """Treat the kernels as proven, and cuDNN's operator as one that loses NaN. Return the list of the passes."""
    pytest.importorskip("triton")
    from ecanet.ops.triton import launch

    passes, finish = [], launch.finish_in_place
    gpu.function = lambda *args: compute(*args).nan_to_num(0)
    monkeypatch.setattr(ops.proof, "is_proven", lambda device, dtype, kernels="fused": kernels == "fused")
    monkeypatch.setattr(launch, "finish_in_place", lambda *args: passes.append(args) or finish(*args))
    return passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_where_nan_would_be_lost_one_pass_follows_the_convolution(dtype, channels_last, with_triton):
    network, x = basic_block()
    network, x = network.to(dtype), to_layout(x.to(dtype), channels_last)
    run_both(network, x)
    reasons = ops.list_choices()
    assert sum(choice == "it turns NaN into a number" for choice in reasons.values()) == 2
    assert all((choice == choices.FASTER) == ("one pass" in kind) for kind, choice in reasons.items())
    with_triton.clear()
    actual, expected = run_both(network, x)
    assert [shortcut is not None for _, _, shortcut in with_triton] == [False, True]
    # PyTorch's operations round up to three times for each of two convolutions; the interpreter truncates bfloat16
    assert (actual - expected).norm() <= 6 * torch.finfo(dtype).eps * expected.norm()
    x[1, 2, 3, 4] = float("nan")
    actual, expected = run_both(network, x)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert expected.isnan().any()
