"""The inference copy says what the network says, and says it faster."""

import copy

import pytest
import timm
import torch
import torchvision

import ecanet
from ecanet.errors import ConfigError
from ecanet.optimize import InferenceBlock, optimize


def calibrated(model, size=96, seed=0):
    """``model`` with random norms, whose running statistics fit what flows through it."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.8, 1.2, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
            module.momentum = None
            module.reset_running_stats()
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(16, 3, size, size, generator=generator))
    return model.eval()


def timm_resnet(attention, block="Bottleneck"):
    from timm.models import resnet

    return resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], block_args={"attn_layer": attention})


NETWORKS = {
    "ours eca": lambda: ecanet.create_model("resnet50", attention="eca"),
    "ours se, basic": lambda: ecanet.create_model("resnet18", attention="se"),
    "ours plain": lambda: ecanet.create_model("resnet18", attention="none"),
    "torchvision": torchvision.models.resnet18,
    "torchvision, attached": lambda: ecanet.attach(torchvision.models.resnet50(), "eca", preserve=False),
    "timm eca": lambda: timm_resnet("eca"),
    "timm se": lambda: timm_resnet("se"),
    "timm d, eca": lambda: timm.create_model("ecaresnet26t"),
    "timm basic": lambda: timm_resnet(None, "BasicBlock"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay(name):
    torch.manual_seed(0)
    model = calibrated(NETWORKS[name]())
    before = copy.deepcopy(model.state_dict())
    optimized = optimize(model)
    x = torch.randn(32, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = model(x), optimized(x)
        oracle = copy.deepcopy(model).double()(x.double())
    # a deep network with random weights amplifies rounding: the copy may err twice as much as the network itself does
    assert (actual - oracle).norm() <= 2 * (expected - oracle).norm()
    assert (actual - expected).norm() / expected.norm() < 2e-5
    assert torch.equal(actual.argmax(1), expected.argmax(1))
    assert any(isinstance(m, InferenceBlock) for m in optimized.modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for b in optimized.modules()
                   if isinstance(b, InferenceBlock) for m in b.modules())  # fmt: skip
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="Sequential has no residual block"):
        optimize(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)))


def test_the_gate_is_read_from_the_narrow_tensor():
    """It does not wait for the expansion: half the last convolution's output cannot change it."""
    from ecanet.optimize import squeezed

    convolution = torch.nn.Conv2d(8, 32, 1).double()
    h = torch.randn(3, 8, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(squeezed(convolution, h), convolution(h).mean((2, 3)), rtol=1e-13, atol=1e-14)
