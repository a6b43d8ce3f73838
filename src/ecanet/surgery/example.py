"""Something to run a stranger's model on, and a run that leaves no trace in it."""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ecanet.errors import AttachError
from ecanet.surgery.watch import Trace, Watch, tensors_in

SIZES = (64, 96, 128, 224, 256, 299, 384, 512, 32)
"""Image sizes to try, cheapest first: many networks take any, some only theirs."""


def watch(model: nn.Module, example: Any = None) -> Trace:
    """What ``model`` does with ``example``: a tensor, a tuple of arguments or a dictionary of keyword arguments.

    Runs in evaluation mode without gradients; training flags, buffers and random states are as before afterwards.
    ``example=None`` makes one from the first convolution, in the sizes of `SIZES`.

    Raises:
        AttachError: the model has no convolution to guess from, or fails on every example.
    """
    error: Exception | None = None
    for args, kwargs in candidates(model, example):
        try:
            with untouched(model), torch.no_grad(), Watch() as record:
                for tensor in tensors_in((args, kwargs)):
                    record.follow(tensor)
                model(*args, **kwargs)
            return record.trace
        except Exception as failed:  # whatever a stranger's forward raises for a wrong size
            error = failed
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    given = "the example given" if example is not None else "a random image"
    raise AttachError(
        f"could not run {type(model).__name__} on {given} ({reason}); pass example=, a tensor, tuple or dict of inputs "
        f"that the model takes"
    ) from error


def candidates(model: nn.Module, example: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments to try, in order."""
    if example is not None:
        if isinstance(example, Mapping):
            yield (), dict(example)
        else:
            yield (tuple(example) if isinstance(example, tuple) else (example,)), {}
        return
    first = next((m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if first is None:
        raise AttachError(f"{type(model).__name__} has no convolution to guess an input from; pass example=, an input")
    axes = len(first.kernel_size)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    for size in sizes(model, axes):
        shape = (2, channels(model, first), *(size,) * axes)
        image = torch.rand(shape, generator=generator).to(like.device, like.dtype)
        yield (image,), {}
        if axes == 2 and size == SIZES[0]:
            yield (list(image),), {}  # detectors take a list of images


def channels(model: nn.Module, first: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> int:
    """Image channels: the first convolution's, or timm's where a transform of the image comes before it."""
    says = getattr(model, "pretrained_cfg", None) or {}
    shape = says.get("input_size") if isinstance(says, Mapping) else None
    return shape[0] if shape and first.in_channels > 4 else first.in_channels


def sizes(model: nn.Module, axes: int) -> tuple[int, ...]:
    """Image sizes to try: what timm's or Hugging Face's configuration says comes right after the smallest."""
    timm_says = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    says = timm_says.get("input_size", (None,))[-1] if isinstance(timm_says, Mapping) else None
    says = says or getattr(getattr(model, "config", None), "image_size", None)
    some = SIZES if axes < 3 else (32, 64, 96)
    return (some[0], says, *some[1:]) if isinstance(says, int) else some


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; training flags, buffers and random states as before afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        for module, _ in flags:
            module.training = False
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not same(buffer, before):
                    buffer.copy_(before)
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, not-a-number included."""
    return a.shape == b.shape and bool(torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
