"""Read a checkpoint file: no code in it runs, and time and memory are bounded by the size of the file.

PyTorch's reader (``weights_only=True``) builds tensors, containers and plain values, and refuses every other class by
name. Training scripts often store settings beside the weights. The classes in `HARMLESS` are therefore replaced by a
`Placeholder` while a file is read: their objects are not needed, and nothing of these classes is imported or called.
"""

import io
import json
import pickle
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from ecanet.errors import CheckpointError, summarize
from ecanet.models.pickles import LARGEST_PICKLE, check_pickles

LARGEST_RATIO = 8
"""Size of a zip file's unpacked content, relative to the file. PyTorch does not compress, so 1 is usual."""

REFUSED = (b"bytearray\n", b"_rebuild_device_tensor_from_")
"""Names that PyTorch's reader allows, and with which a file of 100 bytes can allocate all memory."""


class Placeholder:
    """Stands for an object of a class in `HARMLESS`. It keeps nothing of the object."""

    def __new__(cls, *_: object) -> "Placeholder":
        """Return a placeholder, whatever the arguments are."""
        return super().__new__(cls)

    def __init__(self, *_: object):
        """Ignore the arguments."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class PlainMapping:
    """Stands for a subclass of dict; PyTorch's reader fills only plain and ordered dictionaries."""

    def __new__(cls, *_: object) -> "OrderedDict[object, object]":
        """Return an empty dictionary."""
        return OrderedDict()


class PlainList:
    """Stands for a sequence that is filled as it is read; PyTorch's reader fills only lists."""

    def __new__(cls, *_: object) -> list[object]:
        """Return an empty list."""
        return []


SETTINGS = """
    argparse.Namespace types.SimpleNamespace typing.Any enum.Enum uuid.UUID decimal.Decimal fractions.Fraction
    datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone
    pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePath pathlib.PurePosixPath pathlib.PureWindowsPath
    pathlib._local.Path pathlib._local.PosixPath pathlib._local.WindowsPath pathlib._local.PurePath
    pathlib._local.PurePosixPath pathlib._local.PureWindowsPath
    builtins.bool builtins.bytes builtins.dict builtins.float builtins.frozenset builtins.int builtins.list
    builtins.range builtins.slice builtins.str builtins.tuple torch.torch_version.TorchVersion
    omegaconf.base.ContainerMetadata omegaconf.base.Metadata omegaconf.dictconfig.DictConfig
    omegaconf.listconfig.ListConfig omegaconf.nodes.AnyNode omegaconf.nodes.BooleanNode omegaconf.nodes.FloatNode
    omegaconf.nodes.IntegerNode omegaconf.nodes.StringNode
"""

NUMPY = """
    dtype ndarray core.multiarray.scalar core.multiarray._reconstruct core.numeric._frombuffer bool_ bool int8 int16
    int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 longdouble complex64 complex128 str_ bytes_
    datetime64 timedelta64
"""
"""NumPy's scalars, arrays and their types. The module ``core`` is called ``_core`` since NumPy 2."""

NUMPY_DTYPES = """
    Bool Byte UByte Short UShort Int UInt Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Long ULong LongLong
    ULongLong Float16 Float32 Float64 LongDouble Complex64 Complex128 CLongDouble Bytes Str DateTime64 TimeDelta64
    Void Object
"""

MAPPINGS = """
    collections.defaultdict easydict.EasyDict addict.addict.Dict yacs.config.CfgNode fvcore.common.config.CfgNode
    mmcv.utils.config.ConfigDict mmengine.config.config.ConfigDict lightning.fabric.utilities.data.AttributeDict
    lightning_fabric.utilities.data.AttributeDict pytorch_lightning.utilities.parsing.AttributeDict
    lightning.pytorch.utilities.parsing.AttributeDict
"""


def list_harmless() -> dict[str, type]:
    """Return `HARMLESS`."""
    numpy = [f"numpy.{name}" for name in NUMPY.split()]
    numpy += [name.replace(".core.", "._core.") for name in numpy if ".core." in name]
    numpy += [f"numpy.dtypes.{name}DType" for name in NUMPY_DTYPES.split()]
    names = dict.fromkeys((*SETTINGS.split(), *numpy))
    return {
        **{name: type(name, (Placeholder,), {}) for name in names},
        **dict.fromkeys(MAPPINGS.split(), PlainMapping),
        "collections.deque": PlainList,
    }


HARMLESS = list_harmless()
"""Names of classes that are common in checkpoints beside the weights, with the class that stands for them."""

_reading = threading.Lock()
"""PyTorch's list of allowed names is global, so only one thread at a time may change it."""


