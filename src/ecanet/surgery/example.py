"""Make an example for a model, and record one run on it that leaves no trace in the model."""

import copy
import random
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ecanet.errors import AttachError
from ecanet.surgery.recording import Recorder, Trace, iterate_tensors

SIZES = (64, 96, 128, 224, 256, 299, 384, 512, 32)
"""Image sizes to try, cheapest first: many networks take any size, some only their own."""

Arguments = tuple[tuple[object, ...], dict[str, object]]
"""Positional and keyword arguments of one call."""


def record_run(model: nn.Module, example: object = None) -> Trace:
    """Record the run of ``model`` on ``example``: a tensor, a tuple of arguments or a dictionary of keyword arguments.

    The run is in evaluation mode without gradients; training flags, buffers and random states are restored.
    ``example=None`` makes one from the first convolution, in the sizes of `SIZES`.

    Raises:
        AttachError: the model has no convolution to guess from, or fails on every example.
    """
    error: Exception | None = None
    for args, kwargs in iterate_examples(model, example):
        try:
            with preserve_state(model), torch.no_grad(), Recorder() as recorder:
                copied = copy.deepcopy((args, kwargs))  # a forward may change its input in place
                for tensor in iterate_tensors(copied):
                    recorder.follow(tensor)
                recorder.trace.output = model(*copied[0], **copied[1])
            recorder.trace.arguments = args, kwargs
            return recorder.trace
        except Exception as failed:  # a forward may raise anything for a size that it does not take
            error = failed
    assert error is not None
    given = "the example given" if example is not None else "a random image"
    raise AttachError(
        f"could not run {type(model).__name__} on {given} ({summarize(error)}); pass example=, a tensor, tuple or dict "
        f"of inputs that the model takes"
    ) from error


def run_again(model: nn.Module, trace: Trace) -> object:
    """Return the output of ``model`` on the example of ``trace``, in evaluation mode; the state of both is restored."""
    args, kwargs = copy.deepcopy(trace.arguments)
    with preserve_state(model), torch.no_grad():
        return model(*args, **kwargs)


def summarize(error: Exception) -> str:
    """Return the first line of ``error``."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def iterate_examples(model: nn.Module, example: object) -> Iterator[Arguments]:
    """Yield arguments to try, in order; ``example`` alone if it is given.

    Raises:
        AttachError: there is no example and no convolution to guess one from.
    """
    if isinstance(example, Mapping):
        yield (), dict(cast("Mapping[str, object]", example))
        return
    if example is not None:
        yield (cast("tuple[object, ...]", example) if isinstance(example, tuple) else (example,)), {}
        return
    first = next((m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if first is None:
        raise AttachError(f"{type(model).__name__} has no convolution to guess an input from; pass example=, an input")
    axes = len(first.kernel_size)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    for size in list_sizes(model, axes):
        shape = (2, find_image_channels(model, first), *(size,) * axes)
        image = torch.rand(shape, generator=generator, device="cpu").to(like.device, like.dtype)
        yield (image,), {}
        if axes == 2 and size == SIZES[0]:
            yield (list(image),), {}  # detectors take a list of images


def find_image_channels(model: nn.Module, first: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> int:
    """Return the image channels: the first convolution's, or timm's where a transform of the image precedes it."""
    shape = read_input_size(model, "pretrained_cfg")
    return shape[0] if shape and first.in_channels > 4 else first.in_channels


def list_sizes(model: nn.Module, axes: int) -> tuple[int, ...]:
    """Return the image sizes to try; the size in timm's or Hugging Face's configuration comes right after the first."""
    shape = read_input_size(model, "pretrained_cfg", "default_cfg")
    size: object = shape[-1] if shape else getattr(getattr(model, "config", None), "image_size", None)
    some = SIZES if axes < 3 else (32, 64, 96)
    return (some[0], size, *some[1:]) if isinstance(size, int) else some


def read_input_size(model: nn.Module, *attributes: str) -> tuple[int, ...]:
    """Return ``input_size`` of the first non-empty timm configuration among ``attributes``; () without one."""
    config: object = next(filter(None, (getattr(model, name, None) for name in attributes)), None)
    if not isinstance(config, Mapping):
        return ()
    return tuple(cast("Mapping[str, tuple[int, ...]]", config).get("input_size") or ())


@contextmanager
def preserve_state(model: nn.Module) -> Generator[None]:
    """Run the body in evaluation mode; restore training flags, buffers and random states afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    # NumPy is no dependency: a model that has not imported it cannot draw from it.
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        for module, _ in flags:
            module.training = False
        with torch.random.fork_rng(devices=list(devices)):  # pyright: ignore[reportUnknownMemberType]
            yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not are_equal(buffer, before):
                    buffer.copy_(before)
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def are_equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal: not-a-number equals itself, and the meta device has no values to differ."""
    if a.is_meta or a.shape != b.shape:
        return a.shape == b.shape
    return bool(torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
