"""Say what this installation has, what works, and what to install: `ecanet doctor`.

It runs without the packages of any extra, and with a torchvision that cannot be imported.
"""

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

__all__ = ["Finding", "examine", "find_exit_code", "format_findings"]

PURPOSES = {
    "train": "the commands: train, eval, predict, …",
    "export": "ONNX files",
    "openvino": "Intel's runtime",
    "executorch": "phones",
    "hub": "safetensors, and the hub's repositories",
    "cam": "class-activation maps",
    "app": "the page in the browser: ecanet app",
    "heic": "iPhones' photographs",
    "glyphs": "the data sets glyphs and garments",
    "cluster": "ablations on several machines",
    "mlflow": "the logger mlflow",
    "wandb": "the logger wandb",
}
"""What each extra of pyproject.toml brings. Those for developers are not listed."""

TOGETHER = "pip install --force-reinstall torch torchvision (both from one place)"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was examined.

    ``state`` is "ok", "none" (not here, and nothing is wrong), "missing" (an extra is not, or not wholly, installed) or
    "broken". ``remedy`` is a command, or empty.
    """

    name: str
    state: Literal["ok", "none", "missing", "broken"]
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Return what was found, in the order in which to read it; nothing is installed or changed.

    >>> from ecanet.studies.doctor import examine
    >>> [found.name for found in examine()][:4]
    ['python', 'torch', 'torchvision', 'devices']
    """
    system = f"{platform.system()} {platform.machine()}"
    found = [Finding(name="python", state="ok", detail=f"{platform.python_version()}, {system}")]
    found += [_examine_torch(), _examine_torchvision(), _examine_devices(), *_examine_kernels()]
    return [*found, *_examine_extras()]


def _examine_torch() -> Finding:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    return Finding(name="torch", state="ok", detail=f"{torch.__version__}, {build}")


def _examine_torchvision() -> Finding:
    """Call an operation of torchvision's own, because a torchvision for another torch may be imported and lack them."""
    import torch

    try:
        import torchvision  # pyright: ignore[reportMissingTypeStubs]

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except ModuleNotFoundError as error:
        return Finding(name="torchvision", state="broken", detail=_first_line(error), remedy="pip install torchvision")
    except Exception as error:  # whatever a broken installation raises
        detail = f"does not fit this torch: {_first_line(error)}"
        return Finding(name="torchvision", state="broken", detail=detail, remedy=TOGETHER)
    return Finding(name="torchvision", state="ok", detail=torchvision.__version__)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _examine_devices() -> Finding:
    import torch

    names = [f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        names += [f"cuda:{at} ({torch.cuda.get_device_name(at)})" for at in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return Finding(name="devices", state="ok", detail=", ".join(names))


def _examine_kernels() -> Iterator[Finding]:
    """Yield whether this library's Triton kernels give correct results on the first GPU, for each dtype."""
    import torch

    from ecanet import ops

    if not torch.cuda.is_available():
        yield Finding(name="kernels", state="none", detail="no CUDA GPU here: networks use PyTorch's operations")
        return
    device = torch.device("cuda", 0)
    for dtype in ops.proof.DTYPES:
        failure = ops.proof.find_failure(device, dtype)
        name = f"kernels, {str(dtype).removeprefix('torch.')}"
        if failure is None:
            yield Finding(name=name, state="ok", detail=f"correct on {torch.cuda.get_device_name(0)}")
        else:
            detail = f"not used, networks use PyTorch's operations: {failure}"
            yield Finding(name=name, state="broken", detail=detail)


# extras


def _examine_extras() -> Iterator[Finding]:
    """Yield what is installed of each extra, by the requirements in this package's metadata."""
    try:
        requirements = metadata.requires("ecanet") or []
    except metadata.PackageNotFoundError:
        detail = "ecanet itself is not installed by pip, so its requirements are not known"
        yield Finding(name="extras", state="missing", detail=detail, remedy="pip install .")
        return
    for extra, purpose in PURPOSES.items():
        marker = re.compile(rf"""extra\s*==\s*['"]{extra}['"]""")
        wanted = [line.partition(";")[0].strip() for line in requirements if marker.search(line)]
        if not wanted:
            continue
        wrong = [problem for problem in map(_find_problem, wanted) if problem]
        if wrong:
            remedy = f"pip install 'ecanet[{extra}]'"
            more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
            detail = f"{purpose}: {', '.join(wrong[:2])}{more}"
            yield Finding(name=extra, state="missing", detail=detail, remedy=remedy)
        else:
            yield Finding(name=extra, state="ok", detail=purpose)


def _find_problem(requirement: str) -> str | None:
    """Return what is wrong with an installed package for ``requirement``, such as ``onnx>=1.17``; None if it fits."""
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    name = match[0]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:  # it comes with the extra `train`; without it versions are not compared
        return None
    fits = Requirement(requirement).specifier.contains(version, prereleases=True)
    return None if fits else f"{name} is {version}, not {requirement.removeprefix(name)}"


# output


def format_findings(findings: list[Finding]) -> str:
    """Return one line for each finding, with its remedy below it.

    >>> print(format_findings([Finding(name="hub", state="missing", detail="no", remedy="pip install 'ecanet[hub]'")]))
    missing  hub  no
                  pip install 'ecanet[hub]'
    """
    width = max(len(found.name) for found in findings)
    lines: list[str] = []
    for found in findings:
        lines.append(f"{found.state:8} {found.name:{width}}  {found.detail}")
        if found.remedy:
            lines.append(f"{'':8} {'':{width}}  {found.remedy}")
    return "\n".join(lines)


def find_exit_code(findings: list[Finding]) -> int:
    """Return 2 if torch or torchvision is broken, without which nothing works, else 0."""
    return 2 if any(found.state == "broken" and found.name == "torchvision" for found in findings) else 0
