"""What only a GPU can show: the kernels' own proof there, and a captured training step. Skipped where there is none."""

import copy

import pytest
import torch

import ecanet
from ecanet import ops
from ecanet.ops import proof
from ecanet.training.graphs import TrainingGraph
from tensors import DEVICE

on_gpu = DEVICE != "cpu" and torch.cuda.is_available()  # neither interpreted nor simulated
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not on_gpu, reason="needs a CUDA GPU and -m gpu")]


@pytest.mark.parametrize("dtype", proof.DTYPES)
@pytest.mark.parametrize("find", [proof.find_failure, proof.find_expansion_failure])
def test_kernels_pass_their_proof(find, dtype):
    assert find(torch.empty(0).device, dtype) is None


def test_steps_by_cuda_graphs_equal_eager_ones():
    """The capture runs the kernels, and leaves no trace in the statistics."""
    network = ecanet.create_model("resnet8", num_classes=3, in_channels=1).train()
    images = [torch.rand(8, 1, 16, 16) for _ in range(3)]
    assert ops.uses_kernels(images[0])
    states = []
    for graphs in (True, False):
        mine = copy.deepcopy(network)
        call, optimizer = TrainingGraph(mine) if graphs else mine, torch.optim.SGD(mine.parameters(), 0.01)
        for x in images:
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
        states.append(mine.state_dict())
    for name, value in states[1].items():
        torch.testing.assert_close(
            states[0][name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
