"""Time inference in several forms: autocast, bfloat16 weights, and both network and input in a CUDA graph."""

import copy
from collections.abc import Callable

import torch
import variants
from setting import Setting
from timing import Step, capture, interleave, measure_enqueueing
from torch import Tensor, nn
from training_steps import summarize_steps
from variants import ECA, LEAN, PLAIN

import ecanet
from ecanet import ops


def time_forms(setting: Setting) -> dict[str, object]:
    """Time each form of inference for all networks, and for the copies that `ecanet.optimize` makes of ours.

    ``choices`` says for each kind of convolution whether it took bias and ReLU into its kernel, or why not.
    """
    found = {name: network.eval() for name, network in variants.build(setting).items() if name != LEAN}
    found |= {f"optimized {kind}": ecanet.optimize(found[name]) for kind, name in (("eca", ECA), ("plain", PLAIN))}
    half = {name: copy.deepcopy(network).bfloat16() for name, network in found.items()}
    images = setting.random_images(setting.batch)
    forms: dict[str, dict[str, Step]] = {
        "autocast": {name: make_step(network, images, variants.autocast(setting)) for name, network in found.items()},
        "bfloat16": {name: make_step(network, images.bfloat16()) for name, network in half.items()},
    }
    figures: dict[str, object] = {
        form: summarize_steps(interleave(steps, setting), setting.batch, setting) for form, steps in forms.items()
    }
    figures["bfloat16, CUDA graph"] = time_graphs(forms["bfloat16"], setting)
    enqueueing = {name: measure_enqueueing(step, setting) for name, step in forms["bfloat16"].items()}
    return figures | {"bfloat16, enqueue_ms": enqueueing, "choices": ops.list_choices()}


def make_step(network: nn.Module, images: Tensor, context: torch.autocast | None = None) -> Callable[[], Tensor]:
    """Return a function that runs ``network`` on ``images`` without gradients, under ``context`` where it is given."""

    def step() -> Tensor:
        if context is None:
            with torch.inference_mode():
                return network(images)
        with torch.inference_mode(), context:
            return network(images)

    return step


def time_graphs(steps: dict[str, Step], setting: Setting) -> dict[str, object]:
    """Time the steps as CUDA graphs; a network that cannot be captured is named with the reason."""
    replays: dict[str, Step] = {}
    failures: dict[str, str] = {}
    for name, step in steps.items():
        try:
            replays[name] = capture(step, setting)
        except RuntimeError as error:
            failures[name] = str(error).splitlines()[0]
    return summarize_steps(interleave(replays, setting), setting.batch, setting) | {"not_captured": failures}
