"""The networks that are compared, and the steps that are timed."""

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from setting import Setting
from torch import Tensor, nn

import ecanet
from ecanet import ops
from ecanet.networks import find

PACKAGES = ("timm", "torchvision")
"""Libraries that are compared with where they are installed."""

ECA, PLAIN, LEAN = "ecanet eca", "ecanet plain", "ecanet eca lean"


def list_missing() -> list[str]:
    """Return one line for each library that is not installed."""
    return [f"{name} is not installed: its networks are left out" for name in PACKAGES if not is_installed(name)]


def is_installed(package: str) -> bool:
    """Return whether ``package`` can be imported."""
    if importlib.util.find_spec(package) is None:
        return False
    try:
        importlib.import_module(package)
    except Exception:  # torchvision made for another build of PyTorch raises a RuntimeError
        return False
    return True


@functools.cache
def build(setting: Setting) -> dict[str, nn.Module]:
    """Return the networks by variant, with random weights, on the device and in channels-last layout.

    The variant `LEAN` is the same network as `ECA`; it runs without Triton's kernels (see `choose_impl`).
    """
    torch.manual_seed(0)
    name = setting.network
    found = {ECA: ecanet.create_model(name), PLAIN: ecanet.create_model(name, attention="none")}
    if is_installed("timm"):
        import timm

        # timm has no name for a ResNet that differs from torchvision's by ECA alone
        found["timm eca"] = timm.create_model(name, block_args={"attn_layer": "eca"})
    if is_installed("torchvision"):
        found["torchvision plain"] = find(f"torchvision:{name}")
    found = {variant: place(network, setting) for variant, network in found.items()}
    return found | {LEAN: found[ECA]}


def place(network: nn.Module, setting: Setting) -> nn.Module:
    """Return ``network`` on the device in channels-last layout."""
    return network.to(setting.device, memory_format=torch.channels_last)


def choose_impl(variant: str) -> AbstractContextManager[None]:
    """Return the context in which ``variant`` runs: the lean passes for `LEAN`, and no choice for the others."""
    return ops.prefer_impl("lean") if variant == LEAN else nullcontext()


def name_impl(setting: Setting, dtype: torch.dtype) -> str:
    """Return the implementation that this library's networks choose for ``dtype`` on the device."""
    return "fused" if ops.uses_kernels(torch.empty(1, 1, 1, 1, device=setting.device, dtype=dtype)) else "lean"


def autocast(setting: Setting) -> torch.autocast:
    """Return bfloat16 autocast on the device."""
    return torch.autocast(setting.device, torch.bfloat16)


def make_training_step(
    network: Callable[[Tensor], Tensor], batch: int, setting: Setting, variant: str = ""
) -> Callable[[], Tensor]:
    """Return a function that runs forward, loss and backward under autocast and returns the loss.

    There is no optimizer step: it would be the same for all variants.
    """
    images, labels = setting.random_images(batch), setting.labels(batch)

    def step() -> Tensor:
        clear_gradients(network)
        with autocast(setting), choose_impl(variant):
            loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        return loss.detach()

    return step


def clear_gradients(network: Callable[[Tensor], Tensor]) -> None:
    """Free the gradients of ``network``."""
    assert isinstance(network, nn.Module)
    for parameter in network.parameters():
        parameter.grad = None
