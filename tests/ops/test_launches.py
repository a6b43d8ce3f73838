"""A training step and a batch in evaluation on a GPU: how many kernels they take, counted without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import ecanet

pytest.importorskip("triton")

from launches import count_batch, count_step

BOUNDS = {"plain": (18, 310), "eca": (34, 310)}
"""Most small operations and most launches of Triton in a training step of ResNet-50 at batch 256."""

EVALUATION = {None: (122, 20.5), "one pass": (105, 11.8), "kernel": (88, 3.0)}
"""Most kernels of a batch for the optimized ECA-ResNet-50 at batch 256, and most MB an image beside convolutions."""

PYTHON_TIME = 1.4
"""Most Python time of a step of ECA-ResNet-50, over that of torchvision's ResNet-50. Measured: 1.19 to 1.29."""


def make_network(name):
    with torch.device("meta"):
        if name == "torchvision":
            return torchvision.models.resnet50()
        return ecanet.create_model("resnet50", attention="none" if name == "plain" else name)


def describe_excess(name, counts):
    """Return by how much a network takes more than its bounds, None if it does not."""
    found = counts.small.total(), counts.launches.total()
    if all(number <= most for number, most in zip(found, BOUNDS[name], strict=True)):
        return None
    return f"{name}: {found} small operations and launches, allowed {BOUNDS[name]}; {counts}"


def test_a_training_step_stays_within_its_bounds():
    """Print the table, and hold the counts of this library's networks to their bounds."""
    print(f"\n{'ResNet-50, batch 256':20s} {'small':>6s} {'Triton':>7s}")
    for name in ("torchvision", *BOUNDS):
        counts = count_step(make_network(name), 256)
        print(f"{name:20s} {counts.small.total():6d} {counts.launches.total():7d}")
        if name in BOUNDS:
            assert describe_excess(name, counts) is None


def test_one_more_operation_in_each_gated_tail_exceeds_the_bounds(monkeypatch):
    from ecanet.ops.triton import node

    right = node.compute_coefficients

    def wasteful(z, grid, run, *rest):
        if run.planes_shape is not None:
            z.new_zeros(1)
        return right(z, grid, run, *rest)

    monkeypatch.setattr(node, "compute_coefficients", wasteful)
    assert describe_excess("eca", count_step(make_network("eca"), 256)) is not None


@pytest.mark.parametrize(
    ("attention", "batch"),
    [("eca", 32), ("eca-ns", 256), *(pytest.param(f"se-var{i}", 32, marks=pytest.mark.slow) for i in (1, 2))],
)
def test_every_gate_of_taps_is_one_node(attention, batch):
    """A sum over programs for ECA's taps is the only operation that a gate adds, whatever the number of samples."""
    counts = count_step(make_network(attention), batch)
    assert counts.small.total() == BOUNDS["plain"][0] + (16 if attention == "eca" else 0)
    assert counts.launches.total() == BOUNDS["plain"][1]


@pytest.mark.parametrize("attention", ["gct", "srm"])
def test_gates_on_moments_make_no_further_pass_over_memory(attention):
    """The kernels that read or write whole tensors run as often as for ECA, and no operation of PyTorch does more."""
    eca, found = (count_step(make_network(name), 256) for name in ("eca", attention))
    for kernel in ("_moments", "_apply", "_reduce", "_grads"):
        assert found.launches[kernel] == eca.launches[kernel]
    assert found.launches.total() < eca.launches.total()  # the rest of the algebra is PyTorch's, on N x C numbers
    assert found.large == eca.large


@pytest.mark.slow
def test_an_optimized_batch_stays_within_its_bounds():
    """Print the table. cuDNN's kernel replaces three at each 3x3 convolution and the stem; the rest is the same."""
    network, found = ecanet.optimize(ecanet.create_model("resnet50").eval()), {}
    print(f"\n{'optimized ECA-ResNet-50, batch 256':40s} {'kernels':>8s} {'MB/image':>8s}")
    for name in EVALUATION:
        found[name] = counts = count_batch(network, 256, name)
        kernels, megabytes = counts.kernels.total(), counts.moved / 256e6
        print(f"{name or 'plain':40s} {kernels:8d} {megabytes:8.1f}")
        assert kernels <= EVALUATION[name][0]
        assert megabytes <= EVALUATION[name][1]
    before, _, after = (counts.kernels for counts in found.values())
    assert before - after == {"convolution": 17, "bias": 17, "relu_": 17}
    assert after - before == {"convolution_relu": 17}


@pytest.mark.slow
def test_python_time_of_a_step_stays_within_its_bound():
    """Triton's own launcher runs, with a driver that does nothing. The first run compiles the kernels for minutes."""
    script = Path(__file__).parents[1] / "python_time.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, script, "40"], env=environment, capture_output=True, text=True, check=True)
    times = json.loads(run.stdout.splitlines()[-1])
    print(times)
    assert times["eca"] <= PYTHON_TIME * times["torchvision"]
    assert times["plain"] <= PYTHON_TIME * times["torchvision"]
