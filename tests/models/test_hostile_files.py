"""Files that were made to harm: refused in two seconds and little memory, whatever is in them; nothing runs code."""

import ast
import contextlib
import json
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch

import ecanet
from bounds import bounded
from ecanet.errors import CheckpointError
from ecanet.models import pickles, read_file

ROOT = Path(__file__).resolve().parents[2]
HALF_MEGABYTE = pickles.MOST_STEPS


def write(path: Path, pickled: bytes, *, zipped: bool) -> None:
    if not zipped:
        path.write_bytes(pickled)
        return
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)


def nest(depth: int) -> bytes:
    """Return a dictionary whose key is a tuple in a tuple in a tuple; some take the way through the memo."""
    return (
        b"\x80\x02}N" + b"\x85" * (depth // 2) + b"q\x01N\x86q\x02h\x01h\x02\x86" + b"\x85" * (depth // 2) + b"K\x01s."
    )


PICKLES = {
    "a deep key": (nest(2_000_000), "holds tuples nested more than 500 times"),
    "a deep key with marks": (
        b"\x80\x02}" + b"(" * 200_000 + b"N" + b"t" * 200_000 + b"K\x01s.",
        "nested more than 500",
    ),
    "many steps": (b"\x80\x02}" + b"N" * 3 * HALF_MEGABYTE + b".", "plain values"),
    "many sets": (b"\x80\x02}" + b"\x8f" * 3 * HALF_MEGABYTE + b".", "plain values"),
    "as many sets as are allowed": (b"\x80\x02}" + b"\x8f" * (HALF_MEGABYTE - 99) + b".", "no state dict"),
    "a list in itself": (b"\x80\x02}X\x01\x00\x00\x00a]q\x00h\x00as.", "no state dict"),
    "lists that double": (
        b"\x80\x02}X\x01\x00\x00\x00a]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(90)) + b"0s.",
        "not of the kind that torch.save writes|is truncated",
    ),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * ("as many" in kind)) for kind in PICKLES]
)
def test_pickles_that_take_all_time_or_end_the_process(kind, zipped, tmp_path):
    pickled, says = PICKLES[kind]
    if not zipped:  # after PyTorch's magic number, its version and the machine
        pickled = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}." + pickled
    write(tmp_path / "file.pt", pickled, zipped=zipped)
    says = f"{says}|is truncated" if "state dict" in says else says
    with bounded(2, 2**28), pytest.raises(CheckpointError, match=says) as caught:
        ecanet.load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "file.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_large_honest_files_are_read(tmp_path, zipped):
    """Thousands of tensors and nested tuples of settings; a tensor whose storage others share."""
    shared = torch.arange(100.0)
    content = {f"layer{i}.weight": torch.tensor([float(i)]) for i in range(2000)}
    settings = {"betas": ((0.9, (0.99, ("a", ("b",)))), 3), ("a", 1): {"steps": list(range(20_000))}}
    torch.save({"state_dict": {**content, "a": shared, "b": shared[:50]}, "settings": settings}, tmp_path / "file.pt")
    found = read_file(tmp_path / "file.pt")
    assert found["settings"] == settings
    assert found["state_dict"]["layer1999.weight"] == 1999


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_repeats_one_number_is_no_weight(tmp_path, zipped):
    torch.save({"weight": torch.zeros(1).expand(2**33)}, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    with bounded(2, 2**25), pytest.raises(CheckpointError, match="tensors of 34,359,738,368 bytes, more than 8 times"):
        read_file(tmp_path / "file.pt")


def header(entries: object, length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def tensor(shape: list[int], *offsets: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


SAFETENSORS = {
    "a header of 2^63 bytes": header({}, 2**63),
    "a header longer than the file": header({}, 10**6),
    "numbers outside the file": header({"a": tensor([2**40], 0, 2**42)}) + bytes(64),
    "a shape beyond all numbers": header({"a": tensor([2**62, 2**62], 0, 64)}) + bytes(64),
    "tensors on top of each other": header({"a": tensor([16], 0, 64), "b": tensor([16], 0, 64)}) + bytes(64),
    "offsets backwards": header({"a": tensor([16], 64, 0)}) + bytes(64),
    "a gap": header({"a": tensor([8], 32, 64)}) + bytes(64),
    "another shape": header({"a": tensor([4], 0, 64)}) + bytes(64),
    "no JSON": header(b"{" * 5000),
    "deep JSON": header(b'{"a":' + b"[" * 10**6) + bytes(64),
    "equal names": header(b'{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},"a":3}') + bytes(64),
    "deep description": header({"__metadata__": {"ecanet": "[" * 10**5}, "a": tensor([16], 0, 64)}) + bytes(64),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors_with_impossible_headers(kind, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "file.safetensors"
    path.write_bytes(SAFETENSORS[kind])
    with bounded(2, 2**25), pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../owned", "/tmp/owned", "archive/../../owned"])
def test_members_of_an_archive_stay_in_it(tmp_path, name):
    torch.save({"weight": torch.ones(2)}, tmp_path / "file.pt")
    with zipfile.ZipFile(tmp_path / "file.pt", "a") as archive:
        archive.writestr(name, b"owned")
    before = sorted(tmp_path.parent.rglob("*"))
    with contextlib.suppress(CheckpointError):
        read_file(tmp_path / "file.pt")
    assert sorted(tmp_path.parent.rglob("*")) == before
    assert not Path("/tmp/owned").exists()


def calls(source: str) -> list[tuple[str, dict[str, object], int]]:
    """Return each call in ``source``: the last two parts of its name, its constant keywords, and its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            keywords = {k.arg or "**": getattr(k.value, "value", None) for k in node.keywords}
            found.append((".".join(ast.unparse(node.func).split(".")[-2:]), keywords, node.lineno))
    return found


RUNS_CODE = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "joblib.load", "yaml.load",
    "yaml.unsafe_load", "eval", "archive.extractall", "tar.extractall", "members.extractall", "wheel.extractall",
    "os.system", "jit.load", "dill.load", "cloudpickle.load",
}  # fmt: skip


WRITTEN_HERE = {("torch_files.py", "jit.load")}
"""Calls that read a file which the same process has just written, to check it."""


@pytest.mark.parametrize("folder", ["src", "benchmarks", "examples"])
def test_nothing_reads_files_that_could_run_code(folder):
    """Weights are read with ``weights_only``, arrays without objects."""
    problems = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name, keywords, line in calls(path.read_text()):
            unsafe = name in RUNS_CODE
            unsafe |= name == "torch.load" and keywords.get("weights_only") is not True
            unsafe |= name in ("np.load", "numpy.load") and keywords.get("allow_pickle", False) is not False
            unsafe |= keywords.get("shell") is True
            unsafe &= (path.name, name) not in WRITTEN_HERE
            problems += [f"{path.name}:{line}: {name}"] if unsafe else []
    assert not problems


@pytest.mark.parametrize(("depth", "fits"), [(400, True), (499, True), (502, False)])
@pytest.mark.parametrize("way", ["one by one", "memo", "pairs"])
def test_the_depth_of_tuples(tmp_path, depth, fits, way):
    half = depth // 2
    inner, more = b"N" + b"\x85" * half, b"\x85" * (depth - half)
    way_there = {"one by one": inner, "memo": inner + b"q\x07Nh\x07\x86\x85"[:-1], "pairs": inner + b"N\x86"}[way]
    write(tmp_path / "file.pt", b"\x80\x02}" + way_there + more + b"K\x01s.", zipped=True)
    if fits:
        with contextlib.suppress(CheckpointError):
            read_file(tmp_path / "file.pt")
        assert pickles.Walk().go(b"\x80\x02}" + way_there + more + b"K\x01s.", 0, 9999) == 5 + len(way_there + more) + 2
        return
    with pytest.raises(CheckpointError, match="nested more than 500 times"):
        read_file(tmp_path / "file.pt")
