"""Reading files: settings beside the weights are passed over, code is refused, hostile files cost little."""

import argparse
import builtins
import collections
import datetime
import io
import os
import pathlib
import pickle
import sys
import threading
import types
import uuid
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import ecanet
from ecanet.errors import CheckpointError
from ecanet.models import files, read_file

WEIGHTS = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}


class Recipe(dict):
    """A dictionary with attributes, as configuration libraries have them."""


def make_network():
    return nn.Sequential(collections.OrderedDict(fc=nn.Linear(3, 2)))


def write_archive(path, pickled, *, compression=zipfile.ZIP_STORED, records=()):
    """Write a file like torch.save's around the bytes of a pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"), *records):
            archive.writestr(f"archive/{name}", data)


SETTINGS = {
    "namespace": argparse.Namespace(lr=0.1, paths=[pathlib.Path("data")], betas=(0.9, 0.99)),
    "nested namespaces": types.SimpleNamespace(optimizer=argparse.Namespace(name="sgd")),
    "numpy scalars": {"best_acc1": np.float64(95.1), "epoch": np.int64(3), "flag": np.bool_(True), "half": np.half(1)},
    "numpy types": [np.dtype("float32"), np.float32, np.dtype(">i8"), np.dtype("U7"), np.datetime64("2026-01-01")],
    "numpy arrays": [np.arange(5), np.zeros((2, 0)), np.random.default_rng(0).normal(size=3).astype("f4")],
    "random state": np.random.get_state(),  # noqa: NPY002 (training scripts store the old generator's)
    "containers": [collections.deque([1, 2], 5), collections.defaultdict(list, a=[1]), frozenset([1]), range(3)],
    "times": [datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), datetime.timedelta(1), datetime.date(2026, 1, 1)],
    "others": [uuid.uuid4(), torch.__version__, slice(1, 2), pathlib.PureWindowsPath("C:/x")],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_beside_the_weights_do_not_matter(kind, zipped, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    content = {"config": SETTINGS[kind], "state_dict": WEIGHTS, "last": [SETTINGS[kind]]}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    model = make_network()
    assert ecanet.load_checkpoint(model, tmp_path / "file.pt").complete
    assert torch.equal(model.fc.weight, WEIGHTS["fc.weight"])
    assert set(torch.serialization.get_safe_globals()) == before  # nothing stays allowed


@pytest.mark.parametrize("kind", ["PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"])
@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_every_python(module, kind, tmp_path):
    """Python 3.13 calls the module of its paths `pathlib._local`."""
    pickled = f"\x80\x02}}(X\x04\x00\x00\x00pathc{module}\n{kind}\nX\x01\x00\x00\x00x\x85Ru.".encode("latin-1")
    write_archive(tmp_path / "file.pt", pickled)
    assert "path" in read_file(tmp_path / "file.pt")


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpy_scalars_of_both_generations(core, tmp_path):
    """NumPy 1 and 2 write the same pickles but for one module's name."""
    pickled = pickle.dumps({"fc.weight": 1, "best": np.float64(0.5)}, protocol=2)
    assert b"numpy._core.multiarray" in pickled or b"numpy.core.multiarray" in pickled
    pickled = pickled.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", f"numpy.{core}.".encode())
    write_archive(tmp_path / "file.pt", pickled)
    assert read_file(tmp_path / "file.pt")["fc.weight"] == 1


def test_classes_of_settings_are_neither_imported_nor_called(tmp_path, monkeypatch):
    """A library's dictionary class is read without the library."""
    module = types.ModuleType("easydict")
    module.EasyDict = type("EasyDict", (dict,), {"__module__": "easydict"})
    monkeypatch.setitem(sys.modules, "easydict", module)
    config = module.EasyDict(lr=0.1)
    config.lr = 0.1  # such classes keep entries as attributes too
    torch.save({"model": module.EasyDict(WEIGHTS), "config": config}, tmp_path / "file.pt")
    monkeypatch.delitem(sys.modules, "easydict")
    assert ecanet.load_checkpoint(make_network(), tmp_path / "file.pt").complete
    assert "easydict" not in sys.modules
    torch.save({"path": pathlib.PosixPath("secret")}, tmp_path / "file.pt")
    assert isinstance(read_file(tmp_path / "file.pt")["path"], files.Placeholder)


