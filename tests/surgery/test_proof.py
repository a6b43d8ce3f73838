"""attach proves what it did: every gate acts as often as its place and nothing else changes, or all is undone."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import ecanet
from ecanet.errors import AttachError

IMAGES = torch.rand(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


class RunsItsChildren(nn.Module):
    """A residual block that runs whatever children it has, in a row."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = x
        for module in self.children():
            y = module(y)
        return x + y


class CallsMethods(nn.Module):
    """A residual block that its parent runs by a method of another name."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def compute(self, x):
        return x + self.conv2(self.conv1(x).relu())

    def forward(self, x):
        return self.compute(x)


class Parent(nn.Module):
    def __init__(self, method="forward", blocks=2):
        super().__init__()
        self.method = method
        self.blocks = nn.ModuleList(CallsMethods() for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = getattr(block, self.method)(x)
        return x


def gate_runs(model, x):
    """Return how often each gate runs in one forward."""
    runs = {site.name: 0 for site in ecanet.attached(model)}
    handles = []
    for name in runs:
        note = lambda *_, name=name: runs.update({name: runs[name] + 1})  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(note))
    model(x)
    for handle in handles:
        handle.remove()
    return list(runs.values())


def excite(model):
    for site in ecanet.attached(model):
        nn.init.normal_(model.get_submodule(site.name).conv.weight)


def test_a_block_that_runs_its_children_gets_the_gate_in_its_last_module():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), RunsItsChildren(), RunsItsChildren()).eval()
    before = model(IMAGES)
    ecanet.attach(model, example=IMAGES)
    assert [site.name for site in ecanet.attached(model)] == ["1.conv2.eca", "2.conv2.eca"]
    assert torch.equal(model(IMAGES), before)
    assert gate_runs(model, IMAGES) == [1, 1]
    excite(model)
    x = model[0](IMAGES)
    for block in model[1:]:
        y = nn.functional.conv2d(block.act(block.conv1(x)), block.conv2.weight, block.conv2.bias, padding=1)
        x = x + block.conv2.eca(y)
    assert torch.equal(model(IMAGES), x)
    with pytest.warns(UserWarning, match="detached 2 gates"):
        ecanet.detach(model)
    assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("method", ["forward", "compute"])
def test_a_block_run_by_another_method_keeps_one_act_per_gate(method):
    model = Parent(method).eval()
    before = model(IMAGES)
    ecanet.attach(model, example=IMAGES)
    assert torch.equal(model(IMAGES), before)
    assert gate_runs(model, IMAGES) == [1, 1]
    assert [site.calls for site in ecanet.attached(model)] == [1, 1]
    excite(model)
    assert not torch.equal(model(IMAGES), before)


def test_a_module_that_runs_twice_is_reported_so():
    block = CallsMethods()
    model = nn.Sequential(nn.Conv2d(8, 8, 1), block, block).eval()
    ecanet.attach(model, example=IMAGES)
    (site,) = ecanet.attached(model)
    assert site.calls == 2
    assert gate_runs(model, IMAGES) == [2]
    (unproven,) = ecanet.attached(ecanet.attach(ecanet.detach(model), example=IMAGES, verify=False))
    assert unproven.calls is None


class Moody(nn.Module):
    """A network that fails when its second block has a gate."""

    def __init__(self):
        super().__init__()
        self.a, self.b = CallsMethods(), CallsMethods()

    def forward(self, x):
        if hasattr(self.b.conv2, "eca") or hasattr(self.b, "eca"):
            raise RuntimeError("no gates on my second block")
        return self.b(self.a(x))


def test_a_place_that_cannot_be_proven_is_left_out_and_named():
    model = Moody().eval()
    before = model(IMAGES)
    ecanet.attach(model, example=IMAGES)
    report = ecanet.attached(model)
    assert [site.name for site in report] == ["a.eca"]
    assert torch.equal(model(IMAGES), before)
    assert [name for name, _ in report.left_out] == ["b.conv2"]
    assert "left out: b.conv2 (" in str(report)
    ecanet.detach(model)
    assert vars(model).keys() == vars(Moody()).keys()


def snapshot(model):
    """Return everything that a failed attach must leave as it was."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    kinds = [(name, type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()]
    return kinds, hooks, {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()


def assert_untouched(model, before):
    now = snapshot(model)
    assert now[:2] == before[:2]
    assert now[2].keys() == before[2].keys()
    assert all(torch.equal(v, before[2][k]) for k, v in now[2].items())
    assert torch.equal(now[3], before[3])


def test_a_gate_that_is_not_neutral_undoes_everything(monkeypatch):
    monkeypatch.setattr(ecanet.ECA, "neutralize", lambda self: setattr(self, "gain", 2.002))
    model = resnet18().train()
    before = snapshot(model)
    with pytest.raises(AttachError, match=r"outputs of ResNet would change.*undone"):
        ecanet.attach(model)
    assert_untouched(model, before)


def test_an_interrupted_proof_undoes_everything():
    class Interrupts(ecanet.ECA):
        runs = 0

        def forward(self, x, mask=None):
            Interrupts.runs += 1
            if Interrupts.runs > 3:  # the trial of each of two gates, and the first gate in the proof
                raise KeyboardInterrupt
            return super().forward(x, mask)

    model = Parent().eval()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        ecanet.attach(model, Interrupts, example=IMAGES)
    assert Interrupts.runs == 4
    assert_untouched(model, before)


def test_a_block_whose_forward_was_replaced_before_keeps_one_act_per_gate():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), CallsMethods(), CallsMethods()).eval()
    for block in model[1:]:
        block.forward = lambda x, block=block: x + 2 * block.conv2(block.conv1(x).relu())
    before = model(IMAGES)
    ecanet.attach(model, example=IMAGES)
    assert [site.name for site in ecanet.attached(model)] == ["1.conv2.eca", "2.conv2.eca"]
    assert torch.equal(model(IMAGES), before)
    assert gate_runs(model, IMAGES) == [1, 1]


def test_an_example_that_is_changed_in_place_is_used_as_it_was():
    class InPlace(Parent):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model, x = InPlace().eval(), IMAGES.clone()
    ecanet.attach(model, example=x)
    assert torch.equal(x, IMAGES)
    assert len(ecanet.attached(model)) == 2


def test_networks_that_are_never_the_same_are_still_counted():
    runs = itertools.count()  # no state that attach could restore

    class Random(Parent):
        def forward(self, x):
            return super().forward(x) + next(runs)

    model = Random().eval()
    ecanet.attach(model, example=IMAGES)
    assert gate_runs(model, IMAGES) == [1, 1]


def test_the_proof_costs_one_forward():
    model = resnet18().eval()
    runs = []
    model.conv1.register_forward_hook(lambda *_: runs.append(1))
    ecanet.attach(copy.deepcopy(model), verify=False)
    unproven = len(runs)
    ecanet.attach(model)
    assert len(runs) - unproven == unproven + 1
