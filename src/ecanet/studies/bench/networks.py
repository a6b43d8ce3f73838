"""The networks that the benchmark compares, and the steps that it times."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ecanet.inference import optimize
from ecanet.models import is_detector
from ecanet.networks import find

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
"""Pairs whose times are divided, if both were timed. Below 1 the first network is faster."""


def build(name: str, device: str) -> dict[str, nn.Module]:
    """Return the ResNet called ``name`` of this library, timm and torchvision, with 1000 classes, in channels-last.

    Raises:
        ConfigError: timm or torchvision is not installed or does not have the network.
    """
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    timm_se = find(f"timm:se{name}")  # first, because it raises if timm is not installed
    networks = {
        "ecanet plain": find(name, attention="none"),
        "ecanet eca": find(name, attention="eca", kernel_sizes="adaptive"),  # timm's kernel sizes
        "timm eca": _build_timm_eca(name),
        "timm se": timm_se,
        "torchvision plain": find(f"torchvision:{name}"),
    }
    return {variant: move_to_device(network, device) for variant, network in networks.items()}


def _build_timm_eca(name: str) -> nn.Module:
    """Return timm's ResNet with ECA. It has no name of its own: "ecaresnet50d" and the like have another stem, too."""
    import timm

    return timm.create_model(name, block_args={"attn_layer": "eca"})


def move_to_device(network: nn.Module, device: str) -> nn.Module:
    """Move ``network`` to ``device`` in channels-last layout and return it."""
    moved = network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue,reportUnknownVariableType]
    return cast(nn.Module, moved)


def optimize_ours(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the copies for inference that `ecanet.optimize` makes of this library's networks."""
    return {f"optimized {kind}": optimize(networks[f"ecanet {kind}"]) for kind in ("plain", "eca")}


def compile_networks(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the networks wrapped by `torch.compile`. They share the weights, and compile at their first call."""
    return {
        f"{name} compiled": cast(nn.Module, torch.compile(network, dynamic=False)) for name, network in networks.items()
    }


def set_mode(networks: Iterable[nn.Module], training: bool) -> None:
    """Put all ``networks`` in training or evaluation mode."""
    for network in networks:
        network.train(training)


def make_images(count: int, side: int, device: str, channels: int = 3) -> Tensor:
    """Return random images (count, channels, side, side) in channels-last layout."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, channels, side, side, generator=generator, device="cpu")
    return images.to(device).contiguous(memory_format=torch.channels_last)


def make_train_step(network: nn.Module, images: Tensor) -> Callable[[], list[Tensor]]:
    """Return a function that runs forward, loss and backward, and returns the outputs.

    There is no optimizer step: it would be the same for all networks. A detector learns one box in each image.
    """
    labels = torch.arange(len(images), device=images.device)
    targets = [make_targets(images)] if is_detector(network) else []
    inputs = [make_inputs(network, images), *targets]

    def step() -> list[Tensor]:
        clear_gradients(network)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            outputs = list_outputs(network(*inputs))
            loss = compute_loss(outputs, labels)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return [output.detach() for output in outputs]

    return step


def compute_loss(outputs: list[Tensor], labels: Tensor) -> Tensor:
    """Return the cross entropy of logits (N, classes), else the sum of the means of all ``outputs``."""
    if len(outputs) == 1 and outputs[0].dim() == 2:
        return nn.functional.cross_entropy(outputs[0], labels % outputs[0].shape[1])
    return torch.stack([output.float().mean() for output in outputs]).sum()


def make_inputs(network: nn.Module, images: Tensor) -> Tensor | list[Tensor]:
    """Return ``images`` (N, C, H, W) as ``network`` takes them: a detector wants a list."""
    return list(images) if is_detector(network) else images


def make_targets(images: Tensor) -> list[dict[str, Tensor]]:
    """Return a detector's target for each image: one object of class 1 in its middle, with its mask."""
    side, device = images.shape[-1], images.device
    low, high = side // 4, 3 * side // 4
    mask = torch.zeros(1, side, side, dtype=torch.uint8, device=device)
    mask[:, low:high, low:high] = 1
    target = {
        "boxes": torch.tensor([[low, low, high, high]], dtype=images.dtype, device=device),
        "labels": torch.ones(1, dtype=torch.int64, device=device),
        "masks": mask,
    }
    return [dict(target) for _ in images]


def make_eval_step(network: nn.Module, images: Tensor) -> Callable[[], list[Tensor]]:
    """Return a function that runs forward without gradients, and returns the outputs."""
    inputs = make_inputs(network, images)

    def step() -> list[Tensor]:
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            return list_outputs(network(inputs))

    return step


def list_outputs(output: object) -> list[Tensor]:
    """Return the tensors of floating-point numbers in what a network returns: logits, maps, losses, or boxes."""
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def clear_gradients(network: nn.Module) -> None:
    """Free the gradients of ``network``."""
    for parameter in network.parameters():
        parameter.grad = None


def list_stage_shapes(network: nn.Module, image_size: int) -> list[tuple[int, int, int]]:
    """Return the output shapes (channels, height, width) of the four stages of a ResNet."""
    channels = cast(nn.Linear, network.fc).in_features
    sides = [-(-image_size // 2**stage) for stage in (2, 3, 4, 5)]
    return [(channels // 2 ** (3 - stage), side, side) for stage, side in enumerate(sides)]