def test_names_that_the_user_allowed_stay_allowed(tmp_path):
    torch.save({"args": argparse.Namespace(), **WEIGHTS}, tmp_path / "file.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_file(tmp_path / "file.pt")
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def test_threads_read_at_the_same_time(tmp_path):
    torch.save({"args": [argparse.Namespace(x=i) for i in range(300)], **WEIGHTS}, tmp_path / "file.pt")
    results = []
    threads = [threading.Thread(target=lambda: results.append(read_file(tmp_path / "file.pt"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


REFUSED = {
    "a class of the user": (Recipe(a=1), f"{__name__}.Recipe"),
    "a network": (nn.ReLU(), "torch.nn.modules.activation.ReLU"),
    "a command": (Runs(os.mkdir, "owned"), "posix.mkdir"),
    "eval": (Runs(builtins.eval, "open('owned', 'w')"), "eval"),
    "an import": (Runs(__import__, "antigravity"), "__import__"),
    "getattr": (Runs(getattr, argparse.Namespace(), "x"), "getattr"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_classes_are_named_and_the_remedy_is_the_state_dict(kind, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thing, name = REFUSED[kind]
    torch.save({**WEIGHTS, "thing": thing}, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        ecanet.load_checkpoint(make_network(), tmp_path / "file.pt")
    text = str(caught.value)
    assert f"it needs {name};" in text
    assert "torch.save(model.state_dict(), PATH)" in text
    assert "weights_only" not in text
    assert "\n" not in text
    assert not (tmp_path / "owned").exists()


def scripted():
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    return file.getvalue()


def pickled(protocol):
    return pickle.dumps(dict.fromkeys(WEIGHTS, 1.0), protocol=protocol)


ALLOCATES = b"cbuiltins\nbytearray\n\x8a\x05" + (3 * 10**9).to_bytes(5, "little") + b"\x85R"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (scripted, "is a TorchScript program; save torch.jit.load"),
        (lambda: pickled(4), "its pickle is not of the kind that torch.save writes"),
        (lambda: pickled(2), "is truncated or not a checkpoint"),
        (lambda: pickled(0), "is not a checkpoint"),
        (lambda: b"", "is not a checkpoint"),
        (lambda: b"<!doctype html>", "is not a checkpoint"),
        (lambda: b"PK\x03\x04 and no archive", "is truncated or not a checkpoint"),
        (lambda: b"\x80\x02", "is truncated or not a checkpoint"),
        (lambda: b"\x80\x02}" + ALLOCATES + b"K\x01s.", "may allocate all memory"),
    ],
)
def test_other_files_are_refused_in_one_line(content, says, tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(content())
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def memory():
    """Return a function that gives the most memory of this process so far, in bytes."""
    resource = pytest.importorskip("resource")
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("kind", ["zip bomb", "many zip bombs", "huge pickle", "huge old pickle", "allocates"])
def test_hostile_files_cost_little(kind, tmp_path, memory):
    path = tmp_path / "file.pt"
    says = "holds more than 33,554,432 bytes beside its tensors"
    match kind:
        case "zip bomb":
            records = [("data/0", bytes(2**28))]
            write_archive(path, b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED, records=records)
            says = "would unpack to 268,"
        case "many zip bombs":
            records = [(f"data/{i}", bytes(2**20)) for i in range(64)]
            write_archive(path, b"\x80\x02}.", compression=zipfile.ZIP_BZIP2, records=records)
            says = "would unpack to 67,"
        case "huge pickle":
            write_archive(path, b"\x80\x02" + b"\x8f" * (files.LARGEST_PICKLE + 9) + b".")
        case "huge old pickle":
            text = b"X" + (2**20).to_bytes(4, "little") + bytes(2**20)
            path.write_bytes(b"\x80\x02" + text * 40 + b".")
        case "allocates":
            write_archive(path, b"\x80\x02}" + ALLOCATES + b"K\x01s.")
            says = "may allocate all memory"
    before = memory()
    with pytest.raises(CheckpointError, match=says):
        read_file(path)
    assert memory() - before < 2**28


def test_deep_dictionaries_are_no_state_dict(tmp_path):
    depth = 20_000
    write_archive(tmp_path / "file.pt", b"\x80\x02" + b"}X\x01\x00\x00\x00a" * depth + b"K\x01" + b"s" * depth + b".")
    with pytest.raises(CheckpointError, match=r"holds no state dict.* \(its first key is 'a'\)"):
        ecanet.load_checkpoint(make_network(), tmp_path / "file.pt")


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "file.safetensors"
    safetensors.save_file(WEIGHTS, path)
    assert ecanet.load_checkpoint(make_network(), path).complete
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="is truncated or not a checkpoint"):
        read_file(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"needs safetensors; install it by pip install 'ecanet\[hub\]'"):
        read_file(path)


def test_a_changed_bit_is_noticed_wherever_it_is(tmp_path):
    """PyTorch's reader ignores the checksums of the zip file, and would give other weights."""
    state = {**WEIGHTS, "step": 7, "table": torch.arange(3000)}
    torch.save(state, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for place in random.integers(0, len(whole), 150).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            found = read_file(tmp_path / "damaged.pt")
        except CheckpointError:
            refused += 1
        else:  # a bit that fills a gap between two parts of the file
            assert found.keys() == state.keys()
            assert all(np.array_equal(found[name], value) for name, value in state.items())
    assert refused > 100


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_file(tmp_path / "file.pt")["fc.weight"], WEIGHTS["fc.weight"])
