"""Compile every kernel ahead of time for compute capability 9.0, and write registers, spills and shared memory.

    python benchmarks/compile_kernels.py benchmarks/results/kernels-sm90.json

It needs Triton and no GPU.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ecanet.ops.triton import algebra, algebra_grads, expansion
from ecanet.ops.triton import kernels as K
from ecanet.ops.triton.coefficients import WARPS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLACES = ("a_at", "b_at", "sa_at")
SIZES = ("channels", "positions", "part", "parts", "row", "norm_row", "samples", "rows", "inner", *PLACES)
"""Arguments that are 32-bit integers."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel with the types of its arguments, as it is compiled."""

    name: str
    function: Any
    dtype: str
    channels_last: bool
    tensors: dict[str, str]
    """Element type of each tensor argument, by its name without ``_ptr``. Other pointers are None."""
    constants: dict[str, object]
    options: dict[str, int] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)
    """Further entries of the row in the report."""

    def find_unknown_names(self) -> set[str]:
        """Return the names of tensors and constants that the kernel does not have."""
        arguments = set(self.function.arg_names)
        return {f"{name}_ptr" for name in self.tensors} - arguments | set(self.constants) - arguments


def main(out: Path) -> None:
    rows = [compile_kernel(kernel) for kernel in list_kernels()]
    report = {
        "target": "compute capability 9.0, compiled ahead of time, not run",
        "triton": triton.__version__,
        "torch": torch.__version__,
        "kernels": rows,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(*row.values())


def list_kernels() -> Iterator[Kernel]:
    """Yield every kernel in each dtype and layout."""
    for dtype in DTYPES:
        for channels_last in (True, False):
            yield from list_passes(dtype, channels_last)
    yield from list_algebra()
    for dtype in DTYPES:
        yield from list_expansions(dtype)


def list_passes(dtype: str, channels_last: bool) -> Iterator[Kernel]:
    """Yield the four passes of a residual tail with a gate, in the form that training uses inside a stage."""
    f = "fp32"
    blocks = {"BLOCK_P": 32, "BLOCK_C": 64} if channels_last else {"BLOCK_P": 256, "BLOCK_C": 8}
    grid = {"LAST": channels_last, **blocks, "WIDE": tl.float32}
    affine = {"a": f, "b": f, "mu": f}
    given = {"HAS_B": True, "HAS_MU": True}
    common: dict[str, Any] = {"dtype": dtype, "channels_last": channels_last}
    yield Kernel(
        name="_moments",
        function=K._moments,
        tensors={"z": dtype, "out": f},
        constants={"ORDER": 2, **grid},
        **common,
    )
    yield Kernel(
        name="_apply",
        function=K._apply,
        tensors={"z": dtype, "s": dtype, "y": dtype, "bits": "u8", **affine},
        constants={**given, "SHORTCUT": 1, "ACTIVATION": 1, "BITS": True, **grid},
        **common,
    )
    flags = {"NORMED_SHORTCUT": False, "ACTIVATION": 1, "SECOND_DY": True, "BITS": True, "WRITE": True}
    tensors = {"dy": dtype, "second_dy": dtype, "bits": "u8", "z": dtype, "t": dtype}
    yield Kernel(
        name="_reduce",
        function=K._reduce,
        tensors={**tensors, **affine, "sums": f},
        constants={**given, **flags, **grid},
        **common,
    )
    yield Kernel(
        name="_grads",
        function=K._grads,
        tensors={"t": dtype, "z": dtype, "dz": dtype, **affine, "m": f, "dm": f, "dv": f},
        constants={**given, "HAS_DM": True, "HAS_DV": True, "ACTIVATION": 0, **grid},
        **common,
    )


def list_algebra() -> Iterator[Kernel]:
    """Yield the kernels between the passes, for a batch of 256: without a gate, with ECA, and of synchronised norms."""
    for gated, synchronised in ((False, False), (True, False), (True, True)):
        blocks = {"BLOCK_N": 64, "WIDTH": 32} if gated else {"BLOCK_N": 256, "WIDTH": 16}
        gate = {"GATED": gated, "GAIN": 1.0, "TAPS": 5 if gated else 1, "EACH": False, "CIRCULAR": False}
        totals = {"totals": "fp64"} if synchronised else {}
        common: dict[str, Any] = {
            "dtype": "fp32",
            "channels_last": True,
            "options": {"num_warps": WARPS},
            "extra": {"gate": "5 taps" if gated else "none", "synchronised": synchronised},
        }
        names = ("moments", "weight", "bias", "mean", "variance", "channel", *(("taps", "plane") if gated else ()))
        flags = {"EPS": 1e-5, "MOMENTUM": 0.1, "BATCH": True, "UPDATE": True}
        yield Kernel(
            name="_coefficients",
            function=algebra._coefficients,
            tensors={**dict.fromkeys(names, "fp32"), "tracked": "i64", **totals},
            constants={**flags, **gate, **blocks, "WIDE": tl.float32},
            **common,
        )
        names = ("sums", "channel", "dweight", "dbias", "dmean", "dvariance")
        names = (*names, *(("plane", "taps", "dtaps") if gated else ()))
        yield Kernel(
            name="_coefficient_grads",
            function=algebra_grads._coefficient_grads,
            tensors={**dict.fromkeys(names, "fp32"), **totals, **{f"d{name}": kind for name, kind in totals.items()}},
            constants={"KIND": 0, "BATCH": True, **gate, "COLUMNS": 8, **blocks, "WIDE": tl.float32},
            **common,
        )
    yield Kernel(
        name="_totals",
        function=algebra._totals,
        tensors={"moments": "fp32", "totals": "fp64"},
        constants={"BLOCK_N": 256, "WIDTH": 16, "WIDE": tl.float32},
        **common,
    )
    yield Kernel(
        name="_finish",
        function=algebra_grads._finish,
        tensors={"dtotals": "fp64", "channel": "fp32", "dmean": "fp32", "dvariance": "fp32"},
        constants={"GATED": True, "BLOCK_N": 256, "WIDTH": 16, "WIDE": tl.float32},
        **common,
    )


def list_expansions(dtype: str) -> Iterator[Kernel]:
    """Yield a large network's last convolution with many rows, and with the few of a last stage at a small batch."""
    for rows, within in ((1 << 20, True), (392, False)):
        tiles = expansion.choose_tiles(rows, 512, 2048, DTYPES[dtype])
        sizes = {"BLOCK_R": tiles.rows, "BLOCK_C": tiles.channels, "BLOCK_K": tiles.inner}
        flags = {"BIAS": True, "GATE": True, "SHORTCUT": True, "ACTIVATION": 1, "WITHIN": within, "WIDEN": False}
        yield Kernel(
            name=f"_expand {tiles.rows}x{tiles.channels}x{tiles.inner}",
            function=expansion._expand,
            dtype=dtype,
            channels_last=True,
            tensors={"h": dtype, "w": dtype, "b": dtype, "g": "fp32", "s": dtype, "y": dtype},
            constants={**flags, **sizes},
            options={"num_warps": tiles.warps, "num_stages": 3},
            extra={"warps": tiles.warps, "gate": "two samples a tile" if within else "gathered"},
        )


def compile_kernel(kernel: Kernel) -> dict[str, object]:
    """Compile ``kernel`` and return its row of the report."""
    if unknown := kernel.find_unknown_names():
        raise SystemExit(f"{kernel.name} has no argument {', '.join(sorted(unknown))}; correct this script")
    signature: dict[str, str] = {}
    constants: dict[tuple[int], object] = {}
    for position, name in enumerate(kernel.function.arg_names):
        if name in SIZES:
            signature[name] = "i32"
        elif name.removesuffix("_ptr") in kernel.tensors:
            signature[name] = "*" + kernel.tensors[name.removesuffix("_ptr")]
        else:
            signature[name] = "constexpr"
            constants[(position,)] = kernel.constants.get(name)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(kernel.function, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernel.options)
    usage = read_usage(compiled.asm["cubin"])
    return {
        "kernel": kernel.name,
        "dtype": kernel.dtype,
        "layout": "channels_last" if kernel.channels_last else "contiguous",
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "local_bytes": usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        **kernel.extra,
    }


def read_usage(cubin: bytes) -> dict[str, int]:
    """Return the numbers that NVIDIA's cuobjdump prints for a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        log = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", log)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
