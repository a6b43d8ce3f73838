"""A proof that has passed on a machine is not repeated by the next process; nothing but a right record counts."""

import os
from pathlib import Path

import pytest
import torch

from ecanet.ops import proof, proof_records

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a description of a GPU that tests may change, with an empty cache folder."""
    gpu = ["H200", 9, 0, 13020, "13.2"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proof_records, "describe_gpu", lambda device: list(gpu) if device.type == "cuda" else None)
    monkeypatch.setattr(proof, "is_capturing", lambda device: False)
    return gpu


@pytest.fixture
def tried(monkeypatch):
    """Return the list of proofs that ran; each passes at once."""
    tried = []
    monkeypatch.setattr(proof, "find_failure", lambda *key: tried.append(key))
    return tried


def ask(monkeypatch, *key):
    """Ask as the first network of a new process does."""
    monkeypatch.setattr(proof, "_passed", {})
    return proof.is_proven(*key)


def list_records(folder):
    return sorted((folder / "ecanet" / "proofs").iterdir())


def test_the_next_process_repeats_no_proof(machine, tried, monkeypatch, tmp_path):
    assert ask(monkeypatch, GPU, torch.bfloat16)
    assert ask(monkeypatch, GPU, torch.bfloat16)
    assert tried == [(GPU, torch.bfloat16)]
    assert [path.suffix for path in list_records(tmp_path)] == [".json"]  # no temporary file remains


def change_source(monkeypatch, machine):
    monkeypatch.setattr(proof_records, "hash_source", lambda: "another")


def change_torch(monkeypatch, machine):
    monkeypatch.setattr(torch, "__version__", "9.9")


def change_triton(monkeypatch, machine):
    monkeypatch.setattr(proof_records, "version", lambda name: "9.9")


CHANGES = {
    "device": lambda monkeypatch, machine: machine.__setitem__(0, "H100"),
    "driver": lambda monkeypatch, machine: machine.__setitem__(3, 12080),
    "source": change_source,
    "torch": change_torch,
    "triton": change_triton,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_asks_for_a_new_proof(change, machine, tried, monkeypatch):
    assert ask(monkeypatch, GPU, torch.bfloat16)
    change(monkeypatch, machine)
    assert ask(monkeypatch, GPU, torch.bfloat16)
    assert len(tried) == 2


def test_dtypes_and_kernels_have_records_of_their_own(machine, tried, monkeypatch):
    keys = [(GPU, torch.bfloat16), (GPU, torch.float16), (GPU, torch.bfloat16, "operators")]
    for key in keys:
        assert ask(monkeypatch, *key)
    assert len(tried) == 3


@pytest.mark.parametrize("content", [b"", b"{", None], ids=["empty", "cut", "longer"])
def test_a_damaged_record_counts_as_none(content, machine, tried, monkeypatch, tmp_path):
    ask(monkeypatch, GPU, torch.float32)
    (path,) = list_records(tmp_path)
    path.write_bytes(path.read_bytes() + b" " if content is None else content)
    assert ask(monkeypatch, GPU, torch.float32)
    assert len(tried) == 2
    assert ask(monkeypatch, GPU, torch.float32)  # it was written again
    assert len(tried) == 2


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
def test_a_strangers_record_counts_as_none(machine, tried, monkeypatch):
    ask(monkeypatch, GPU, torch.float32)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    ask(monkeypatch, GPU, torch.float32)
    assert len(tried) == 2


def test_a_failure_is_not_recorded(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(proof, "find_failure", lambda *key: "wrong")
    for _ in range(2):
        with pytest.warns(UserWarning, match="wrong"):
            assert not ask(monkeypatch, GPU, torch.float32)
    assert not (tmp_path / "ecanet").exists()


def test_a_folder_that_cannot_be_written_is_no_error(machine, tried, monkeypatch, tmp_path):
    (tmp_path / "ecanet").write_text("a file is in the way")
    assert ask(monkeypatch, GPU, torch.float32)
    assert ask(monkeypatch, GPU, torch.float32)
    assert len(tried) == 2


def test_a_user_without_a_home_repeats_the_proof(machine, tried, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)
    for _ in range(2):
        assert ask(monkeypatch, GPU, torch.float32)
    assert len(tried) == 2


def test_the_interpreter_leaves_no_record(machine, tried, monkeypatch, tmp_path):
    assert ask(monkeypatch, torch.device("cpu"), torch.float32)
    assert not (tmp_path / "ecanet").exists()
