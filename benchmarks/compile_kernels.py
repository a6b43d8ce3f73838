"""Compile every kernel ahead of time for compute capability 9.0 and write registers, spills and shared memory."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ecanet.ops.triton import expansion
from ecanet.ops.triton import kernels as K

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build(name, fn, tensors, consts, last, kind, **options):
    sig, const = {}, {}
    for arg in fn.arg_names:
        if arg in consts:
            sig[arg] = "constexpr"
            const[(fn.arg_names.index(arg),)] = consts[arg]
        elif arg in ("channels", "positions", "part", "rows", "inner"):
            sig[arg] = "i32"
        elif arg.removesuffix("_ptr") in tensors:
            sig[arg] = "*" + tensors[arg.removesuffix("_ptr")]
        else:
            sig[arg] = "constexpr"
            const[(fn.arg_names.index(arg),)] = None
    attrs = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(fn.arg_names) if sig[a] != "constexpr"}
    out = triton.compile(ASTSource(fn, sig, const, attrs), target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(out.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        log = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", log)}
    return {
        "kernel": name,
        "dtype": kind,
        "layout": "channels_last" if last else "contiguous",
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "local_bytes": usage["LOCAL"],
        "shared_bytes": out.metadata.shared,
    }


rows = []
for kind in ("bf16", "fp16", "fp32"):
    for last in (True, False):
        g = {"LAST": last, "BLOCK_P": 32 if last else 256, "BLOCK_C": 64 if last else 8, "WIDE": tl.float32}
        f = "fp32"
        rows.append(build("_moments", K._moments, {"z": kind, "mean": f, "variance": f}, {"ORDER": 2, **g}, last, kind))
        rows.append(
            build(
                "_apply",
                K._apply,
                {"z": kind, "s": kind, "y": kind, "bits": "u8", "a": f, "b": f, "mu": f},
                {"HAS_B": True, "HAS_MU": True, "SHORTCUT": 1, "ACTIVATION": 1, "BITS": True, **g},
                last,
                kind,
            )
        )
        rows.append(
            build(
                "_reduce",
                K._reduce,
                {
                    "dy": kind,
                    "more": kind,
                    "bits": "u8",
                    "z": kind,
                    "t": kind,
                    "a": f,
                    "b": f,
                    "mu": f,
                    "da": f,
                    "db": f,
                    "ds": f,
                },
                {
                    "HAS_B": True,
                    "HAS_MU": True,
                    "NORMED_SHORTCUT": False,
                    "ACTIVATION": 1,
                    "MORE": True,
                    "BITS": True,
                    "WRITE": True,
                    **g,
                },
                last,
                kind,
            )
        )
        rows.append(
            build(
                "_grads",
                K._grads,
                {"t": kind, "z": kind, "dz": kind, "a": f, "b": f, "mu": f, "m": f, "dm": f, "dv": f},
                {"HAS_B": True, "HAS_MU": True, "HAS_DM": True, "HAS_DV": True, "ACTIVATION": 0, **g},
                last,
                kind,
            )
        )
# a large network's last convolutions: many rows, and the few of a last stage at a small batch
for kind, dtype in DTYPES.items():
    for many, within in ((1 << 20, True), (392, False)):
        block = expansion.tiles(many, 512, 2048, dtype)
        tensors = {"h": kind, "w": kind, "b": kind, "g": "fp32", "s": kind, "y": kind}
        sizes = {"BLOCK_R": block.rows, "BLOCK_C": block.channels, "BLOCK_K": block.inner}
        consts = {"BIAS": True, "GATE": True, "SHORTCUT": True, "ACTIVATION": 1, "WITHIN": within, "WIDEN": False}
        name = f"_expand {block.rows}x{block.channels}x{block.inner}"
        row = build(name, expansion._expand, tensors, consts | sizes, True, kind, num_warps=block.warps, num_stages=3)
        rows.append(row | {"warps": block.warps, "gate": "two samples a tile" if within else "gathered"})
report = {
    "target": "compute capability 9.0, compiled ahead of time, not run",
    "triton": triton.__version__,
    "torch": torch.__version__,
    "kernels": rows,
}
Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n")
for r in rows:
    print(*r.values())
