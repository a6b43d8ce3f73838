"""Twenty training steps of a small ECA network, by the fast implementations and by the reference.

The losses are compared at every step, the gradients at two given states: the first, and the reference's after 20 steps.

Where ReLU's input is within rounding of zero, rounding decides whether a gradient passes. So two runs of the reference
itself (contiguous, channels-last, float64) diverge a little more with every step. Large batches and a small learning
rate limit that; with batches of 32 and a rate of 0.05 they diverge more than the test allows. Noise on the images keeps
the ReLUs of the empty background from switching all at once.

A gradient may be off by twice the largest error of the reference, over both layouts and over images that differ in
their last digit.
"""

import os
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

import ecanet
from ecanet.data.sources import DEBIAN_FASHION_MNIST, SMALL_SETS
from ecanet.ops import dispatch
from tensors import DEVICE, draw

pytestmark = pytest.mark.gpu

STEPS, RATE = 20, 0.01
LEAN, FUSED = "ecanet.ops.lean", "ecanet.ops.triton.launch"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = [
    pytest.param("auto", 28, 128, "contiguous", marks=pytest.mark.slow),
    pytest.param("auto", 28, 128, "channels_last", marks=pytest.mark.slow),
    pytest.param("fused", 7, 4, "contiguous", marks=pytest.mark.slow),  # in Triton's interpreter
    pytest.param("fused", 7, 4, "channels_last", marks=pytest.mark.slow),
]


@contextmanager
def force_impl(impl):
    """Give networks, which use "auto", the implementation ``impl``, and check that it ran."""
    if impl == "fused":
        pytest.importorskip("triton")
    choose, ran = dispatch.choose, []

    def choose_forced(requested, *args, **settings):
        assert requested == "auto"
        ran.append(choose(impl, *args, **settings))
        return ran[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose", choose_forced)
        yield
    expected = {"reference": None, "auto": LEAN if DEVICE == "cpu" else FUSED, "fused": FUSED}[impl]
    assert {getattr(passes, "__name__", None) for passes in ran} == {expected}


def batches(size, count):
    """Return batches of Fashion-MNIST's first images, or of scikit-learn's digits if its files are not installed."""
    small = SMALL_SETS["fashion-mnist" if (DEBIAN_FASHION_MNIST / "t10k-images-idx3-ubyte.gz").is_file() else "digits"]
    with torch.device("cpu"):
        images, labels = small.load(None, False)
    images, labels = images.to(DEVICE), labels.to(DEVICE)
    images = F.interpolate(small.spec.normalize(images[: STEPS * count]), (size, size), mode="area")
    at = torch.arange(STEPS * count) % len(images)  # there are too few digits, so they repeat
    noise = draw((len(at), 1, size, size), torch.Generator("cpu").manual_seed(0))
    return list(zip((images[at] + 0.1 * noise).split(count), labels[at].split(count), strict=True))


def network(layout, state=None, dtype=torch.float32):
    torch.manual_seed(0)
    model = ecanet.create_model("resnet8", attention="eca", num_classes=10, in_channels=1).to(dtype)
    if state is not None:
        model.load_state_dict(state)
    return model.to(memory_format=LAYOUTS[layout])


def loss_of(model, images, labels, layout):
    dtype = next(model.parameters()).dtype
    return F.cross_entropy(model(images.to(dtype, memory_format=LAYOUTS[layout])), labels)


def train(impl, data, layout):
    """Return the losses of 20 steps, and the state after them."""
    model, losses = network(layout), []
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    with force_impl(impl):
        for images, labels in data:
            loss = loss_of(model, images, labels, layout)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses), model.state_dict()


def results(impl, state, batch, layout, dtype=torch.float32):
    """Return loss, gradients and running statistics of one step from ``state``, converted to float64."""
    model = network(layout, state, dtype)
    with force_impl(impl):
        loss = loss_of(model, *batch, layout)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    found = {name: g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)}
    found |= {name: b for name, b in model.named_buffers() if "running" in name}
    return {name: x.double() for name, x in {"loss": loss.detach(), **found}.items()}


def distances(found, exact):
    """Return the error of each result relative to its norm."""
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in exact.items()}


@pytest.mark.parametrize(("impl", "size", "count", "layout"), CASES)
def test_twenty_steps_equal_those_of_the_reference(impl, size, count, layout):
    if impl == "auto" and DEVICE != "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        size, count = 7, 4  # "auto" means kernels, which the interpreter of a simulated GPU would run for hours
    data = batches(size, count)
    expected, last = train("reference", data, layout)
    actual, _ = train(impl, data, layout)
    assert expected[-5:].mean() < 0.98 * expected[:5].mean()  # the network learns
    assert ((actual - expected).abs() <= 1e-3 * expected).all()
    for state, batch in ((network(layout).state_dict(), data[0]), (last, data[-1])):
        exact = results("reference", state, batch, layout, torch.float64)
        own = []
        for other in LAYOUTS:
            for nudge in (-1, 0, 1):  # in the images' last digit
                images = batch[0] * (1 + 2 * nudge * torch.finfo(torch.float32).eps)
                own += distances(results("reference", state, (images, batch[1]), other), exact).values()
        for name, error in distances(results(impl, state, batch, layout), exact).items():
            assert error <= 2 * max(own), name
