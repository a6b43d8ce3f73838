"""``cuda_graph=true``: the network's forward and backward as graphs, which a CPU records and repeats."""

import pytest
import torch
from torch import nn

import ecanet
from ecanet import ops
from ecanet.errors import ConfigError
from ecanet.recipes import DetectorConfig, Recipe
from ecanet.training import hardware
from ecanet.training.graphs import TrainingGraph
from graph_recording import record_graphs
from tiny_runs import TINY, add_tiny, equal, run, weights

SMALL = TINY.but(model=TINY.model.but(name="resnet8"), epochs=2, ema_decay=0.9)


SPEED = ("images_per_second", "seconds")


def make_network():
    torch.manual_seed(0)
    return ecanet.create_model("resnet8", num_classes=3, in_channels=1).train()


def draw(count, seed):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def train(call, network, batches):
    """Take a step of SGD for each batch of images; return all losses and, in the end, all tensors of the network."""
    optimizer, losses = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9), []
    for images in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(call(images), torch.arange(len(images)) % 3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, network.state_dict()


def compare(batches, rtol=0.0):
    """Train with graphs and without; return the graphs."""
    graphed, eager = make_network(), make_network()
    with record_graphs() as graphs:
        losses, tensors = train(TrainingGraph(graphed), graphed, batches)
    expected, values = train(eager, eager, batches)
    assert losses == pytest.approx(expected, rel=rtol)
    assert tensors.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(tensors[name], value, rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}")
    return graphs


def test_steps_by_graphs_equal_eager_ones():
    """Bit for bit: weights, running statistics and their count, though the capture runs the network several times."""
    forward, backward = compare([draw(8, seed) for seed in range(4)])
    assert forward.replays == backward.replays == 4
    assert len(forward.calls) > 30


def test_a_batch_of_another_shape_runs_without_graphs():
    forward, backward = compare([draw(count, count) for count in (8, 5, 8, 3, 8)])
    assert forward.replays == backward.replays == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # warm-up: garbage
def test_steps_in_triton_kernels_are_captured_and_repeated():
    """The launches are part of the graphs, and so are the statistics and their count, which the kernels write."""
    pytest.importorskip("triton")
    with ops.prefer_impl("fused"):
        forward, backward = compare([draw(4, seed) for seed in range(3)])
    assert forward.launches > 10
    assert backward.launches > 10


def test_evaluation_runs_without_graphs_and_sees_the_trained_weights():
    network, images = make_network(), draw(8, 0)
    graph = TrainingGraph(network)
    with record_graphs() as graphs:
        train(graph, network, [images] * 2)
        network.eval()
        assert torch.equal(graph(images), network(images))
    assert [one.replays for one in graphs] == [2, 2]


def test_the_random_state_is_that_of_before_the_capture():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))
    before = torch.get_rng_state()
    with record_graphs():
        TrainingGraph(network)(draw(8, 0))
        after_graph = torch.get_rng_state()
    torch.set_rng_state(before)
    network(draw(8, 0))
    assert torch.equal(torch.get_rng_state(), after_graph)


class _ReadsValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x):
        y = self.linear(x.flatten(1))
        return y if y.sum() > 0 else -y


def test_a_network_that_reads_values_is_refused_in_one_line():
    with (
        record_graphs(),
        pytest.raises(ConfigError, match=r"^cuda_graph: this network cannot be captured \(.*\); leave"),
    ):
        TrainingGraph(_ReadsValues())(draw(8, 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "detection", "detector": DetectorConfig()}, "cuda_graph is for classification"),
        ({"compile": True}, "compile=true and cuda_graph=true do not go together"),
        ({"accumulate": 2}, "cuda_graph=true takes one batch a step, got accumulate=2"),
    ],
)
def test_recipes_that_graphs_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe(cuda_graph=True, **settings)
    assert "\n" not in str(caught.value)
    assert "leave" in str(caught.value)


def test_a_run_without_a_gpu_or_on_several_is_refused(tmp_path, monkeypatch):
    add_tiny(monkeypatch)
    with pytest.raises(ConfigError, match="cuda_graph needs a CUDA GPU, and this run trains on cpu; leave it out"):
        run(SMALL.but(cuda_graph=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="is for one GPU, and this run has 4 processes"):
        hardware.check(SMALL.but(cuda_graph=True), torch.device("cuda"), 4)
    hardware.check(SMALL.but(cuda_graph=True), torch.device("cuda"), 1)


def test_a_run_by_graphs_ends_with_the_weights_of_an_eager_one(tmp_path, monkeypatch):
    """With the average of the weights, which changes places with the weights in each evaluation."""
    add_tiny(monkeypatch)
    monkeypatch.setattr(hardware, "_check_graph", lambda *_: None)
    eager = run(SMALL, tmp_path / "eager")
    with record_graphs() as graphs:
        graphed = run(SMALL.but(cuda_graph=True), tmp_path / "graphed")
    assert [one.replays for one in graphs] == [6, 6]
    assert equal(weights(graphed), weights(eager))
    assert {**graphed.metrics, **dict.fromkeys(SPEED)} == {**eager.metrics, **dict.fromkeys(SPEED)}
