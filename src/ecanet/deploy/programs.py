"""What the targets share: a network's inputs, its trace, and a file opened in its own runtime."""

import copy
import io
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ecanet.deploy.value_reads import reads_values, refuse_value_reads
from ecanet.errors import ConfigError, ExportError, show_value, summarize
from ecanet.models import is_detector

__all__ = [
    "Float64",
    "Session",
    "Varies",
    "choose_other_size",
    "flatten",
    "list_varying_axes",
    "measure_layers",
    "name_module",
    "quiet",
    "read_example",
    "run_network",
    "trace",
    "widen",
]


Varies = Literal["batch and size", "batch", "nothing"]
"""What may differ from the example's shape."""
FLATTEN, SQUEEZE = torch.ops.aten.flatten.using_ints, torch.ops.aten.squeeze.dims


@dataclass(frozen=True, kw_only=True)
class Session:
    """A file, opened in its own runtime."""

    run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    """Function from the inputs to all output tensors, in the order of `flatten`."""
    operations: dict[str, int]
    """How often each operation stands in what the runtime executes."""
    partitions: int = 1
    """Parts that the runtime hands to its fast backend as a whole."""
    stray: int = 0
    """Operations between these parts, which run outside of the backend."""
    takes: tuple[bool, bool] = (True, True)
    """Whether the file takes other batch sizes, and other image sizes, than the example's."""
    default: "tuple[str, Callable[[Sequence[Tensor]], tuple[Tensor, ...]]] | None" = None
    """Where the runtime is held to float32 and would not be by default: its default precision, and `run` with it."""


def read_example(model: nn.Module, example: object) -> list[Tensor]:
    """Return the inputs of ``model``: one batch (N, C, ...), or the images (C, H, W) of a detector.

    Raises:
        ConfigError: ``example`` is something else, or not float32.
    """
    expected = "images (3, H, W) in a list" if is_detector(model) else "a batch of images (N, C, H, W)"
    while isinstance(example, list | tuple) and len(cast(Sequence[object], example)) == 1:
        example = cast(Sequence[object], example)[0]
    found = list(cast(Sequence[object], example)) if isinstance(example, list | tuple) else [example]
    for x in found:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            what = f"a {x.dtype} tensor" if isinstance(x, Tensor) else show_value(x)
            raise ConfigError(f"example must be {expected} in float32, got {what}")
        if x.is_meta:
            raise ConfigError(f"example has no data (it is on the meta device); pass {expected}")
        if not x.numel():
            raise ConfigError(f"example is empty ({'x'.join(map(str, x.shape))}); pass at least one image")
    inputs = [cast(Tensor, x).detach().cpu().clone() for x in found]
    axes = 3 if is_detector(model) else None
    if not inputs or (not is_detector(model) and len(inputs) > 1) or any(axes not in (None, x.dim()) for x in inputs):
        raise ConfigError(f"example must be {expected}, got {[tuple(x.shape) for x in inputs]}")
    return inputs


def trace(network: nn.Module, example: Tensor, varies: Varies = "batch and size") -> torch.export.ExportedProgram:
    """Return the graph of ``network``, in which that of the batch and image sizes varies which may and can.

    Raises:
        ExportError: `torch.export` cannot record it.
    """
    if varies == "nothing":
        return record(network, example, ())
    if len(example) == 1:  # torch.export takes a size of 1 for a constant
        example = torch.cat([example, example])
    program = record(network, example, (0, *(range(2, example.dim()) if varies == "batch and size" else ())))
    if list_varying_axes(program)[1] and not takes_another_size(program, example):
        program = record(network, example, (0,))
    squeeze_pooled(program)
    return program


def record(network: nn.Module, example: Tensor, axes: Sequence[int]) -> torch.export.ExportedProgram:
    """Return the graph of ``network``, whose input may vary on ``axes`` as far as the network allows it.

    Raises:
        ExportError: `torch.export` cannot record it.
    """
    sizes = (dict.fromkeys(axes, torch.export.Dim.AUTO),) if axes else None
    reads = False
    try:
        reads = reads_values(network, [example])
        # The recorder prints the whole graph where it meets such a value.
        with quiet(), redirect_stderr(io.StringIO()) if reads else nullcontext():
            return torch.export.export(network, (example,), dynamic_shapes=sizes)
    except Exception as error:  # the recorder raises errors of many classes
        if reads:
            raise refuse_value_reads(network) from error
        raise ExportError(f"torch.export cannot record {type(network).__name__}: {summarize(error)}") from error


