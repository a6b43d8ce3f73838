"""Remember what was found out about kernels on this machine, so that later processes need not repeat it.

A record is a file in the user's cache folder. Its name and its content say all that the finding depends on: the device,
its driver, the versions of torch and Triton, the source of the kernels, the dtype. Of the proofs only a success is
recorded; a choice between two forms of an operation is recorded with what was chosen. A file that is damaged, or that
another user owns, counts as none.
"""

import functools
import hashlib
import json
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

import torch

__all__ = ["has_passed", "read_choice", "record_choice", "record_success"]


def has_passed(device: torch.device, dtype: torch.dtype, kernels: str) -> bool:
    """Return whether these kernels are recorded to have passed on this machine."""
    return read_result(device, dtype, kernels) == b""


def record_success(device: torch.device, dtype: torch.dtype, kernels: str) -> None:
    """Record that these kernels have passed. Where the file cannot be written, the next process repeats the proof."""
    write_result(device, dtype, kernels, b"")


def read_choice(device: torch.device, dtype: torch.dtype, kind: str) -> str | None:
    """Return what was chosen for this kind of work on this machine, None if nothing is recorded."""
    found = read_result(device, dtype, kind)
    if found is None or len(found) < 2 or not (found.startswith(b"\n") and found.endswith(b"\n")):
        return None
    return found.decode(errors="replace").strip()


def record_choice(device: torch.device, dtype: torch.dtype, kind: str, choice: str) -> None:
    """Record what was chosen for this kind of work: one line."""
    write_result(device, dtype, kind, f"\n{choice}\n".encode())


def read_result(device: torch.device, dtype: torch.dtype, kernels: str) -> bytes | None:
    """Return what the record has behind all that it depends on, None without a right record."""
    content = describe_proof(device, dtype, kernels)
    if content is None:
        return None
    try:
        path = find_record(content)
        if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            return None
        found = path.read_bytes()
    except (OSError, RuntimeError):  # a user may have no home: that is a RuntimeError
        return None
    return found.removeprefix(content) if found.startswith(content) else None


def write_result(device: torch.device, dtype: torch.dtype, kernels: str, result: bytes) -> None:
    """Write a record, if that is possible."""
    content = describe_proof(device, dtype, kernels)
    if content is None:
        return
    try:
        path = find_record(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content + result)
        Path(file.name).replace(path)  # complete or not at all, whichever processes write at once
    except (OSError, RuntimeError):
        return


def find_record(content: bytes) -> Path:
    """Return the file of the record that begins with this content."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ecanet", "proofs")
    return cache / f"{hashlib.sha256(content).hexdigest()[:32]}.json"


def describe_proof(device: torch.device, dtype: torch.dtype, kernels: str) -> bytes | None:
    """Return all that the proof depends on as JSON, None on a device whose proofs are not recorded.

    Only those on a GPU are: in Triton's interpreter nothing is compiled.
    """
    gpu = describe_gpu(device)
    if gpu is None:
        return None
    try:
        triton = version("triton")
    except PackageNotFoundError:  # made from source, or another package has its name
        triton = str(getattr(sys.modules.get("triton"), "__version__", None))
    content = {"gpu": gpu, "torch": torch.__version__, "triton": triton, "source": hash_source()}
    return json.dumps(content | {"dtype": str(dtype), "kernels": kernels}, sort_keys=True).encode()


def describe_gpu(device: torch.device) -> list[object] | None:
    """Return name, compute capability and driver of a GPU, None for any other device."""
    if device.type != "cuda":
        return None
    driver = cast(object, torch._C._cuda_getDriverVersion())  # pyright: ignore
    return [torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device), driver, torch.version.cuda]


@functools.cache
def hash_source() -> str:
    """Return a digest of this room's files and of the error budget, to which the proof holds the kernels."""
    room = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(room.rglob("*.py")), room.parent / "testing.py"]:
        digest.update(str(path.relative_to(room.parent)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
