"""`quantize`: write a network in int8 for another runtime, by that runtime's own tool, and say what it costs."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ecanet import progress
from ecanet.deploy import quantize_executorch, quantize_onnx, quantize_openvino
from ecanet.deploy.about import About
from ecanet.deploy.exporting import check_example, check_place, write_beside
from ecanet.deploy.preparation import copy_unwrapped, prepare
from ecanet.deploy.programs import CHANGES, repeats, run_network
from ecanet.deploy.targets import find_target
from ecanet.errors import ConfigError, ExportError, show_value
from ecanet.networks import Preprocessing

__all__ = ["QUANTIZERS", "Int8Report", "quantize"]

SAMPLE, BATCH, WORST = 16, 32, 5
"""Images on which layers are compared; images of a batch; layers that the table names."""


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """The tool that quantises for one target, and the function that runs its files."""

    write: Callable[[nn.Module, Tensor, Tensor, About, Path], dict[str, float]]
    """Writes the network; returns the relative error of each layer's output."""
    open: Callable[[Path], Callable[[Tensor], Tensor]]
    packages: tuple[str, ...] = ()
    """Import names of the packages that quantising needs beside the target's own."""
    batch: int | None = None
    """The only number of images that the file takes at once; None for any."""


QUANTIZERS: dict[str, Quantizer] = {
    "onnx": Quantizer(write=quantize_onnx.write_int8, open=quantize_onnx.open_int8),
    "openvino": Quantizer(write=quantize_openvino.write_int8, open=quantize_openvino.open_int8, packages=("nncf",)),
    "executorch": Quantizer(
        write=quantize_executorch.write_int8, open=quantize_executorch.open_int8, packages=("torchao",), batch=1
    ),
}
"""The tools by the target's name."""


