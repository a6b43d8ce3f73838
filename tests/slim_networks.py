"""A network whose gates vary, and images on which `ecanet.slim` is tried."""

import torch

import ecanet
from ecanet.attention import ECA, SE


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_model(scales=(0.1, 1.0, 5.0), attention="eca", seed=0):
    """A resnet8 whose gates vary as much as ``scales`` say."""
    torch.manual_seed(seed)
    model = ecanet.create_model("resnet8", attention=attention, num_classes=5).eval()
    gates = [module for module in model.modules() if isinstance(module, ECA | SE)]
    for gate, scale in zip(gates, scales, strict=True):
        for parameter in gate.parameters():
            parameter.data = scale * draw(*parameter.shape, seed=seed).abs()
    return model


IMAGES = draw(60, 3, 8, 8) * torch.linspace(0.2, 3, 60)[:, None, None, None]
