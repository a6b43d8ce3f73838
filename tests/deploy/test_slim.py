"""`ecanet.slim`: gates that barely vary are folded within the budget, and the report says why for each."""

import copy
import json

import numpy as np
import pytest
import torch
from scipy.stats import beta
from torch import nn

import ecanet
from ecanet.attention import ECA, ESE, SE
from ecanet.deploy.slim_fit import Sums, find_constant_factor
from ecanet.deploy.slim_judge import Share, answer, compare, count_needed, find_upper_limit, mean_divergence
from ecanet.errors import AttachError, ConfigError
from slim_networks import IMAGES, draw, make_model


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr("ecanet.deploy.slim_tune.STEPS", 4)


# the parts


@pytest.mark.parametrize(("count", "n"), [(0, 299), (1, 20), (3, 1000), (17, 450), (250, 20000), (5, 5)])
def test_the_limit_is_clopper_and_pearsons(count, n):
    expected = 1.0 if count == n else beta.ppf(0.95, count + 1, n - count)
    assert find_upper_limit(count, n) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("budget", [0.001, 0.01, 0.2])
def test_the_least_number_of_images_proves_the_budget(budget):
    n = count_needed(budget)
    assert find_upper_limit(0, n) <= budget < find_upper_limit(0, n - 1)


def test_shares_of_pixels_count_as_the_next_whole_image():
    assert Share(changed=1.2, images=100).limit == Share(changed=2, images=100).limit == find_upper_limit(2, 100)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gate", [ECA(4, 3), SE(4, 2), ESE(4)])
def test_the_fit_is_the_least_squares_line_of_each_channel(gate, biased):
    torch.manual_seed(1)
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    x = draw(12, 4, 3, 5) + torch.arange(4.0)[:, None, None]
    with torch.no_grad():
        y = gate(x)
    sums = Sums()
    for start in (0, 5):  # batches of different sizes are one sample
        end = start + (5 if start == 0 else 7)
        sums.add(x[start:end], y[start:end])
    found = sums.solve(biased=biased)
    factor = (y / x)[:, :, 0, 0]
    assert found.spread == pytest.approx(float(factor.double().std(0, correction=0).mean()), rel=1e-4)
    for c in range(4):
        inputs = x[:, c].flatten().double().numpy()
        columns = np.stack([inputs, np.ones_like(inputs)] if biased else [inputs], 1)
        expected = np.linalg.lstsq(columns, y[:, c].flatten().double().numpy(), rcond=None)[0]
        assert float(found.scale[c]) == pytest.approx(expected[0], rel=1e-6)
        assert float(found.bias[c]) == pytest.approx(expected[1] if biased else 0, rel=1e-5, abs=1e-9)


def test_a_channel_of_zeros_or_of_one_number_has_a_constant_too():
    x = torch.stack([torch.zeros(6, 2, 2), torch.full((6, 2, 2), 3.0), draw(6, 2, 2)], 1)
    factor = torch.linspace(0.2, 0.8, 6)[:, None, None, None]
    sums = Sums()
    sums.add(x, factor * x)
    found = sums.solve(biased=True)
    assert found.scale.isfinite().all()
    assert found.bias.isfinite().all()
    assert float(3 * found.scale[1] + found.bias[1]) == pytest.approx(1.5)


def test_the_divergence_is_kullbacks_and_leiblers():
    p, q = draw(6, 5, 2, seed=1), draw(6, 5, 2, seed=2)
    model = {"p": p, "q": q}
    said = {name: answer(nn.Identity(), [x[:4], x[4:]], None) for name, x in model.items()}
    a, b = (torch.distributions.Categorical(logits=x.movedim(1, -1)) for x in (p, q))
    expected = torch.distributions.kl_divergence(a, b).mean()
    assert mean_divergence(said["p"], said["q"]) == pytest.approx(float(expected), rel=1e-5)
    changed = sum(int(p[n, :, i].argmax() != q[n, :, i].argmax()) for n in range(6) for i in range(2)) / 2
    assert compare(said["p"], said["q"]) == Share(changed=changed, images=6)


