"""The one table of targets: what each needs, which form of a gate it runs fast, how it is written and opened.

A target's form is the one with the fewest partitions there and, among equals, the fewest operations; a test counts
them. `banded` and `matrix` have fewer operations still, but C x C weights: 80 MB for ResNet-50's gates. Where measured
time rewards it, `mixed` gives narrow gates such weights: in OpenVINO, and in ONNX Runtime's blocked layout.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ecanet.deploy import executorch_files, onnx_blocked, onnx_files, openvino_files, torch_files
from ecanet.deploy.about import About
from ecanet.deploy.forms import Form
from ecanet.deploy.programs import Session
from ecanet.errors import ConfigError

__all__ = ["TARGETS", "Target", "find_target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of file and the runtime that executes it."""

    suffix: str
    """Of the files' names."""
    second: str = ""
    """Suffix of the file that is written beside it, if there is one."""
    form: Form
    early: bool
    """Whether a gate takes its means before the convolution that widens, which is one convolution of means more."""
    packages: tuple[str, ...] = ()
    """Import names of the packages that writing and checking need."""
    extra: str = ""
    """This library's extra that brings them."""
    takes_detectors: bool = False
    write: Callable[[nn.Module, Sequence[Tensor], About, Path], dict[str, object]]
    open: Callable[[Path], Session]


TARGETS: dict[str, Target] = {
    "onnx": Target(
        suffix=".onnx",
        form="conv2d",
        early=False,  # ONNX Runtime has to change the layout of the means twice
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="export",
        takes_detectors=True,
        write=onnx_files.write_file,
        open=onnx_files.open_file,
    ),
    "onnxruntime": Target(
        suffix=".onnx",
        form="mixed",  # a kernel over the channels leaves the blocked layout
        early=False,
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="export",
        write=onnx_blocked.write_file,
        open=onnx_files.open_file,
    ),
    "openvino": Target(
        suffix=".xml",
        second=".bin",
        form="mixed",  # a kernel over the channels changes the layout of the means four times
        early=True,
        packages=("openvino",),
        extra="openvino",
        write=openvino_files.write_file,
        open=openvino_files.open_file,
    ),
    "executorch": Target(
        suffix=".pte",
        second=".json",
        form="conv2d",
        early=True,
        packages=("executorch",),
        extra="executorch",
        write=executorch_files.write_file,
        open=executorch_files.open_file,
    ),
    "torch-export": Target(
        suffix=".pt2", form="conv2d", early=True, write=torch_files.write_export, open=torch_files.open_export
    ),
    "torchscript": Target(
        suffix=".pt", form="conv2d", early=True, write=torch_files.write_script, open=torch_files.open_script
    ),
}
"""The targets by name."""


def find_target(name: str) -> Target:
    """Return the target called ``name``.

    Raises:
        ConfigError: there is no such target, or a package that it needs is not installed.
    """
    if name not in TARGETS:
        raise ConfigError(f"unknown target {name!r}; choose {', '.join(TARGETS)}")
    target = TARGETS[name]
    missing = [package for package in target.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"{name} needs {', '.join(missing)}: pip install 'ecanet[{target.extra}]'")
    return target