def read_file(path: str | Path) -> object:
    """Return the content of the file ``path``; never run code from it.

    Objects of the classes in `HARMLESS` become placeholders. A ``.safetensors`` file needs the extra ``hub``.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, needs far more memory than its size, or would
            run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PK\x03\x04":
            check_archive(path)
            with allow_harmless_names():
                content: object = torch.load(path, map_location="cpu", weights_only=True)
        elif start[:1] == b"\x80":  # a pickle, as PyTorch before 1.6 wrote them
            with path.open("rb") as file:
                check_pickles(path, file.read(LARGEST_PICKLE))
            with allow_harmless_names(), LimitedReader(io.FileIO(path)) as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
        else:
            raise CheckpointError(f"{path} is not a checkpoint")
        check_tensors(path, content)
        return content
    except CheckpointError:
        raise
    except Exception as error:  # whatever the readers meet in a damaged file
        raise CheckpointError(f"{path} {explain(error)}") from error


@contextmanager
def allow_harmless_names() -> Generator[None]:
    """Let PyTorch's reader replace the classes in `HARMLESS`, and ignore its warnings, inside this context only."""
    names = cast(
        "list[Callable[..., object] | tuple[Callable[..., object], str]]", [(c, n) for n, c in HARMLESS.items()]
    )
    with _reading, torch.serialization.safe_globals(names), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_archive(path: Path) -> None:
    """Check what a zip file says about itself, before anything is unpacked, and then its checksums.

    Raises:
        CheckpointError: it is a TorchScript program, unpacking it may need far more memory than its size, or its
            content has changed since it was written.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if not any(entry.CRC for entry in entries):  # set_crc32_options(False) keeps PyTorch from writing checksums
            for entry in entries:
                entry.CRC = cast(int, None)  # so that nothing is compared
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise CheckpointError(
                f"{path} is a TorchScript program; save torch.jit.load(PATH).state_dict() by torch.save and load that"
            )
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > LARGEST_RATIO * path.stat().st_size:
            raise CheckpointError(
                f"{path} would unpack to {unpacked:,} bytes, more than {LARGEST_RATIO} times its size; "
                f"PyTorch writes no such file"
            )
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if sum(entry.file_size for entry in pickles) > LARGEST_PICKLE:
            raise make_size_error(path)
        for data in map(archive.read, pickles):
            if any(name in data for name in REFUSED):
                raise make_name_error(path)
            check_pickles(path, data)
        # PyTorch's reader ignores the checksums.
        if (name := archive.testzip()) is not None:
            raise CheckpointError(
                f"{path} is damaged: {name!r} in it does not have its checksum; take another copy of the file"
            )


def check_tensors(path: Path, content: object) -> None:
    """Raise CheckpointError if the tensors of a file are far larger than the file: a view repeats its numbers."""
    values, seen, total = [content], set[int](), 0
    while values:
        value = values.pop()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
            total += value.numel() * value.element_size()
        elif isinstance(value, dict | list | tuple) and id(cast(object, value)) not in seen:
            seen.add(id(cast(object, value)))  # it may hold itself
            inner = cast(object, value)
            values += (
                cast("dict[object, object]", inner).values() if isinstance(inner, dict) else cast(list[object], inner)
            )
    if total > LARGEST_RATIO * path.stat().st_size:
        raise CheckpointError(
            f"{path} holds tensors of {total:,} bytes, more than {LARGEST_RATIO} times its size, which are views of "
            f"fewer numbers; save their clones and load those"
        )


class LimitedReader(io.BufferedReader):
    """A file in PyTorch's format before 1.6, of which at most `LARGEST_PICKLE` bytes are read as pickles.

    PyTorch reads the tensors past this class, by the file's descriptor.
    """

    total = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, and count them."""
        data = super().read(size)
        self.count(data)
        return data

    def readline(self, size: int | None = -1, /) -> bytes:
        """Return the next line, part of a class's name, and count it."""
        line = super().readline(LARGEST_PICKLE if size is None or size < 0 else size)
        if any(name in line for name in REFUSED):
            raise make_name_error(Path(self.name))
        self.count(line)
        return line

    def count(self, data: bytes) -> None:
        """Add the length of ``data`` to the total.

        Raises:
            CheckpointError: the total is too large.
        """
        self.total += len(data)
        if self.total > LARGEST_PICKLE:
            raise make_size_error(Path(self.name))


def make_size_error(path: Path) -> CheckpointError:
    """Return the error for a file whose pickles are too large."""
    return CheckpointError(
        f"{path} holds more than {LARGEST_PICKLE:,} bytes beside its tensors; save only the network's state dict "
        f"(torch.save(model.state_dict(), PATH)) and load that"
    )


def make_name_error(path: Path) -> CheckpointError:
    """Return the error for a file that uses a name in `REFUSED`."""
    return CheckpointError(
        f"{path} was not loaded, since it may allocate all memory (a bytearray or a tensor of another device); save "
        f"only the network's state dict (torch.save(model.state_dict(), PATH)) and load that"
    )


def read_safetensors(path: Path) -> object:
    """Return the tensors of a safetensors file by name; with the description that `ecanet weights` adds, as in a .pth.

    Raises:
        CheckpointError: safetensors is not installed.
    """
    try:
        from safetensors import safe_open  # pyright: ignore[reportUnknownVariableType]
    except ImportError as error:
        raise CheckpointError(f"{path} needs safetensors; install it by pip install 'ecanet[hub]'") from error
    with cast("Callable[..., Any]", safe_open)(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        metadata = cast("dict[str, str]", file.metadata() or {})
    about = metadata.get("ecanet")
    return tensors if about is None else {"state_dict": tensors, "ecanet": json.loads(about)}


def explain(error: Exception) -> str:
    """Return why a file was not read and what to do, as the end of a sentence that begins with its path."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL ([\w.]+)", text)
        reason = f"it needs {named[1]}" if named else "its pickle is not of the kind that torch.save writes"
        return (
            f"was not loaded, since it may run code and not only hold weights: {reason[:120]}; where it was written, "
            f"save only the network's state dict (torch.save(model.state_dict(), PATH)) and load that"
        )
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or summarize(error)}"
    return f"is truncated or not a checkpoint ({summarize(error)})"