@pytest.mark.parametrize("scores", [draw(6, 5), draw(6, 5, 3, 3), draw(6, 1, 4)])
def test_probabilities_are_known_from_logits(scores):
    probabilities = scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(1)
    (a,), (b,) = (answer(nn.Identity(), [x], None) for x in (scores, probabilities))
    assert torch.equal(a.decisions, b.decisions)
    torch.testing.assert_close(a.log_probabilities, b.log_probabilities, rtol=1e-4, atol=1e-5)
    expected = scores[:, 0] > 0 if scores.shape[1] == 1 else scores.argmax(1)
    assert torch.equal(a.decisions, expected.long())


# the whole


@pytest.mark.parametrize("attention", ["eca", "se"])
@pytest.mark.parametrize("budget", [0.11, 0.3])
def test_the_report_is_true(attention, budget):
    model = make_model(attention=attention)
    state = copy.deepcopy(model.state_dict())
    result, report = ecanet.slim(model, IMAGES, budget=budget)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    judged = IMAGES[1::2]
    with torch.no_grad():
        changed = (result(judged).argmax(1) != model(judged).argmax(1)).double().mean()
    assert report.changed is not None
    assert report.changed.share == pytest.approx(float(changed))
    assert report.changed.limit <= budget
    assert report.error <= 1e-5
    left = {name for name, module in result.named_modules() if isinstance(module, ECA | SE)}
    assert left == {gate.name for gate in report.gates if not gate.folded}
    divergences = [gate.divergence for gate in report.gates]
    assert divergences == sorted(divergences)
    kept = [gate.folded for gate in report.gates]
    assert kept == sorted(kept, reverse=True)
    for gate in report.gates:  # the first that is kept was tried, those after it were not
        assert (gate.together is None) == ("before it exceeds the budget" in gate.reason)
        if gate.together is not None:
            assert (gate.together.limit <= budget) == gate.folded
    assert json.loads(json.dumps(report.to_dict()))["folded"] == len(report.folded)
    assert all(gate.name in str(report) for gate in report.gates)


def test_a_larger_budget_folds_more_and_the_flattest_first():
    model = make_model()
    counts = [len(ecanet.slim(model, IMAGES, budget=budget)[1].folded) for budget in (0.1, 0.2, 0.9)]
    assert counts[0] < counts[-1] == 3
    assert counts == sorted(counts)
    report = ecanet.slim(model, IMAGES, budget=0.9)[1]
    assert report.gates[0].name == "layer1.0.eca"
    assert set(report.shifted) == {"translation", "brightness", "contrast", "noise", "blur"}


def test_images_one_by_one_are_joined():
    together, alone = (ecanet.slim(make_model(), x, budget=0.3)[1] for x in (IMAGES, list(IMAGES.split(1))))
    assert together.to_dict() == alone.to_dict()


