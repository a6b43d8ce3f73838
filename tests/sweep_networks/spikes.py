"""Spiking networks, which run over time steps and keep a membrane potential between them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sweep_networks.inputs import Builder, Network
from tensors import noise


class Steps(nn.Module):
    """Run a network of spikingjelly for three steps from rest, and add its outputs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        from spikingjelly.activation_based import functional

        functional.reset_net(self.network)
        total = sum(self.network(x) for _ in range(3))
        functional.reset_net(self.network)
        assert isinstance(total, Tensor)
        return total


def build_spikingjelly(module: str, name: str, **options: Any) -> Network:
    """Return spikingjelly's network ``name`` with integrate-and-fire neurons."""
    from importlib import import_module

    from spikingjelly.activation_based import neuron, surrogate

    make = getattr(import_module(f"spikingjelly.activation_based.model.{module}"), name)
    network = make(spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), detach_reset=True, **options)
    return Steps(network), (noise(2, 3, 64, 64),)


class Leaky(nn.Module):
    """snnTorch's tutorial network: convolutions and leaky neurons, whose potentials go from step to step by hand."""

    def __init__(self, residual: bool):
        super().__init__()
        import snntorch

        self.residual = residual
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.neurons = nn.ModuleList(snntorch.Leaky(beta=0.9) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (neuron.reset_mem() for neuron in self.neurons)  # pyright: ignore[reportCallIssue]
        outputs: list[Tensor] = []
        for _ in range(3):
            spikes, first = self.neurons[0](self.conv1(x), first)
            current = self.conv2(spikes)
            spikes, second = self.neurons[1](spikes + current if self.residual else current, second)
            outputs.append(self.head(spikes.mean((2, 3))))
        return torch.stack(outputs)


def build_leaky(residual: bool) -> Network:
    """Return snnTorch's network, and two images."""
    return Leaky(residual), (noise(2, 3, 16, 16),)


SPIKINGJELLY: dict[str, Builder] = {
    "spiking-resnet18": partial(build_spikingjelly, "spiking_resnet", "spiking_resnet18"),
    "sew-resnet18": partial(build_spikingjelly, "sew_resnet", "sew_resnet18", cnf="ADD"),
    "spiking-vgg11": partial(build_spikingjelly, "spiking_vgg", "spiking_vgg11_bn"),
}

SNNTORCH: dict[str, Builder] = {
    "leaky": partial(build_leaky, residual=False),
    "leaky-residual": partial(build_leaky, residual=True),
}
