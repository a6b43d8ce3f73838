"""Make class-activation maps (Grad-CAM) of one network with its gates, and with every gate switched off.

A gate that is off multiplies by one number, the factor by which it scales on average over the images. That is 1 for a
lossless gate that has not moved. A gate of the paper's form has about 1/2, and a network that was trained with such
gates is lost if they multiply by 1 instead.

The maps come from the package grad-cam (MIT licence; `pip install 'ecanet[cam]'`).
"""

import importlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ecanet.attention import Attention
from ecanet.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Map:
    """One class-activation map and the network's answer with it."""

    heat: Tensor
    """The map (H, W), in the size of the image, scaled from 0 to 1 by itself."""
    answer: int
    """The likeliest class."""
    probability: float
    """The probability of the class that the map explains."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The maps of one image for the same class: the class that the network with its gates finds likeliest."""

    title: str
    image: Tensor
    """The image as the network receives it (C, H, W)."""
    explained: int
    """The class that both maps explain."""
    gated: Map
    plain: Map
    """The map with the same weights and every gate switched off."""


def load_grad_cam() -> Any:
    """Return the module of the package grad-cam.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("pytorch_grad_cam")  # an optional package without type annotations
    except ImportError as error:
        raise ConfigError("--cam needs grad-cam: pip install 'ecanet[cam]'") from error


def prepare_maps(model: nn.Module, shape: tuple[int, ...]) -> str:
    """Return the layer for the maps of images of ``shape`` (C, H, W), so that a mistake is seen before the data.

    Raises:
        ConfigError: grad-cam is not installed, or the network has no such layer.
    """
    load_grad_cam()
    return find_layer(model, shape)


def find_layer(model: nn.Module, shape: tuple[int, ...]) -> str:
    """Return the name of the last module of ``model`` whose output is an activation with spatial extent.

    ``shape`` is that of a square image (C, H, W). Of the modules that ran once and returned one tensor (N, C, H, W)
    with H = W > 1, the one that ended last is taken: a stage rather than the last layer inside it. An activation with
    channels last is not square in its last two axes.

    >>> from ecanet import create_model
    >>> find_layer(create_model("resnet20").eval(), (3, 32, 32))
    'layer3'

    Raises:
        ConfigError: there is none.
    """
    ended: list[tuple[str, bool]] = []

    def make_hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(module: nn.Module, args: object, output: object) -> None:
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            ended.append((name, len(shape) == 4 and shape[2] == shape[3] > 1))

        return note

    modules = cast(Iterable[tuple[str, nn.Module]], model.named_modules())
    handles = [module.register_forward_hook(make_hook(name)) for name, module in modules if name]
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in ended]
    found = next((name for name, fits in reversed(ended) if fits and names.count(name) == 1), None)
    if found is None:
        raise ConfigError(
            f"--cam finds no activation (N, C, H, W) with H = W > 1 in {type(model).__name__} for images of "
            f"{shape[1]} pixels; leave --cam out"
        )
    return found


@torch.no_grad()
def measure_scales(model: nn.Module, images: Sequence[Tensor]) -> dict[nn.Module, float]:
    """Return, for each attention module, the number s for which ``s x`` is nearest to its outputs for ``images``.

    That is ``sum(x y) / sum(x x)`` over the inputs x and outputs y: the least squares.
    """
    sums: dict[nn.Module, tuple[float, float]] = {}

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = args[0].double(), output.double()
        products, squares = sums.get(module, (0.0, 0.0))
        sums[module] = products + float((x * y).sum()), squares + float(x.square().sum())

    with _hook_attention(model, add):
        for image in images:
            model(image[None])
    return {module: products / squares if squares else 1.0 for module, (products, squares) in sums.items()}


@contextmanager
def switch_gates_off(model: nn.Module, scales: Mapping[nn.Module, float]) -> Generator[None]:
    """Let each attention module of ``model`` in ``scales`` multiply its input by its number there, in this context."""

    def scale(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return args[0] * scales[module] if module in scales else None

    with _hook_attention(model, scale):
        yield


@contextmanager
def _hook_attention(model: nn.Module, hook: Callable[..., Tensor | None]) -> Generator[None]:
    handles = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, Attention)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare(model: nn.Module, layer: str, images: Sequence[tuple[str, Tensor]]) -> list[Pair]:
    """Return the maps of the titled images (C, H, W) at ``layer`` of ``model``, which is in evaluation mode.

    Raises:
        ConfigError: the package grad-cam is not installed.
    """
    # Tensors that were made in inference mode take no part in a backward pass.
    copied = [(title, image.detach().clone()) for title, image in images]
    scales = measure_scales(model, [image for _, image in copied])
    pairs: list[Pair] = []
    for title, image in copied:
        with torch.no_grad():
            explained = int(cast(Tensor, model(image[None]))[0].argmax())
        gated = explain(model, layer, image, explained)
        with switch_gates_off(model, scales):
            plain = explain(model, layer, image, explained)
        pairs.append(Pair(title=title, image=image, explained=explained, gated=gated, plain=plain))
    return pairs


def explain(model: nn.Module, layer: str, image: Tensor, label: int) -> Map:
    """Return the Grad-CAM map of the class ``label`` at the module ``layer`` for one image (C, H, W).

    Method: Selvaraju et al., ICCV 2017, arXiv 1610.02391.
    """
    grad_cam = load_grad_cam()
    targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
    cam = grad_cam.GradCAM(model=model, target_layers=[model.get_submodule(layer)])
    kept = [parameter.grad for parameter in model.parameters()]
    try:
        # With a gradient for the image there is one for the layer, also where all parameters are frozen.
        heat = cam(input_tensor=image[None].clone().requires_grad_(), targets=[targets.ClassifierOutputTarget(label)])
        logits = cast(Tensor, cam.outputs).detach()[0].float()
    finally:
        cam.activations_and_grads.release()
        for parameter, grad in zip(model.parameters(), kept, strict=True):
            parameter.grad = grad
    return Map(
        heat=torch.as_tensor(heat[0]),
        answer=int(logits.argmax()),
        probability=float(logits.softmax(0)[label]),
    )