class Constantly(nn.Module):
    """Its gate sees the same means on images that have these means, whatever else they show."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.gate = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), ECA(6, 3)
        self.head = nn.Linear(6, 4, bias=False)
        self.gate.conv.weight.data = torch.tensor([[[3.0, -3.0, 3.0]]])

    def forward(self, x):
        return self.head(self.gate(self.norm(self.conv(x))).relu().mean((2, 3)))


def test_a_gate_that_is_constant_on_the_images_alone_is_kept_if_others_are_given():
    model = Constantly().eval()
    images, noise = draw(60, 3, 4, 4), draw(40, 3, 4, 4, seed=1) + 3 * draw(40, 3, 1, 1, seed=2)
    images -= images.mean((2, 3), keepdim=True)
    slimmed, report = ecanet.slim(model, images, budget=0.1)
    assert [gate.folded for gate in report.gates] == [True]
    assert report.gates[0].spread < 1e-6
    torch.testing.assert_close(slimmed(images), model(images), rtol=1e-5, atol=1e-5)
    _, report = ecanet.slim(model, images, budget=0.1, also={"noise": noise})
    assert [gate.folded for gate in report.gates] == [False]
    assert "of decisions change on noise" in report.gates[0].reason
    assert report.also["noise"].share == 0  # with nothing folded nothing changes
    _, report = ecanet.slim(model, images, budget=0.1, also={"same": images.flip(3)})
    assert [gate.folded for gate in report.gates] == [True]
    assert report.also["same"].limit <= 0.1


@pytest.mark.parametrize("name", ["asr", "eca", "se"])
def test_constant_gates_go_without_a_budget(name):
    """ASR does not see the image; an attached gate is the identity until it is trained."""
    model = ecanet.create_model("resnet8", attention="asr" if name == "asr" else "none", num_classes=5).eval()
    plain = ecanet.create_model("resnet8", attention="none", num_classes=5).eval()
    if name == "asr":
        nn.init.normal_(model.layer3[0].asr.fc2.weight)
    else:
        ecanet.attach(model, name, example=IMAGES[:1])
    result, report = ecanet.slim(model, IMAGES[:2], budget=0.0001)
    assert len(report.folded) == 3
    assert report.changed is None
    plain.load_state_dict(result.state_dict())
    torch.testing.assert_close(plain(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    assert name == "asr" or torch.equal(plain(IMAGES), model(IMAGES))


def test_a_gate_that_reads_its_input_is_not_constant_by_construction():
    assert find_constant_factor(ECA(4)) is None
    assert find_constant_factor(SE(4)) is None
    gate = SE(4)
    gate.neutralize()
    assert torch.equal(find_constant_factor(gate), torch.ones(4).double())
    gate.fc2.weight.data[0, 0] = 1e-3
    assert find_constant_factor(gate) is None


class Pixels(nn.Module):
    """Says a number or a class for each pixel, in a dictionary if it is asked to."""

    def __init__(self, classes, named=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gate, self.named = nn.Conv2d(3, classes, 1), ECA(classes, 1), named
        self.gate.conv.weight.data.fill_(2.0)
        self.last = nn.Conv2d(classes, classes, 1)

    def forward(self, x):
        y = self.last(self.gate(self.conv(x)))
        return {"boxes": torch.zeros(2, dtype=torch.long), "scores": y} if self.named else y


@pytest.mark.parametrize("classes", [1, 4])
def test_each_pixel_is_a_decision(classes):
    model, images = Pixels(classes).eval(), IMAGES - 1
    slimmed, report = ecanet.slim(model, images, budget=0.5)
    with torch.no_grad():
        before, after = (net(images[1::2]) for net in (model, slimmed))
    pick = (lambda y: y[:, 0] > 0) if classes == 1 else (lambda y: y.argmax(1))
    assert report.changed.share == pytest.approx(float((pick(before) != pick(after)).double().mean()))
    assert 0 < report.changed.share < 0.5


def test_a_function_of_the_users_decides():
    model = Pixels(4, named=True).eval()
    with pytest.raises(ConfigError, match=r"slim reads class scores .* pass decide=, a function"):
        ecanet.slim(model, IMAGES, budget=0.2)
    seen = []

    def decide(output):
        seen.append(output)
        return output["scores"].mean((2, 3)).argmax(1)

    _, report = ecanet.slim(model, IMAGES, budget=0.9, decide=decide)
    assert len(report.folded) == 1
    assert isinstance(seen[0], dict)
    with pytest.raises(ConfigError, match=r"decide= must return integers or booleans \(30, \.\.\.\), got a tensor"):
        ecanet.slim(model, IMAGES, budget=0.9, decide=lambda output: output["scores"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget must be a share of decisions between 0 and 1, such as 0.01, got 0"),
        ({"budget": 1.5}, "budget must be a share"),
        ({"budget": "1%"}, "budget must be a share"),
        ({"images": IMAGES[:0]}, "images: there are no images"),
        ({"images": [(IMAGES, torch.zeros(60))]}, "images must be float tensors .*, without labels, got a tuple"),
        ({"images": None}, "images must be float tensors .*, without labels, got a NoneType"),
        ({"images": IMAGES.int()}, r"without labels, got a tensor of shape 60x.* in int32 on cpu"),
        ({"images": IMAGES.to("meta")}, r"without labels, got a tensor of shape 60x.* in float32 on meta"),
        ({"images": IMAGES / 0}, "images have NaN or infinity in them"),
        ({"images": IMAGES[:1].expand(60, -1, -1, -1)}, "images: all images are the same"),
        ({"also": {"night": torch.zeros(60, 3, 16, 16)}}, "night: all images are the same"),
        ({"images": IMAGES.double()}, r"does not run on images of 2x.* in float64: .*; give them as in training"),
        ({"images": IMAGES[:, :1]}, r"ResNet does not run on images of 2x1x.* in float32: "),
        ({"images": list(IMAGES)}, r"ResNet does not run on images of 2x"),
        ({"images": 3}, "images must be float tensors"),
        ({"budget": 0.05}, "a budget of 0.05 needs 118 images or more, every second one of which judges, got about 60"),
        ({"also": {"rain": IMAGES[:3]}, "budget": 0.2}, "also 'rain': a budget of 0.2 needs 14 images or more, got 3"),
        ({"fit_images": IMAGES}, "fit_images= must be other images than those that judge; without it, half of them"),
        ({"fit_images": IMAGES[:0]}, "fit_images: there are no images"),
        (
            {"fit_images": IMAGES[:9] + 1, "budget": 0.02},
            "images: a budget of 0.02 needs 149 images or more, got 60; give more images",
        ),
        ({"also": IMAGES}, "also= takes images by name"),
        ({"model": "resnet8"}, r"slim takes a network \(a torch.nn.Module\), got 'resnet8'"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    call = {"model": make_model(), "images": IMAGES, "budget": 0.2} | arguments
    with pytest.raises(ConfigError, match=message) as caught:
        ecanet.slim(call.pop("model"), call.pop("images"), **call)
    assert "\n" not in str(caught.value)


def test_a_network_that_changes_from_run_to_run_is_refused():
    model = make_model()
    model.register_forward_hook(lambda module, inputs, output: output + torch.rand_like(output))
    with pytest.raises(ConfigError, match="ResNet returns other numbers when it runs on the same images again"):
        ecanet.slim(model, IMAGES, budget=0.2)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_network_is_slimmed_as_it_was(wrap):
    """Nothing is compiled: that would take minutes."""
    found, report = ecanet.slim(wrap(make_model()), IMAGES, budget=0.9)
    expected, plain = ecanet.slim(make_model(), IMAGES, budget=0.9)
    assert type(found) is type(expected)
    assert report.folded == plain.folded
    assert torch.equal(found(IMAGES), expected(IMAGES))


def test_a_network_without_gates_is_refused():
    with pytest.raises(AttachError, match="ResNet has no channel gates; there is nothing to slim"):
        ecanet.slim(ecanet.create_model("resnet8", attention="none"), IMAGES)


def test_rounding_that_is_too_coarse_is_refused():
    with pytest.raises(AttachError, match=r"folding changes outputs of ResNet by .*; slim it in float32 or wider"):
        ecanet.slim(make_model().to(torch.bfloat16), IMAGES.to(torch.bfloat16), budget=0.9)


def test_images_to_fit_with_leave_all_others_to_judge():
    model, fitting = make_model(), IMAGES[::2]
    result, report = ecanet.slim(model, IMAGES, budget=0.11, fit_images=fitting)
    with torch.no_grad():
        changed = (result(IMAGES).argmax(1) != model(IMAGES).argmax(1)).double().mean()
    assert (report.fitted, report.changed.images) == (30, 60)
    assert report.changed.share == pytest.approx(float(changed))
    halved, _ = ecanet.slim(model, IMAGES, budget=0.99)  # every second image fits there
    whole, _ = ecanet.slim(model, IMAGES[1::2], budget=0.99, fit_images=list(fitting.split(7)))
    state = whole.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in halved.state_dict().items())


def test_many_images_fit_no_more_than_they_must(monkeypatch):
    monkeypatch.setattr("ecanet.deploy.slim_images.MOST_FITTED", 10)
    _, report = ecanet.slim(make_model(), [IMAGES[:7], IMAGES[7:]], budget=0.9)
    assert (report.fitted, report.changed.images) == (10, 50)
