"""The networks that the benchmark puts side by side, and the steps that are timed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ecanet import models
from ecanet.errors import ConfigError
from ecanet.inference import optimize

PAIRS = (
    ("ecanet eca", "ecanet plain"),
    ("ecanet eca", "timm eca"),
    ("ecanet eca", "timm se"),
    ("ecanet eca", "torchvision plain"),
    ("timm eca", "torchvision plain"),
    ("optimized eca", "optimized plain"),
    ("optimized eca", "ecanet eca"),
    ("optimized eca", "timm eca"),
)
"""What is divided by what, where both were timed: below 1 the first is faster."""


def build(name: str, device: str) -> dict[str, nn.Module]:
    """The ResNet called ``name``, 1000 classes: this library's, timm's and torchvision's, all channels-last.

    Raises:
        ConfigError: timm is not installed.
    """
    try:
        import timm
    except ImportError:
        raise ConfigError("the benchmark compares with timm, which is not installed: pip install timm") from None
    import torchvision

    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {
        "ecanet plain": models.create_model(name, attention="none"),
        "ecanet eca": models.create_model(name, attention="eca", kernel_sizes="adaptive"),  # timm's kernel sizes
        "timm eca": timm.create_model(name, block_args={"attn_layer": "eca"}),
        "timm se": timm.create_model(name, block_args={"attn_layer": "se"}),
        "torchvision plain": torchvision.models.get_model(name),
    }
    return {name: placed(network, device) for name, network in networks.items()}


def placed(network: nn.Module, device: str) -> nn.Module:
    """``network`` on ``device``, channels-last."""
    return network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def optimized(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """This library's networks as `optimize` makes them for inference."""
    return {f"optimized {kind}": optimize(networks[f"ecanet {kind}"]) for kind in ("plain", "eca")}


def compiled(networks: dict[str, nn.Module]) -> dict[str, Any]:
    """The same networks (their weights are shared), compiled at their first call."""
    return {f"{name} compiled": torch.compile(network, dynamic=False) for name, network in networks.items()}


def set_mode(networks: dict[str, nn.Module], training: bool) -> None:
    """Training or evaluation, for all."""
    for network in networks.values():
        network.train(training)


def random_images(count: int, side: int, device: str) -> Tensor:
    """(count, 3, side, side), channels-last."""
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    return images.to(device).contiguous(memory_format=torch.channels_last)


def train_step(network: Any, images: Tensor) -> Callable[[], Tensor]:
    """Forward, loss and backward (no optimizer: it is the same for all); the step gives the logits."""
    labels = torch.arange(len(images), device=images.device)

    def step() -> Tensor:
        forget(network)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            logits = network(images)
            loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        return logits.detach()

    return step


def eval_step(network: Any, images: Tensor) -> Callable[[], Tensor]:
    """Forward without gradients; the step gives the logits."""

    def step() -> Tensor:
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            return network(images)

    return step


def forget(network: Any) -> None:
    """Free the gradients of ``network``."""
    for parameter in network.parameters():
        parameter.grad = None


def stages(network: nn.Module, image_size: int) -> list[tuple[int, int, int]]:
    """(channels, height, width) that leave the four stages of a ResNet."""
    last = network.fc.in_features  # pyright: ignore[reportAttributeAccessIssue]
    sides = [-(-image_size // 2**stage) for stage in (2, 3, 4, 5)]
    return [(last // 2 ** (3 - stage), side, side) for stage, side in enumerate(sides)]