def takes_another_size(program: torch.export.ExportedProgram, example: Tensor) -> bool:
    """Return whether the graph holds for images of another size, and not for those on one side of a condition alone.

    PyTorch's own runtime checks such conditions. Other runtimes would compute something else.
    """
    try:
        with torch.no_grad(), quiet():
            program.module()(example.new_zeros(*example.shape[:2], *choose_other_size(example)))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def choose_other_size(example: Tensor) -> torch.Size:
    """Return a second image size, which differs from the example's on each axis by another number of pixels."""
    return torch.Size(side + 32 * (i + 1) for i, side in enumerate(example.shape[2:]))


def squeeze_pooled(program: torch.export.ExportedProgram) -> None:
    """Let a flattening of (N, C, 1, 1) remove two axes: written as a new shape it would compute the batch size."""
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target != FLATTEN or node.args[1:] != (1,):
            continue
        if node.args[0].meta["val"].shape[2:] == (1, 1):
            node.target, node.args = SQUEEZE, (node.args[0], [2, 3])
    program.graph_module.recompile()


def list_varying_axes(program: torch.export.ExportedProgram) -> tuple[bool, bool]:
    """Return whether the batch size, and whether the image size, varies in the graph."""
    (name,) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == name)
    varies = [not isinstance(size, int) for size in node.meta["val"].shape]
    return varies[0], len(varies) > 2 and all(varies[2:])


def run_network(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the output tensors of ``network`` for a batch or, of a detector, for a list of images."""
    network, inputs = network.eval(), [x.clone() for x in inputs]  # a forward may write into its input
    with torch.no_grad():
        return flatten(network(list(inputs)) if is_detector(network) else network(*inputs))


CHANGES = (
    "returns other numbers when it runs on the same images again (random numbers, dropout in evaluation, a counter)"
)
"""What is said of a network that does not repeat itself."""


def repeats(first: Sequence[Tensor], again: Sequence[Tensor]) -> bool:
    """Return whether the outputs of two runs are the same but for rounding."""
    return all(torch.allclose(a, b, equal_nan=True) for a, b in zip(first, again, strict=True))


def widen(network: nn.Module) -> nn.Module:
    """Return a copy of ``network`` in float64, with the tensors that its modules keep beside their buffers."""
    wide = copy.deepcopy(network).double()
    for module in wide.modules():
        kept = cast("dict[str, object]", vars(module))
        kept |= {name: x.double() for name, x in kept.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return wide


def widen_dtype(value: object) -> object:
    """Return float64 for float32, and any other value as it is."""
    return torch.float64 if value is torch.float32 else value


class Float64(TorchFunctionMode):
    """Let a forward that asks for float32 by its name, or makes tensors of the default dtype, compute in float64."""

    def __enter__(self) -> "Float64":
        """Make float64 the default dtype until the context ends."""
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Restore the default dtype."""
        torch.set_default_dtype(self.default)
        super().__exit__(*error)  # pyright: ignore[reportUnknownMemberType]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function ``func`` with float64 for each float32 among its arguments."""
        args, kwargs = cast(Any, tree_map)(widen_dtype, (args, kwargs or {}))
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


def flatten(outputs: object) -> tuple[Tensor, ...]:
    """Return the tensors in ``outputs``, which may be a tensor or a nest of lists and dictionaries."""
    found = [x.detach() for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    return tuple(torch.view_as_real(x) if x.is_complex() else x for x in found)


def name_module(node: fx.Node) -> str:
    """Return the name of the module that a recorded operation belongs to, or its own name if there is none."""
    stack = cast("dict[str, tuple[str, object]]", node.meta.get("nn_module_stack") or {})
    return next((name for name, _ in reversed(stack.values()) if name), node.name)


def measure_layers(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, float]:
    """Return the relative error of each layer, from its name, its output and its output in float, in any number."""
    sums: dict[str, tuple[float, float]] = {}
    for name, found, exact in pairs:
        difference, size = sums.get(name, (0.0, 0.0))
        difference += float((found - exact).square().sum())
        sums[name] = difference, size + float(exact.square().sum())
    return {name: (difference / (size or 1)) ** 0.5 for name, (difference, size) in sums.items()}


@contextmanager
def quiet() -> Generator[None]:
    """Hide the warnings of exporters and runtimes, which are about their own code and not about the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
