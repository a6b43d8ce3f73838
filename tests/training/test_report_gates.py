"""The report of a run shows what its gates do, and cannot lose the run."""

import pytest
import torch
from torch import nn

from ecanet import SE
from ecanet.attention import record_gates
from ecanet.training.gates import summarize_gates
from tiny_runs import TINY, add_tiny, run


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    add_tiny(monkeypatch)


class Still(nn.Module):
    """A task whose network is given; its forward is the network's."""

    def __init__(self, model: nn.Module, sample: object):
        super().__init__()
        self.model, self.sample = model, sample

    def forward(self, x):
        return self.model(x)


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = SE(4)

    def forward(self, x):
        return x


def test_a_run_keeps_what_its_gates_did(tmp_path):
    gates = run(TINY.but(epochs=1), tmp_path / "run").artifacts["gates"]
    assert len(gates) == 3
    assert all(len(gate["mean"]) == len(gate["deviation"]) > 1 for gate in gates)
    assert gates[0]["name"].startswith("layer1.0.")
    assert "<h2>Gates</h2>" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_without_gates_has_no_such_section(tmp_path):
    plain = TINY.but(epochs=1, model=TINY.model.but(attention="none"))
    assert run(plain, tmp_path / "run").artifacts["gates"] == []
    assert "<h2>Gates</h2>" not in (tmp_path / "run" / "report.html").read_text()


def test_the_report_shows_the_gates_in_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5), SE(4))
    sample = 3 + 5 * torch.randn(6, 4, 3, 3)
    task = Still(model.train(), sample)
    (found,) = summarize_gates(task)
    assert model[0].training
    assert model[1].training
    assert int(model[0].num_batches_tracked) == 0
    (wanted,) = record_gates(model.eval(), [(sample, None)], 1)
    assert found["name"] == "2"
    assert found["mean"] == pytest.approx(wanted.mean.tolist())
    assert found["deviation"] == pytest.approx(wanted.deviation.tolist())


@pytest.mark.parametrize("task", [Still(Idle(), torch.zeros(2, 4, 3, 3)), Still(nn.Sequential(SE(4)), None)])
def test_gates_that_no_image_reaches_are_left_out(task):
    assert summarize_gates(task) == []
