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
from typing import Any, cast

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ecanet.ops.triton import algebra, algebra_grads, expansion, predicted_gates
from ecanet.ops.triton.coefficients import WARPS, GateKind, NormKind
from ecanet.ops.triton.node import TailKind, prepare_tail
from ecanet.ops.triton.tiles import Grid, Launch, find_grid

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLACES = ("a_at", "b_at", "sa_at")
SIZES = ("channels", "positions", "part", "parts", "row", "norm_row", "samples", "rows", "inner", *PLACES)
"""Arguments that are 32-bit integers."""

SHAPES = {
    "tail": ((256, 56), (512, 28), (1024, 14), (2048, 7)),
    "side": ((256, 56), (512, 28), (1024, 14), (2048, 7)),
    "inner": ((64, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7)),
}
"""Channels and side of all planes of ResNet-50 at 224 pixels, by what stands after the norm."""


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
    sizes: dict[str, int] = field(default_factory=dict)
    """Values of `SIZES`; those that are not named are multiples of 16."""

    def find_odd_sizes(self) -> tuple[str, ...]:
        """Return the sizes that are no multiples of 16, for which the compiler makes other code."""
        return tuple(name for name, value in self.sizes.items() if value % 16)

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
    """Yield every kernel as ResNet-50 runs it in bfloat16."""
    for channels_last in (True, False):
        yield from list_passes("bf16", channels_last)
    yield from list_algebra()
    yield from list_expansions("bf16")
    yield from list_predicted_gates("bf16")


def list_passes(dtype: str, channels_last: bool) -> list[Kernel]:
    """Return the passes over `SHAPES` at batch 256.

    A kernel that several shapes share is listed once.
    """
    found: dict[object, Kernel] = {}
    for role, shapes in SHAPES.items():
        for channels, side in shapes:
            layout = torch.channels_last if channels_last else torch.contiguous_format
            z = torch.empty(256, channels, side, side, dtype=DTYPES[dtype], device="meta").contiguous(
                memory_format=layout
            )
            for kernel in describe_passes(role, find_grid(z), dtype, channels_last):
                key = kernel.name, str(kernel.constants), tuple(kernel.tensors), kernel.find_odd_sizes()
                kernel = found.setdefault(key, kernel)
                names = cast("list[str]", kernel.extra.setdefault("shapes", []))
                names += [f"{channels}x{side}x{side}"] if f"{channels}x{side}x{side}" not in names else []
    return list(found.values())


