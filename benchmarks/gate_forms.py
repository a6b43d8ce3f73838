"""Time MobileNetV2 with every form of ECA's gate in ONNX Runtime and OpenVINO, beside no gates and the least gates.

"pool and multiply" is a network whose gates are ``x * sigmoid(mean(x))``: what it costs above the plain network is what
no form can save. All files of one runtime take turns, with one thread; the time is the processor's.

    OMP_NUM_THREADS=1 python benchmarks/gate_forms.py --batch 1 --rounds 250

It needs `pip install 'ecanet[export,openvino]'`, and on one idle core about five minutes.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

import ecanet
from ecanet.deploy import FORMS, TARGETS, forms, preparation
from ecanet.deploy.about import About

POOL = "pool and multiply"


def main() -> None:
    """Print a table of times for each runtime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=250)
    parser.add_argument("--targets", nargs="+", default=["onnx", "openvino"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(options.batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    for target in options.targets:
        with tempfile.TemporaryDirectory() as folder:
            arms = ("plain", POOL, *FORMS)
            sessions = {arm: open_arm(arm, target, x, Path(folder) / f"{i}") for i, arm in enumerate(arms)}
            times: dict[str, list[float]] = {arm: [] for arm in sessions}
            for index in range(options.rounds + 1):
                shift = index % len(arms)
                for arm in arms[shift:] + arms[:shift]:
                    begun = time.process_time()
                    sessions[arm].run([x])
                    if index:  # the first round warms up
                        times[arm].append(time.process_time() - begun)
        for arm, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, times["plain"], strict=True))
            minima = min(seconds) / min(times["plain"])
            print(
                f"{target:10}{arm:20}{1e3 * min(seconds):8.2f} ms  minima {minima:.3f}  median {ratio:.3f}", flush=True
            )


def open_arm(arm: str, target: str, x: torch.Tensor, path: Path):
    """Write the network with gates of the form ``arm``, and return it opened in the runtime."""
    torch.manual_seed(0)
    network = ecanet.create_model("mobilenet_v2", attention="none" if arm == "plain" else "eca").eval()
    form = arm if arm in FORMS else "conv2d"
    known = forms.FORMS[form]
    if arm == POOL:
        forms.FORMS[form] = lambda gate, channels: torch.nn.Identity()
    prepared = preparation.prepare(network, form, early=TARGETS[target].early).network
    forms.FORMS[form] = known
    path = path.with_suffix(TARGETS[target].suffix)
    TARGETS[target].write(prepared, [x], About(), path)
    return TARGETS[target].open(path)


if __name__ == "__main__":
    main()
