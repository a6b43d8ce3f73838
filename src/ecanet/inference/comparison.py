"""Prove a plan: carry it out in a copy of the network in float64, and compare what that returns before and after."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ecanet.errors import AttachError, ConfigError, summarize
from ecanet.inference.chains import Finder, Plan
from ecanet.inference.changes import Editor
from ecanet.inference.copying import copy_model
from ecanet.models import small_example
from ecanet.surgery import Trace, iterate_tensors, record_run, run_again
from ecanet.testing import measure_relative_error


def plan_changes(model: nn.Module, example: object) -> Plan:
    """Return what can be changed in ``model``, proven on ``example``, in float64 or else in the model's own dtype.

    Raises:
        AttachError: the model does not run, or there is no example.
        ConfigError: nothing can be changed, or the outputs would change.
    """
    try:
        copied = copy_model(model).double()
        with small_example(copied) as small:
            trace = record_run(copied, adapt(small if example is None else example, copied))
            return prove(copied, trace, model)
    except (AttachError, TypeError):  # a forward that needs another dtype, or a device without float64
        copied = copy_model(model)
        with small_example(copied) as small:
            trace = record_run(copied, small if example is None else example)
            return prove(copied, trace, model)


def adapt(example: object, model: nn.Module) -> object:
    """Return ``example`` with its floating-point tensors in float64, on the device of ``model``."""
    if isinstance(example, Tensor):
        device = next((p.device for p in model.parameters()), example.device)
        return example.to(device, torch.float64) if example.is_floating_point() else example.to(device)
    if isinstance(example, Mapping):
        return {key: adapt(value, model) for key, value in cast("Mapping[object, object]", example).items()}
    if type(example) in (list, tuple):
        return type(example)(adapt(one, model) for one in cast("Sequence[object]", example))  # pyright: ignore
    return example


def prove(copied: nn.Module, trace: Trace, model: nn.Module) -> Plan:
    """Return the plan for ``model``, after it was carried out in its copy ``copied``, of which ``trace`` is a run.

    A detector may find nothing in a random image, so what the network's children return is compared as well.

    Raises:
        ConfigError: there is nothing to change, nothing to compare, or the outputs differ.
    """
    plan, name = Finder(copied, trace).plan(), type(model).__name__
    if not plan.chains and not plan.blocks:
        stays = "".join(f"; the gate {gate!r} stays: {reason}" for gate, reason in list(plan.kept.items())[:1])
        raise ConfigError(
            f"{name} has nothing to optimize: no convolution is followed by a norm that can be folded into it, a gate "
            f"that can be moved, or a ReLU{stays}"
        )
    expected = run_watched(copied, trace, plan.compared)
    Editor(copied).apply(plan)
    try:
        actual = run_watched(copied, trace, plan.compared)
    except Exception as failed:  # a forward may raise anything for a changed layer
        raise ConfigError(f"{name} cannot be optimized: its copy does not run ({summarize(failed)})") from failed
    difference = find_difference(actual, expected, lambda: run_nearby(copied, model, trace, plan))
    if difference is not None:
        raise ConfigError(f"{name} cannot be optimized: {difference}; pass another example=, or report the network")
    return plan


def run_watched(model: nn.Module, trace: Trace, children: Sequence[str]) -> list[Tensor]:
    """Return the tensors that ``children`` of ``model`` and it itself return for the example of ``trace``."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        found.extend(tensor.detach().clone() for tensor in iterate_tensors(output))

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in children]
    try:
        output = run_again(model, trace)
    finally:
        for handle in handles:
            handle.remove()
    return [*found, *iterate_tensors(output)]


def run_nearby(copied: nn.Module, model: nn.Module, trace: Trace, plan: Plan) -> list[Tensor]:
    """Return what the unchanged network returns if its parameters are moved by a few roundings."""
    nearby = copy_model(model)
    like = next((p.dtype for p in copied.parameters() if p.is_floating_point()), torch.float64)
    nearby = nearby.double() if like == torch.float64 else nearby
    generator = torch.Generator().manual_seed(0)
    for parameter in nearby.parameters():
        if parameter.is_floating_point():
            noise = torch.rand(parameter.shape, generator=generator, device="cpu").to(parameter) - 0.5
            parameter.data = parameter.data * (1 + 4 * torch.finfo(parameter.dtype).eps * noise)
    with small_example(nearby):
        return run_watched(nearby, trace, plan.compared)


def find_difference(
    actual: Sequence[Tensor], expected: Sequence[Tensor], run_nearby: Callable[[], Sequence[Tensor]]
) -> str | None:
    """Return how ``actual`` differs from ``expected`` by more than rounding explains, None if it does not.

    A tensor agrees if half of its digits do: a network amplifies roundings, a mistake is larger. Where it does not, but
    parameters moved by a few roundings (``run_nearby``) change it as well, it proves nothing: equal scores, in a
    detector, are sorted by their roundings. One tensor at least must agree.
    """
    if len(actual) != len(expected):
        return f"its copy returns {len(actual)} tensors, and not {len(expected)}"
    wrong = [i for i, pair in enumerate(zip(actual, expected, strict=True)) if not agree(*pair)]
    if wrong:
        nearby = run_nearby()
        unstable = [i for i in wrong if len(nearby) != len(expected) or not agree(nearby[i], expected[i])]
        for i in wrong:
            if i not in unstable:
                error = measure_relative_error(actual[i : i + 1], expected[i : i + 1])
                return f"a result of its copy, of shape {tuple(expected[i].shape)}, is off by {error:.1e} of its size"
    if not any(tensor.numel() for i, tensor in enumerate(expected) if i not in wrong and tensor.is_floating_point()):
        return "it returns no numbers for the example that could be compared"
    return None


def agree(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are the same in half of their digits; integers are the same in all."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    return measure_relative_error([actual], [expected]) <= torch.finfo(expected.dtype).eps ** 0.5
