"""optimize(graph=True): when a graph is captured and replayed, with a stand-in for the graph on a CPU."""

import copy

import pytest
import torch
from torch import nn

import ecanet
from ecanet import ops
from ecanet.errors import ConfigError
from ecanet.inference import captured
from lively import images, lively


def make():
    torch.manual_seed(0)
    return lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


@pytest.fixture
def counts(monkeypatch):
    """Treat the CPU as a GPU; a graph is the network again, writing into the output of its capture."""
    counts = {"captures": 0, "replays": 0}

    def capture(network, x):
        counts["captures"] += 1
        static = x.clone()
        output = network(static)

        def replay():
            counts["replays"] += 1
            output.copy_(network(static))

        return captured.Capture(replay, static, output)

    monkeypatch.setattr(captured, "capture", capture)
    monkeypatch.setattr(ops, "runs_on_gpu", lambda x: True)
    monkeypatch.setattr(ops, "get_requested_impl", lambda: "lean")
    return counts


def test_one_shape_is_replayed_and_others_run_as_they_are(counts):
    model = make()
    fast = ecanet.optimize(model, graph=True)
    small, other, large = images(2, 9), images(2, 9, seed=2), images(2, 11)
    with torch.no_grad():
        first, second, third = fast(small), fast(other), fast(large)
        for y, x in ((first, small), (second, other), (third, large)):
            torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
        assert counts == {"captures": 1, "replays": 2}
        fast(small.contiguous(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            fast(small)
        assert counts["replays"] == 2
    fast(small)  # gradients are on
    assert counts == {"captures": 1, "replays": 2}
    assert fast.optimization.folded == ["1"]


def test_other_tensors_in_the_network_need_another_graph(counts):
    fast = ecanet.optimize(make(), graph=True)
    with torch.no_grad():
        fast(images(2, 9))
        fast.double()(images(2, 9).double())
        assert counts == {"captures": 2, "replays": 2}
        copy.deepcopy(fast)(images(2, 9).double())
    assert counts["captures"] == 3


def test_a_cpu_is_refused_in_one_line(monkeypatch):
    with pytest.raises(ConfigError, match=r"graph=True needs a network on a CUDA device, this one is on cpu; move it"):
        ecanet.optimize(make(), graph=True)
    with pytest.raises(ConfigError, match="takes CUDA tensors, got one on cpu"):
        captured.CapturedNetwork(make())(images(1, 9))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="Sequential cannot be captured as a CUDA graph"):
            captured.capture(make(), images(1, 9))