def describe_passes(role: str, grid: Grid, dtype: str, channels_last: bool) -> Iterator[Kernel]:
    """Yield the passes of one norm of ResNet-50, as `ops.triton.node` launches them."""
    norm = NormKind(1e-5, 0.1, True, True, False, (*(torch.float32,) * 4, torch.int64))
    gate = None if role == "inner" else GateKind(1.0, 5, False, False, (torch.float32, None))
    side, has_shortcut = norm if role == "side" else None, role != "inner"
    run = prepare_tail(grid, TailKind(norm, side, gate, "relu", has_shortcut))
    f = "fp32"
    affine = {"a": f, "b": f, "mu": f}
    shortcut = {"s": dtype, "bits": "u8"} if has_shortcut else {}
    normed = {"sa": f, "smu": f} if side else {}
    written = {"second_dy": dtype, "bits": "u8", "t": dtype} if has_shortcut else {}
    passes: list[tuple[Launch | None, dict[str, str]]] = [
        (run.norm.moments, {"z": dtype, "out": f}),
        (run.apply, {"z": dtype, "y": dtype, **affine, **shortcut, **normed}),
        (
            run.reduce[has_shortcut],
            {"dy": dtype, "z": dtype, **affine, **written, "sums": f, **({"s": dtype, "smu": f} if side else {})},
        ),
        (run.norm.grads, {"t": dtype, "z": dtype, "dz": dtype, **affine, "dm": f, "dv": f}),
    ]
    for launch, tensors in passes:
        assert launch is not None
        names = launch.kernel.arg_names[-len(launch.others) :]
        yield Kernel(
            name=launch.kernel.__name__,
            function=launch.kernel,
            dtype=dtype,
            channels_last=channels_last,
            tensors=tensors,
            constants={name: value for name, value in zip(names, launch.others, strict=True) if name not in SIZES},
            sizes={name: value for name, value in zip(names, launch.others, strict=True) if name in SIZES},
            options={"num_warps": launch.warps},
            extra={"role": role},
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
    """Yield the last convolutions of ResNet-50's stages at batch 256, and of its last stage at a small batch."""
    for rows, inner, positions in ((802816, 64, 3136), (200704, 128, 784), (12544, 512, 49), (392, 512, 49)):
        tiles = expansion.choose_tiles(rows, inner, 4 * inner, DTYPES[dtype])
        sizes = {"BLOCK_R": tiles.rows, "BLOCK_C": tiles.channels, "BLOCK_K": tiles.inner}
        within = positions >= tiles.rows
        flags = {"BIAS": True, "GATE": True, "SHORTCUT": True, "OFFSET": True, "ACTIVATION": 1, "WITHIN": within}
        yield Kernel(
            name=f"_expand {tiles.rows}x{tiles.channels}x{tiles.inner}",
            function=expansion._expand,
            dtype=dtype,
            channels_last=True,
            tensors={"h": dtype, "w": dtype, "b": dtype, "g": "fp32", "s": dtype, "o": dtype, "y": dtype},
            constants={**flags, "FAR": False, "WIDEN": False, **sizes},
            options={"num_warps": tiles.warps, "num_stages": 3},
            extra={"inputs": inner, "rows": rows, "gate": "two samples a tile" if within else "gathered"},
        )


def list_predicted_gates(dtype: str) -> Iterator[Kernel]:
    """Yield the gates of ResNet-50's first and last stage, at batch 256 and at a small one."""
    for inner, taps in ((64, 5), (512, 7)):
        for samples in (16, 64):
            yield Kernel(
                name=f"_predict_gate {samples}x{predicted_gates.WIDTH}",
                function=predicted_gates._predict_gate,
                dtype=dtype,
                channels_last=True,
                tensors={"m": "fp32", "w": dtype, "b": dtype, "taps": dtype, "g": "fp32"},
                constants={
                    "GAIN": 2.0, "TAPS": taps, "EACH": False, "CIRCULAR": False,
                    "BLOCK_N": samples, "WIDTH": predicted_gates.WIDTH, "BLOCK_K": predicted_gates.DEPTH,
                },
                options={"num_warps": 4, "num_stages": 3},
                extra={"inputs": inner},
            )  # fmt: skip


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
    odd = kernel.find_odd_sizes()
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in odd
    }
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
        "blocks": count_blocks(usage["REG"], compiled.metadata.shared, compiled.metadata.num_warps),
        "memory": read_widths(compiled.asm["cubin"]),
        **kernel.extra,
    }


def count_blocks(registers: int, shared: int, warps: int) -> int:
    """Return how many programs a processor of an H100 or H200 runs at once.

    It has 65,536 registers, given out in eights for each thread, 64 warps, and 228 KiB of shared memory, of which the
    system takes one for each program.
    """
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(32, 64 // warps, by_registers, 228 * 1024 // (shared + 1024))


def read_widths(cubin: bytes) -> dict[str, int]:
    """Return the instructions that read and write global memory, with the bytes of each: ``{"load 16": 4, ...}``."""
    kinds = {"LDG": "load", "LDGSTS": "load", "STG": "store"}
    found: dict[str, int] = {}
    for kind, rest in re.findall(r"\s(LDG|LDGSTS|STG)\.([A-Z0-9.]+)", run_tool("-sass", cubin)):
        parts = rest.split(".")
        width = 16 if "128" in parts else 8 if "64" in parts else 2 if {"U16", "S16"} & {*parts} else 4
        width = 1 if {"U8", "S8"} & {*parts} else width
        found[f"{kinds[kind]} {width}"] = found.get(f"{kinds[kind]} {width}", 0) + 1
    return dict(sorted(found.items()))


def run_tool(option: str, cubin: bytes) -> str:
    """Return what NVIDIA's cuobjdump prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def read_usage(cubin: bytes) -> dict[str, int]:
    """Return registers, stack, and shared and local memory of a compiled kernel."""
    log = run_tool("-res-usage", cubin)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", log)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
