"""Make an example for a model, and record one run on it that leaves no trace in the model."""

import copy
import dis
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ecanet.errors import AttachError, summarize
from ecanet.surgery.graphs import run_by_nodes
from ecanet.surgery.recording import Recorder, Trace, iterate_tensors
from ecanet.surgery.state import preserve_state

SIZES = (64, 96, 128, 224, 256, 299, 384, 512, 32)
"""Image sizes to try, cheapest first: many networks take any size, some only their own."""

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Result = TypeVar("Result")

Arguments = tuple[tuple[object, ...], dict[str, object]]
"""Positional and keyword arguments of one call."""


def record_run(model: nn.Module, example: object = None) -> Trace:
    """Record the run of ``model`` on ``example``: a tensor, a tuple of arguments or a dictionary of keyword arguments.

    The run is in evaluation mode; the state of the model and random states are restored. ``example=None`` makes one
    from the first convolution, in the sizes of `SIZES`. Where the code asks for the training mode, a second run finds
    out which modules run in training too.

    Raises:
        AttachError: the model has no convolution to guess from, or fails on every example.
    """
    error: Exception | None = None
    for args, kwargs in iterate_examples(model, example):
        try:
            trace = run_without_gradients(partial(record_evaluation, model, args, kwargs))
        except AttachError:
            raise
        except Exception as failed:  # a forward may raise anything for a size that it does not take
            error = failed
            continue
        if depends_on_training(model):
            trace.trained = run_in_training(model, args, kwargs)
        return trace
    assert error is not None
    given = "the example given" if example is not None else "a random image"
    raise AttachError(
        f"could not run {type(model).__name__} on {given} ({summarize(error)}); pass example=, a tensor, tuple or dict "
        f"of inputs that the model takes"
    ) from error


def record_evaluation(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Trace:
    """Record one run of ``model`` in evaluation mode."""
    recorder = Recorder()
    trace = recorder.trace
    trace.arguments = args, kwargs
    copied, named = copy_arguments(args, kwargs)
    with run_by_nodes(model, recorder.note_node), preserve_state(model, recorder=recorder):
        for tensor in iterate_tensors((copied, named)):
            recorder.follow(tensor)
        recorder.keep_output(model(*copied, **named))
    return trace


def run_again(model: nn.Module, trace: Trace) -> object:
    """Return the output of ``model`` on the example of ``trace``, in evaluation mode; the state of both is restored."""

    def run() -> object:
        args, kwargs = copy_arguments(*trace.arguments)
        with preserve_state(model):
            return model(*args, **kwargs)

    return run_without_gradients(run)


def copy_arguments(args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
    """Return a copy of the arguments of one call, because a forward may change its input in place."""
    # PyTorch does not copy a tensor that another computation with gradients made.
    made = {id(t): copy.deepcopy(t.detach()) for t in iterate_tensors((args, kwargs)) if not t.is_leaf}
    return copy.deepcopy((args, kwargs), cast("dict[int, object]", made))


def run_without_gradients(run: Callable[[], Result]) -> Result:
    """Return ``run()``, without gradients, or with them if it fails for want of them.

    A hook of the user may need them: a class-activation extractor registers a hook on an output's gradient.
    """
    try:
        with torch.no_grad():
            return run()
    except AttachError:
        raise
    except Exception as failed:  # a forward may raise anything
        message = str(failed).lower()
        if message and "grad" not in message:
            raise
    with torch.inference_mode(False), torch.enable_grad():
        return run()


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


def run_in_training(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> set[nn.Module] | str:
    """Return the modules that run in training mode, or in a few words why that run fails.

    Training may need more than an example: detectors want boxes.
    """
    ran: set[nn.Module] = set()

    def note(module: nn.Module, args: object) -> None:
        ran.add(module)

    def run() -> None:
        copied, named = copy_arguments(args, kwargs)
        with preserve_state(model, training=True):
            model(*copied, **named)

    handle = register_module_forward_pre_hook(note)
    try:
        run_without_gradients(run)
    except Exception as failed:  # a forward may raise anything
        return summarize(failed)
    finally:
        handle.remove()
    return ran


def depends_on_training(model: nn.Module) -> bool:
    """Return whether a forward in ``model`` asks for the training mode where it could run other modules then.

    The compiled code of each forward is searched, and that of the functions and methods that it names in turn.
    PyTorch's own modules run the same layers in both modes. So do modules without children (stochastic depth) and
    kinds of batch norm, such as timm's with an activation; they are left out.
    """
    modules = [m for m in model.modules() if any(True for _ in m.children()) and not isinstance(m, BATCH_NORMS)]
    classes = {kind for module in modules for kind in type(module).__mro__ if not is_from_torch(kind.__module__)}
    members = [(name, member) for kind in classes for name, member in vars(kind).items()]
    methods: dict[str, list[FunctionType]] = {}
    for name, member in members:
        for function in find_functions(member):
            methods.setdefault(name, []).append(function)
    queue = [*methods.get("forward", []), *methods.get("__call__", [])]
    queue += [function for module in modules for member in vars(module).values() for function in find_functions(member)]
    seen: set[FunctionType] = set()
    while queue:
        function = queue.pop()
        if function in seen or is_from_torch(function.__module__):
            continue
        seen.add(function)
        if asks_for_training(function.__code__):
            return True
        for name in find_names(function.__code__):
            queue += [*methods.get(name, []), *find_functions(function.__globals__.get(name))]
    return False


def find_functions(member: object) -> list[FunctionType]:
    """Return the function behind a method, a property or a decorated function, in a list; an empty one for others."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, staticmethod | classmethod | MethodType):
        member = cast(MethodType, member).__func__
    function: object = inspect.unwrap(member) if isinstance(member, FunctionType) else None
    return [function] if isinstance(function, FunctionType) else []


def asks_for_training(code: CodeType) -> bool:
    """Return whether ``code``, or a function within it, looks up ``training`` for more than ``f(..., training=...)``.

    Where a function of the model's author gets that argument, its own code is searched.
    """
    if "training" in (*code.co_names, *code.co_varnames, *code.co_consts):
        steps = list(dis.get_instructions(code))
        for i, step in enumerate(steps):
            argument: object = step.argval  # one name, or the two names of a combined instruction
            names = cast("tuple[object, ...]", argument) if isinstance(argument, tuple) else (argument,)
            if "training" in names and step.opname.startswith("LOAD") and not is_argument(code, steps[i:]):
                return True
    return any(asks_for_training(constant) for constant in code.co_consts if isinstance(constant, CodeType))


def is_argument(code: CodeType, steps: list[dis.Instruction]) -> bool:
    """Return whether the value that the first of ``steps`` loads becomes the argument ``training=`` of a call."""
    for step in steps:
        if not step.opname.startswith(("LOAD", "PUSH", "KW_NAMES", "EXTENDED_ARG")):
            return False
        if step.opname in ("LOAD_CONST", "KW_NAMES") and step.arg is not None:
            constant = code.co_consts[step.arg]
            if isinstance(constant, tuple):
                return "training" in constant
    return False


def find_names(code: CodeType) -> set[str]:
    """Return the names that ``code`` looks up, and those that functions within it look up."""
    return {*code.co_names}.union(*(find_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def is_from_torch(module: str | None) -> bool:
    """Return whether a Python module of this name is a part of PyTorch."""
    return module is not None and f"{module}.".startswith("torch.")
