"""`export`: write a network for another runtime, and check the file there."""

import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ecanet import progress
from ecanet.deploy.about import About
from ecanet.deploy.checking import Subject, check_file
from ecanet.deploy.preparation import copy_unwrapped, prepare
from ecanet.deploy.programs import read_example, run_network
from ecanet.deploy.reports import ExportReport
from ecanet.deploy.targets import Target, find_target
from ecanet.errors import ConfigError, ExportError, is_path, show_value, summarize
from ecanet.models import is_detector
from ecanet.networks import Preprocessing

__all__ = ["check_example", "check_place", "export", "write_beside"]


@torch.random.fork_rng(devices=[])  # pyright: ignore[reportUnknownMemberType]
def export(
    model: nn.Module,
    path: str | Path,
    *,
    target: str,
    example: object,
    check: bool = True,
    classes: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
) -> ExportReport:
    """Write ``model`` to ``path`` for another runtime, run it there, and return what was compared.

    The file holds a copy for inference: norms are folded, and every gate has the form that the target runs fast.
    Batch and image size vary where the target and the network allow it. ``model`` is not changed.

    Args:
        model: Any classifier, or one of torchvision's detectors (``onnx`` only), in float32, with or without attention.
        path: Of the file. It is written completely or not at all.
        target: ``onnx``, ``onnxruntime``, ``openvino``, ``executorch``, ``torch-export`` or ``torchscript``.
        example: A batch of images (N, C, H, W), or a list with one image (3, H, W) for a detector.
        check: Whether to run the file in its own runtime, beside PyTorch and beside the plain network.
        classes: Names of the classes, which are written into the file's metadata.
        preprocessing: Size, mean, std and crop of the images, likewise.

    Raises:
        ConfigError: the target does not exist or needs a package, or an argument does not fit.
        ExportError: the network cannot be written, or its file fails the check; nothing is left at ``path``.
    """
    goal = find_target(target)
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"export takes a network (a torch.nn.Module), got {model!r}")
    if is_detector(model) and not goal.takes_detectors:
        raise ExportError(f"{target} takes no detector, whose loops vary in length; export it to onnx")
    inputs = read_example(model, example)
    place = check_place(path, goal)
    about = About.of(classes, preprocessing)
    model = copy_unwrapped(model).cpu()
    check_example(model, inputs, about)
    prepared = prepare(model, goal.form, early=goal.early)
    with write_beside(place) as file:
        with progress.show(f"writing the file ({target})"):
            facts = goal.write(prepared.network, inputs, about, file)
        written = list(file.parent.iterdir())
        report = ExportReport(
            path=str(place),
            target=target,
            bytes=sum(part.stat().st_size for part in written),
            gates=prepared.gates,
            facts=facts,
        )
        if check:
            with progress.show(f"running the file ({target})"):
                report = check_file(Subject(model=model, inputs=inputs, target=goal, path=file), report)
        else:
            report = replace(report, notes=("not checked",))
    return report


def check_place(place: object, target: Target) -> Path:
    """Return the path ``place`` of a file after making its folder.

    Raises:
        ConfigError: it is no name of a file, has another suffix than the target's files, or is a directory, or the
            second file that the target writes would replace a file of something else.
    """
    if not is_path(place):
        raise ConfigError(f"path must be the name of a file, got {show_value(place)}")
    path = Path(place)
    if path.name in ("", ".."):
        raise ConfigError(f"path {str(place)!r} names no file; write model{target.suffix}")
    if path.suffix != target.suffix:
        raise ConfigError(f"{path} must end in {target.suffix}; write {path.with_suffix(target.suffix)}")
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; give the name of a file")
        second = path.with_suffix(target.second or target.suffix)
        if second.exists() and not path.exists():
            raise ConfigError(
                f"{second} exists without {path.name}, and would be replaced; move it, or give another path"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: its folder cannot be made ({error.strerror}); give another path") from error
    return path


def check_example(model: nn.Module, inputs: Sequence[Tensor], about: About) -> None:
    """Run ``model`` on its inputs, and compare what it takes and returns with what ``about`` says.

    Raises:
        ConfigError: it is not in float32, does not run, or has another number of classes or channels.
    """
    name, shapes = type(model).__name__, " and ".join("x".join(map(str, x.shape)) for x in inputs)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes and torch.float32 not in dtypes:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(f"{name} is in {found}, and files are written in float32; pass copy.deepcopy(model).float()")
    try:
        outputs = run_network(model, inputs)
    except Exception as error:  # a forward may raise anything
        raise ConfigError(f"{name} does not run on the images {shapes}: {summarize(error)}; give others") from error
    images, classes = about.preprocessing, len(about.classes)
    if images is not None and inputs[0].dim() > 2 and images.channels != inputs[0].shape[-3]:
        raise ConfigError(f"preprocessing has {images.channels} channels, and the images are {shapes}")
    if is_detector(model) or not classes or len(outputs) != 1 or outputs[0].dim() != 2:
        return
    logits = outputs[0].shape[1]
    if classes != logits and (classes, logits) != (2, 1):
        raise ConfigError(f"classes has {classes} names, and {name} returns {logits} logits; give one name for each")


@contextmanager
def write_beside(place: Path) -> Generator[Path]:
    """Yield where to write the file ``place``: in a new folder, whose files take their places if no error is raised.

    Raises:
        ConfigError: they cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".export-") as folder:
            file = Path(folder) / place.name
            yield file
            parts = [part for part in Path(folder).iterdir() if part.is_file()]
            if len(parts) > 1:  # a process that is killed between two leaves no file, and none beside another's part
                place.unlink(missing_ok=True)
            for part in sorted(parts, key=lambda part: part == file):  # the file itself comes last
                part.replace(place.with_name(part.name))
    except OSError as error:
        reason = error.strerror or summarize(error)
        raise ConfigError(f"{place} cannot be written ({reason}); give another path, or make room") from error
