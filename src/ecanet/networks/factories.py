"""Networks from a user's own file: ``FILE.py:FACTORY``, where FACTORY is a function that returns a module.

Such a file is code, and building the network runs it. That is safe for a file that the user names on the command line,
and not for one that only a checkpoint names, since anybody may have written the checkpoint. So `trust` remembers the
content of each file that a user has named; a checkpoint's file runs only if this machine knows its content. It is the
same with an attention ``package.module.Class``: importing the package runs it.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from torch import nn

from ecanet.errors import ConfigError, summarize
from ecanet.models import get_cache_folder

__all__ = ["Factory", "check_class", "find_factory", "is_file", "trust", "trust_class"]

Factory = Callable[..., nn.Module]
"""A function that returns a network; it may take ``num_classes``."""


def is_file(name: str) -> bool:
    """Return whether the network's name means a function in a file.

    >>> is_file("nets/mine.py:make"), is_file("timm:resnet18")
    (True, False)
    """
    return name.rpartition(":")[0].endswith(".py")


def trust(name: str) -> str:
    """Remember the content of the file in ``name``, which the user has named; return the name with an absolute path.

    Raises:
        ConfigError: the file cannot be read.
    """
    path, function = _split(name)
    record = _find_record(_read(path))
    record.parent.mkdir(parents=True, exist_ok=True)
    record.touch()
    return f"{path.absolute()}:{function}"


def find_factory(name: str) -> Factory:
    """Run the file in ``name`` and return the function of that name in it.

    Raises:
        ConfigError: the file is missing, was never named on this machine with this content, or fails; or it has no
            such function.
    """
    path, function = _split(name)
    source = _read(path)
    if not _find_record(source).exists():
        raise ConfigError(
            f"{path} is code that nobody has named on this machine with this content, and it would run; if you trust "
            f"it, name it: --model {path}:{function}"
        )
    module_name = f"ecanet_factory_{hashlib.sha256(str(path.absolute()).encode() + source).hexdigest()[:12]}"
    if module_name not in sys.modules:
        _run(module_name, path)
    factory = getattr(sys.modules[module_name], function, None)
    if not callable(factory):
        raise ConfigError(f"{path} has no function {function!r}; name one that returns a network: {path}:FUNCTION")
    return cast(Factory, factory)


def trust_class(path: str) -> None:
    """Remember the attention ``path`` (``package.module.Class``), which the user has named, and where it lies."""
    record = _find_class_record(path)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.touch()


def check_class(path: str) -> None:
    """Check that the module of the attention ``path`` may be imported, which runs it.

    Raises:
        ConfigError: only a file names it, and it has neither been imported nor named on this machine.
    """
    module = path.rpartition(".")[0]
    if module not in sys.modules and not _find_class_record(path).exists():
        raise ConfigError(
            f"attention {path!r} is code that nobody has named on this machine, and it would run; if you trust it, "
            f"name it: --model NAME --attention {path}"
        )


def _find_class_record(path: str) -> Path:
    """Return the path of the empty file that says that a user has named the class ``path`` of this package."""
    try:
        spec = importlib.util.find_spec(path.partition(".")[0])  # of a package's outermost part, which is not run
    except (ImportError, ValueError):
        spec = None
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    return get_cache_folder("named-files") / hashlib.sha256(f"{path} {places}".encode(errors="replace")).hexdigest()


def _split(name: str) -> tuple[Path, str]:
    path, _, function = name.rpartition(":")
    return Path(path).expanduser(), function


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); a network of yours is FILE.py:FACTORY") from None


def _find_record(source: bytes) -> Path:
    """Return the path of the empty file that says that a user has named a file of this content."""
    return get_cache_folder("named-files") / hashlib.sha256(source).hexdigest()


def _run(module_name: str, path: Path) -> None:
    """Run the file as the module ``module_name``; files beside it can be imported.

    Raises:
        ConfigError: it raises an error.
    """
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before the code runs, as pickle and dataclasses look there
    sys.path.insert(0, str(path.absolute().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(f"{path} fails when it runs: {type(error).__name__}: {summarize(error)}") from error
    finally:
        sys.path.remove(str(path.absolute().parent))
