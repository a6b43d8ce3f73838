"""Check and time this library on a GPU machine, in one command of about eight minutes.

    python benchmarks/gpu.py OUT.json               # on a machine with a CUDA GPU
    python benchmarks/gpu.py OUT.json --rehearse    # small forms of every part on a CPU, in under a minute

It needs PyTorch, Triton and this repository. Networks of timm and torchvision are compared where these are installed.
The JSON file is written again after each part, so an interrupted run keeps what it has measured. A part that would
begin too late for the time limit is skipped, and the file says so.

Read downward, in gpu_parts/: `record` (the JSON file, the time limit), `checks` (are the kernels right?),
`training_steps`, `inference_forms`, `kernels` (each kernel alone), `variants` (which networks), `timing` (how a step is
timed), `setting` (the sizes).
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu_parts"))
if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import checks
import inference_forms
import kernels
import torch
import training_steps
import variants
from record import Record, describe_machine
from setting import GPU, REHEARSAL, Setting

PARTS: dict[str, tuple[int, Callable[[Setting], object]]] = {
    "ceilings": (10, checks.measure_ceilings),
    "proof": (30, checks.prove_kernels),
    "first-steps": (20, checks.compare_first_steps),
    "training": (60, training_steps.time_eager),
    "training-small-batch": (20, training_steps.time_small_batch),
    "training-graph": (30, training_steps.time_graphs),
    "inference": (40, inference_forms.time_forms),
    "profile": (20, kernels.profile_training),
    "passes": (20, kernels.time_passes),
    "training-compiled": (110, training_steps.time_compiled),
}
"""Each part's name, the seconds that must be left to begin it, and the function that returns its figures."""


def main() -> int:
    """Run the parts and return the exit code: 1 if a part failed, 2 if the command cannot run here."""
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file for the figures")
    parser.add_argument("--rehearse", action="store_true", help="run small forms of all parts on the CPU")
    parser.add_argument("--seconds", type=float, default=480, help="time limit of the whole run (default: 480)")
    parser.add_argument("--parts", help="comma-separated names of the parts to run (default: all)")
    options = parser.parse_args()
    chosen = [name.strip() for name in options.parts.split(",")] if options.parts else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --rehearse runs small forms of all parts on the CPU")
    setting = REHEARSAL if options.rehearse else GPU
    torch.backends.cudnn.benchmark = not options.rehearse
    record = Record(options.out, options.seconds, describe_machine(setting))
    record.note(variants.list_missing())
    setting = setting.with_trace(options.out)
    for name in chosen:
        least, part = PARTS[name]
        record.run(name, 0 if options.rehearse else least, lambda part=part: part(setting))
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