@dataclass(frozen=True, kw_only=True)
class Int8Report:
    """An int8 file beside the network in float32, on held-out images."""

    path: str
    target: str
    bytes: int
    gates: dict[str, int]
    """How many gates have which form."""
    calibration: int
    """Number of the images that gave the ranges."""
    images: int
    """Number of the held-out images."""
    before: float
    """Their top-1 in percent, in PyTorch in float32."""
    after: float
    """Their top-1 in percent, in int8 in the target's runtime."""
    agreement: float
    """Share in percent of the images to which both give the same class."""
    layers: dict[str, float]
    """Relative error (norm of the difference over the norm) of each layer's output, the largest first."""

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain values for JSON."""
        return asdict(self)

    def list_rows(self) -> list[tuple[str, str]]:
        """Return names and values for a table."""
        forms = ", ".join(f"{count} {form}" for form, count in self.gates.items()) or "none"
        change = self.after - self.before
        rows = [
            ("file", self.path),
            ("target", f"{self.target}, int8"),
            ("size", f"{self.bytes / 1e6:.2f} MB"),
            ("gates", forms),
            ("calibrated on", f"{self.calibration:,} images"),
            ("top-1", f"{self.before:.2f} % in float32, {self.after:.2f} % in int8 ({change:+.2f})"),
            ("of", f"{self.images:,} held-out images"),
            ("same class", f"{self.agreement:.2f} %"),
        ]
        worst = list(self.layers.items())[:WORST]
        return rows + [(f"error of {name}", f"{error:.1%}") for name, error in worst]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.list_rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.list_rows())


@torch.random.fork_rng(devices=[])  # pyright: ignore[reportUnknownMemberType]
def quantize(
    model: nn.Module,
    path: str | Path,
    *,
    target: str,
    calibration: Tensor,
    held_out: tuple[Tensor, Tensor],
    classes: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
) -> Int8Report:
    """Write the classifier ``model`` in int8 to ``path``, run it, and return what was compared.

    The copy is prepared as `export` does it: norms folded, gates in the target's form. A gate's sigmoid gets its whole
    range, from 0 to 1. ``model`` is not changed.

    Args:
        model: a classifier in float32.
        path: of the file; written completely or not at all.
        target: ``onnx``, ``openvino`` or ``executorch``.
        calibration: images (N, C, H, W), as the network takes them. A few hundred give the ranges of activations.
        held_out: other images, and their labels (N,).
        classes: names of the classes, for the file's metadata.
        preprocessing: size, mean, std and crop of the images, likewise.

    Raises:
        ConfigError: the target does not exist, cannot be quantised for or needs a package, or an argument does not fit.
        ExportError: the tool cannot quantise the network; nothing is left at ``path``.
    """
    quantizer, goal = _find_quantizer(target), find_target(target)
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"quantize takes a network (a torch.nn.Module), got {show_value(model)}")
    calibration, images, labels = _check_images(calibration, held_out)
    place, about = check_place(path, goal), About.of(classes, preprocessing)
    model = copy_unwrapped(model).cpu()
    check_example(model, [images[:2]], about)
    _check_scores(model, images[:2], labels)
    prepared = prepare(model, goal.form, early=goal.early)
    with write_beside(place) as file:
        with progress.show(f"calibrating on {len(calibration)} images"):
            layers = quantizer.write(prepared.network, calibration, images[:SAMPLE], about, file)
        if not layers:
            raise ExportError(f"{type(model).__name__} has no convolution or linear layer, so int8 changes nothing")
        written = list(file.parent.iterdir())
        run, size = quantizer.open(file), quantizer.batch or BATCH
        batches = [images[at : at + size] for at in range(0, len(images), size)]
        plain = [run_network(prepared.network, [part])[0] for part in progress.track(batches, "evaluating float32")]
        float_classes = torch.cat(plain).argmax(1)
        int8_classes = torch.cat([run(part) for part in progress.track(batches, "evaluating int8")]).argmax(1)
        return Int8Report(
            path=str(place),
            target=target,
            bytes=sum(part.stat().st_size for part in written),
            gates=prepared.gates,
            calibration=len(calibration),
            images=len(int8_classes),
            before=_count_share(float_classes == labels),
            after=_count_share(int8_classes == labels),
            agreement=_count_share(float_classes == int8_classes),
            layers=dict(sorted(layers.items(), key=lambda one: -one[1])),
        )


def _find_quantizer(target: str) -> Quantizer:
    if target not in QUANTIZERS:
        raise ConfigError(f"there is no int8 for {target}; choose {', '.join(QUANTIZERS)}")
    quantizer = QUANTIZERS[target]
    missing = [package for package in quantizer.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"int8 for {target} needs {', '.join(missing)}: pip install 'ecanet[{target}]'")
    return quantizer


def _check_images(calibration: object, held_out: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return the calibration images, the held-out ones and their labels, dense and on the CPU.

    Raises:
        ConfigError: they are not images of one shape, with a label for each held-out one, or not finite.
    """
    pair = cast("Sequence[object]", held_out) if isinstance(held_out, tuple | list) else ()
    if len(pair) != 2:
        raise ConfigError(f"held_out must be a pair of images and labels, got {show_value(cast(object, held_out))}")
    given = {"calibration": calibration, "held_out": pair[0], "the labels of held_out": pair[1]}
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise ConfigError(f"{name} must be a tensor with values, got {show_value(value)}")
    ranges, images, labels = (cast(Tensor, value).detach().cpu().contiguous() for value in given.values())
    for name, value in (("calibration", ranges), ("held_out", images)):
        if value.dim() != 4 or value.dtype != torch.float32 or not len(value):
            raise ConfigError(
                f"{name} must be images (N, C, H, W) in float32, got {value.dtype} of shape {tuple(value.shape)}"
            )
        if not value.isfinite().all():
            raise ConfigError(f"{name} has numbers that are NaN or infinite; look how the images were normalized")
    if labels.shape != images.shape[:1] or ranges.shape[1:] != images.shape[1:]:
        raise ConfigError(
            f"calibration and held_out must be images of one size, and have one label each, got "
            f"{tuple(ranges.shape)}, {tuple(images.shape)} and labels {tuple(labels.shape)}"
        )
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ConfigError(f"the labels of held_out must be integers, the numbers of the classes, got {labels.dtype}")
    if len(ranges) < 2 or ranges.min() == ranges.max():
        raise ConfigError("calibration needs at least two images that are not empty; a few hundred are usual")
    return ranges, images, labels


def _check_scores(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Check that ``model`` returns scores (N, K) of its classes, K more than all ``labels``.

    Raises:
        ConfigError: it does not, or returns others when it runs again.
    """
    name, scores = type(model).__name__, run_network(model, [images])[0]
    if scores.dim() != 2 or scores.shape[1] < 2 or not scores.is_floating_point():
        raise ConfigError(
            f"{name} returns {tuple(scores.shape)} in {scores.dtype}; int8 is compared by class, so it needs the "
            f"scores (N, K) of two classes or more"
        )
    if not scores.isfinite().all():
        raise ConfigError(f"{name} returns scores that are NaN or infinite; look for such numbers in its weights")
    if not repeats([scores], run_network(model, [images])[:1]):
        raise ConfigError(f"{name} {CHANGES}, so that nothing shows what int8 changes")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= scores.shape[1]:
        raise ConfigError(f"{name} has classes 0 to {scores.shape[1] - 1}, and the labels are {low} to {high}")


def _count_share(correct: Tensor) -> float:
    """Return the share of True in percent."""
    return 100 * float(correct.double().mean())
