"""A run over two machines: two network namespaces, each with its own network, and a cable between them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

TRAIN = ["-m", "ecanet", "train", "digits", "--model", "resnet8", "--epochs", "2", "--device", "cpu"]
ADDRESSES = {"one": "10.213.0.1", "two": "10.213.0.2"}


def call(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, timeout=20)


@pytest.fixture
def machines():
    """Yield the names of two network namespaces that reach each other and nothing else."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root, and ip of iproute2")
    names = {f"ecanet-{os.getpid()}-{end}": end for end in ADDRESSES}
    try:
        for name in names:
            call("ip", "netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    try:
        first, second = names
        call("ip", "link", "add", "one", "netns", first, "type", "veth", "peer", "name", "two", "netns", second)
        for name, end in names.items():
            call("ip", "-n", name, "addr", "add", f"{ADDRESSES[end]}/24", "dev", end)
            for device in ("lo", end):
                call("ip", "-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_two_machines_train_what_two_processes_of_one_machine_train(machines, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = []
    for rank, (name, end) in enumerate(machines.items()):
        place = ["--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1", f"--master-addr={ADDRESSES['one']}"]
        command = ["ip", "netns", "exec", name, *torchrun, *place, "--master-port=29555", *TRAIN]
        command += ["--out", str(tmp_path / "machines")]  # a folder that both machines see
        with (tmp_path / f"{end}.log").open("w") as log:
            running.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=environment | {"GLOO_SOCKET_IFNAME": end})
            )
    codes = [process.wait(timeout=300) for process in running]
    assert codes == [0, 0], [(tmp_path / f"{end}.log").read_text() for end in ADDRESSES]
    said = (tmp_path / "one.log").read_text()
    assert "64 images × 2 devices" in said
    assert said.count("epoch 2/2") == 1
    assert "epoch" not in (tmp_path / "two.log").read_text(), "one process speaks for all"
    command = [*torchrun, "--standalone", "--nproc-per-node=2", *TRAIN, "--out", str(tmp_path / "processes")]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    one, other = read_weights(tmp_path / "machines"), read_weights(tmp_path / "processes")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
