"""What a ResNet does on a CPU, beside torchvision's: the operations that PyTorch dispatches, and their new memory."""

from collections import Counter

import pytest
import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ecanet
from ecanet import ops


class Operations(TorchDispatchMode):
    """Count operations by name, and the bytes of results that are not in the memory of an argument."""

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.names[func.name().removeprefix("aten::")] += 1
        known = {x.data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        for x in results if isinstance(results, tuple | list) else (results,):
            if isinstance(x, Tensor) and x.data_ptr() not in known:
                self.bytes += x.nbytes
        return results


def run(network, training):
    """Run a step of training, or an evaluation without gradients, on one thread: autograd's has no dispatch mode."""
    network = network.train(training).to(memory_format=torch.channels_last)
    x = torch.zeros(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.autograd.set_multithreading_enabled(False), Operations() as seen:
        if training:
            network(x).sum().backward()
        else:
            with torch.no_grad():
                network(x)
    return seen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_a_plain_network_runs_torchvisions_operations(name, training):
    """The sum with the shortcut needs no new tensor: that made inference 3 % slower than torchvision's."""
    theirs = run(getattr(torchvision.models, name)(), training)
    ours = run(ecanet.create_model(name, attention="none"), training)
    assert ours.names == theirs.names
    assert ours.bytes == theirs.bytes


def test_a_gate_needs_no_new_tensor_in_inference():
    plain = run(ecanet.create_model("resnet18", attention="none"), False)
    gated = run(ecanet.create_model("resnet18"), False)
    assert gated.bytes < 1.05 * plain.bytes


def test_two_outputs_of_a_block_are_for_kernels_only(monkeypatch):
    """On a CPU they gain nothing."""
    asked, pair = [], ops.residual_tail_pair

    def record(*args, second_output, **options):
        asked.append(second_output)
        return pair(*args, second_output=second_output, **options)

    monkeypatch.setattr(ops, "residual_tail_pair", record)
    network, x = ecanet.create_model("resnet14", num_classes=3), torch.randn(2, 3, 8, 8)
    network(x)
    assert asked == [False] * 6
    asked.clear()
    pytest.importorskip("triton")
    with ops.prefer_impl("fused"):
        network(x)
        assert asked == [True, False] * 3
        asked.clear()
        with torch.no_grad():
            network(x)
        assert asked == [False] * 6
