"""The benchmark: what it refuses, how it takes turns, what it divides by what, and what it writes down."""

import json
import re
import sys

import pytest
import torch
from torch import nn

from ecanet import ops
from ecanet.errors import ConfigError
from ecanet.ops import lean
from ecanet.studies import bench as front_door
from ecanet.studies.bench import check as bench_check
from ecanet.studies.bench import layers as bench_layers
from ecanet.studies.bench import measure
from ecanet.studies.bench import networks as bench_networks
from ecanet.studies.bench import pages as bench_pages
from ecanet.studies.bench import timing as bench
from ecanet.studies.bench.measure import Budget

TINY = {"model": "resnet18", "image_size": 64, "batch_sizes": (2,), "quick": True}
NETWORKS = ["ecanet plain", "ecanet eca", "timm eca", "timm se", "torchvision plain"]
TAILS = ["tail plain", "tail reference", "tail timm", "tail ecanet", "gate timm", "gate ecanet"]


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def result(lines):
    """A run of two rounds on small images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "QUICK", {phase: Budget(seconds=0, least=2) for phase in bench.QUICK})
        patch.setattr(measure, "COPIED", 2**16)
        return bench.run(**TINY, say=lines.append)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(measure, "clock", lambda device: self.now)

    def step(self, *seconds):
        """A step whose calls last ``seconds``, one after the other, the last for ever."""
        left = list(seconds)

        def step():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return step


# taking turns, and what is divided by what


def test_variants_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    clock, order = Clock(monkeypatch), []
    steps = {name: lambda name=name: order.append(name) for name in "ABC"}
    times = measure.interleaved(steps, Budget(seconds=0, least=3, most=3), device="cpu", title="")
    assert "".join(order) == "CABABCBCACAB"
    assert times == {name: [0.0] * 3 for name in "ABC"}
    cold = {"A": clock.step(50, 1), "B": clock.step(60, 2, 4, 3)}
    times = measure.interleaved(cold, Budget(seconds=0, least=3), device="cpu", title="")
    assert times == {"A": [1, 1, 1], "B": [2, 4, 3]}


@pytest.mark.parametrize(("seconds", "rounds"), [(10, 10), (10.9, 10), (1, 5), (1000, 20)])
def test_as_many_rounds_as_fit(monkeypatch, seconds, rounds):
    clock = Clock(monkeypatch)
    steps = {"A": clock.step(30, 0.25), "B": clock.step(30, 0.75)}
    times = measure.interleaved(steps, Budget(seconds=seconds, least=5, most=20), device="cpu", title="")
    assert [len(values) for values in times.values()] == [rounds, rounds]


def test_a_ratio_is_of_times_in_the_same_round():
    # the machine is three times slower in the second round and ten times in the third; A always takes half of B
    a, b = [1.0, 3.0, 10.0, 1.0], [2.0, 6.0, 20.0, 2.0]
    assert measure.ratio(a, b) == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert measure.ratio([1.0, 2.0, 6.0], [1.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert measure.spread([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0}
    rows = bench.ratios({"x": a, "y": b}, [("x", "y"), ("y", "x"), ("x", "z")], batch_size=4)
    assert [(r["first"], r["second"], r["median"], r["batch_size"]) for r in rows] == [
        ("x", "y", 0.5, 4),
        ("y", "x", 2.0, 4),
    ]


# what is counted


def two_ways(b):
    ways = ops.residual_tail_pair(b.z, b.norm, b.gate.weigh, b.shortcut)
    torch.autograd.grad(ways, [b.z, b.shortcut], (b.dy, b.shortcut.detach()))


def test_kernels_are_counted_by_their_tensors():
    """Ten and, twice, a bit for each element, as the interpreter counts load by load."""
    pytest.importorskip("triton")
    b = bench_layers.block((4, 16, 24, 24), "cpu", torch.float32)
    with ops.prefer_impl("fused"):
        assert measure.moved(bench_layers.steps(b)["tail ecanet"]) == pytest.approx((10 + 2 / 32) * b.z.nbytes / 1e6)
        assert measure.moved(bench_layers.steps(b)["gate ecanet"]) == pytest.approx(7 * b.z.nbytes / 1e6)


def test_the_end_of_a_block_moves_eleven_times_its_output():
    b = bench_layers.block((4, 16, 24, 24), "cpu", torch.float32)
    steps, size = bench_layers.steps(b), b.z.nbytes / 1e6
    # forward: z; z, shortcut, y. Backward: dy, y, z, t; t, z, dz
    assert measure.moved(steps["tail ecanet"]) == pytest.approx(11 * size)
    assert measure.moved(lambda: two_ways(b)) == pytest.approx(12 * size)  # one gradient more
    assert measure.moved(steps["gate ecanet"]) == pytest.approx((1 + 2 + 2 + 2) * size)
    assert measure.moved(steps["tail timm"]) > measure.moved(steps["tail plain"]) > 11 * size
    assert lean.moments.__module__ == "ecanet.ops.lean"  # as it was


def test_a_copy_reads_and_writes(monkeypatch):
    monkeypatch.setattr(measure, "COPIED", 1000)
    step, size = measure.copy("cpu")
    assert size == 2 * 4 * 1000
    assert float(step().sum()) == 1000


def test_memory_is_what_autograd_keeps():
    weight = torch.randn(1000, 500, requires_grad=True)
    x = torch.randn(2000, 1000)
    assert measure.memory(lambda: (x @ weight).sum(), "cpu") == pytest.approx(4 * 2000 * 1000 / 1e6)


def test_stages():
    with torch.device("meta"):
        network = bench_networks.models.create_model("resnet50")
    assert bench_networks.stages(network, 224) == [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert [side for _, side, _ in bench_networks.stages(network, 65)] == [17, 9, 5, 3]  # as strided layers round


# the gate


def forgetful(t, z, form, m, dm, dv, grads=lean.grads):
    return grads(t, z, form, m, None, dv)


def late(z, shortcut, form, apply=lean.apply):
    y, kept = apply(z, shortcut, form)
    return y * 1.0001, kept


@pytest.mark.parametrize(("name", "bug"), [("grads", forgetful), ("apply", late)])
def test_a_wrong_tail_is_refused(monkeypatch, name, bug):
    assert bench_check.check_layers([(32, 8, 8)], "cpu", fused=False)
    monkeypatch.setattr(lean, name, bug)
    message = r"(tail|gate) ecanet \(3, 17, 17, 19\) float32 is off by .*nothing was timed"
    with pytest.raises(ConfigError, match=message):
        bench_check.check_layers([(32, 8, 8)], "cpu", fused=False)


def test_nothing_is_timed_after_a_failed_check(monkeypatch):
    def unreachable(*args, **options):
        raise AssertionError("timed")

    monkeypatch.setattr(measure, "interleaved", unreachable)
    monkeypatch.setattr(lean, "grads", forgetful)
    with pytest.raises(ConfigError, match="ecanet eca: gradients is off by.*nothing was timed"):
        bench.run(**TINY, say=lambda line: None)


def test_a_wrong_copy_for_inference_is_refused(monkeypatch):
    def wrong(model, optimize=bench_check.optimize):
        copied = optimize(model)
        copied.fc.bias.data += 1e-3
        return copied

    monkeypatch.setattr(bench_check, "optimize", wrong)
    with pytest.raises(ConfigError, match="optimized plain: logits is off by"):
        bench_check.check_networks(bench_networks.build("resnet18", "cpu"), 64, "cpu")


class Compiled(nn.Module):
    """Stands for a compiled network: ``change`` is what the compiler got wrong."""

    def __init__(self, network, change):
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x):
        return self.change(self.network(x))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda y: y, None),
        (lambda y: y * 1.01, "plain compiled: logits, batch 4 is off by"),
        (lambda y: y + 0.5 * (y - y.detach()), "plain compiled: gradients, batch 4 is off by"),
        (lambda y: y * float("nan"), "plain compiled: logits, batch 4 is off by"),
    ],
)
def test_a_wrong_compiled_network_is_refused(change, what):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    fast = {"plain compiled": Compiled(network, change)}
    images, said = bench_networks.random_images(4, 8, "cpu"), []
    if what is None:
        checks, seconds = bench_check.check_compiled({"plain": network}, fast, images, said.append)
        assert [c["error"] for c in checks] == [0, 0]
        assert seconds["plain compiled"] > 0
        assert said == ["plain compiled: compiled for batch 4 in 0 s"]
        return
    with pytest.raises(ConfigError, match=what):
        bench_check.check_compiled({"plain": network}, fast, images, said.append)


# a whole run


def test_a_run_has_every_row(result):
    networks = [(row["phase"], row["variant"]) for row in result["networks"]]
    optimized = ["optimized plain", "optimized eca"]
    assert networks == [
        *(("training", name) for name in NETWORKS),
        *(("inference", name) for name in NETWORKS + optimized),
    ]
    shapes = [[2, 64, 16, 16], [2, 128, 8, 8], [2, 256, 4, 4], [2, 512, 2, 2]]
    assert [(row["shape"], row["variant"]) for row in result["layers"]] == [(s, name) for s in shapes for name in TAILS]
    for row in result["networks"] + result["layers"]:
        assert len(row["seconds"]) == 2
        assert row["ms"] == measure.spread(1e3 * s for s in row["seconds"])
        assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
    for row in result["networks"]:
        assert row["images_per_second"] == pytest.approx(2e3 / row["ms"]["median"])
        assert row["moved_mb_per_image"] > 1
        assert ("memory_mb" in row) == (row["phase"] == "training")
    copied = result["copy"][0]["gb_per_second"]["median"]
    for row in result["layers"]:
        assert row["share_of_copy"] == pytest.approx(row["moved_mb"] / row["ms"]["median"] / copied)


def test_a_runs_ratios_are_those_of_its_times(result):
    def seconds(r, name):
        rows = result["layers"] if r["phase"] == "layers" else result["networks"]
        (row,) = bench_pages.chosen(
            rows, variant=name, **{k: r[k] for k in ("phase", "shape") if k in r and r[k] != "layers"}
        )
        return row["seconds"]

    pairs = [(r["phase"], r["first"], r["second"]) for r in result["ratios"]]
    assert ("training", "ecanet eca", "timm eca") in pairs
    assert ("inference", "optimized eca", "timm eca") in pairs
    assert pairs.count(("layers", "tail ecanet", "tail reference")) == 4
    assert len(pairs) == 5 + 8 + 4 * 4
    for r in result["ratios"]:
        expected = measure.ratio(seconds(r, r["first"]), seconds(r, r["second"]))
        assert {k: r[k] for k in expected} == expected


def test_a_run_says_where_it_was_made(result, lines):
    place = result["environment"]
    for name in ("torch", "torchvision", "timm", "ecanet", "python", "platform", "threads", "device", "date", "dtype"):
        assert place[name], name
    assert "commit" in place
    assert (place["model"], place["image_size"], place["layout"]) == ("resnet18", 64, "channels_last")
    assert len(result["checks"]) == 2 * 4 + 5 * len(TAILS)
    assert all(check["error"] <= check["allowed"] for check in result["checks"])
    assert lines == ["about 1 minutes; first the checks", f"{len(result['checks'])} checks passed"]


def test_less_is_moved_and_kept_than_by_the_peer(result):
    rows = {(row["phase"], row["variant"]): row for row in result["networks"]}
    ours, theirs = rows["training", "ecanet eca"], rows["training", "timm eca"]
    assert ours["moved_mb_per_image"] < theirs["moved_mb_per_image"]
    fast, slow = rows["inference", "optimized eca"], rows["inference", "ecanet eca"]
    assert fast["moved_mb_per_image"] < slow["moved_mb_per_image"]


def test_the_four_minutes_leave_time_for_checks():
    assert sum(budget.seconds for budget in bench.QUICK.values()) <= 180


def test_commit_of_this_source_only(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    assert bench.commit() is None


# the command


def test_the_command(ecanet, monkeypatch, result, tmp_path):
    asked = {}
    monkeypatch.setattr(front_door, "run", lambda **options: asked.update(options) or result)
    code, out, err = ecanet("bench", "--quick", "--batch-size", "2,4", "--out", "new/result.json")
    assert (code, err) == (0, "")
    del asked["say"]
    assert asked == {"device": "cpu", "quick": True, "compiled": None, "batch_sizes": [2, 4]}
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == result
    assert (tmp_path / "new" / "result.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"result.json", "result.png"}
    rows = [line for line in out.splitlines() if re.match(rf" ({'|'.join(NETWORKS)}|\d+x\d+x\d+ +\w+ \w+) +\d", line)]
    assert len(rows) == 2 * len(NETWORKS) + 4
    assert max(map(len, rows)) <= 80
    assert "…" not in out
    for r in bench_pages.chosen(result["ratios"], phase="training"):
        assert f"  {r['first']} / {r['second']}: {r['median']:.3f}" in out
    assert out.splitlines()[-1].startswith(
        f"took {result['seconds']:.0f} s; result new/result.json, plot new/result.png"
    )


def test_compiling_is_asked_for_and_its_time_is_said(ecanet, monkeypatch, result):
    asked = {}
    with_time = result | {"compile_seconds": {"a": 30.2, "b": 31.0}}
    monkeypatch.setattr(front_door, "run", lambda **options: asked.update(options) or with_time)
    code, out, _ = ecanet("bench", "--quick", "--compile")
    assert (code, asked["compiled"], asked["batch_sizes"]) == (0, True, None)
    assert "compiling took 61 s" in out.splitlines()


def test_help_fits_a_screen(ecanet):
    code, out, _ = ecanet("bench", "--help")
    assert code == 0
    assert len(out.splitlines()) <= 24


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "unknown device 'tpu'; write auto, cpu, cuda, cuda:N or mps"),
        (["--batch-size", "0"], "a batch size must be a positive integer, got 0"),
        (["--batch-size", "8,-1"], "a batch size must be a positive integer, got -1"),
        (["--batch-size", "8;16"], "--batch-size must be one or more numbers such as 1,8,32, got '8;16'"),
        (["--out", "result.txt"], "--out must end in .json, got result.txt"),
        (["--out", "folder.json"], "folder.json is a folder; --out is a file"),
        (["--out", "file/result.json"], "cannot write to file (it is a file); choose another --out"),
        (["--out", "file/deeper/result.json"], "cannot write to file/deeper (Not a directory); choose another --out"),
    ],
)
def test_mistakes_are_told_before_the_long_run(ecanet, monkeypatch, tmp_path, arguments, said):
    def unreachable(*args, **options):
        raise AssertionError("began")

    monkeypatch.setattr(bench_networks, "build", unreachable)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    code, out, err = ecanet("bench", "--quick", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(ecanet):
    assert ecanet("bench", "--device", "cuda")[2].startswith(
        "ecanet: no device 'cuda' on this machine; choose one of auto, cpu"
    )


def test_the_benchmark_needs_a_cpu_or_a_cuda_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="the benchmark does not support device 'mps'; choose cpu or cuda"):
        bench.run(device="mps")


def test_a_missing_peer(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="compares with timm, which is not installed: pip install timm"):
        bench.run(**TINY, say=lambda line: None)


def test_only_a_full_run_compiles_unasked(monkeypatch):
    def stop(what):
        raise ConfigError(what)

    monkeypatch.setattr(bench_check, "check_compiler", lambda: stop("compiles"))
    monkeypatch.setattr(bench_networks, "build", lambda name, device: stop("does not"))
    wanted = {(True, None): "does not", (True, True): "compiles", (False, None): "compiles", (False, False): "does not"}
    for (quick, compiled), what in wanted.items():
        with pytest.raises(ConfigError, match=what):
            bench.run(quick=quick, compiled=compiled, say=lambda line: None)


def test_a_compiler_that_does_not_work(monkeypatch):
    def broken(function):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"torch.compile does not work here \(no C\+\+ compiler\); use --no-compile"):
        bench.run(**TINY, compiled=True, say=lambda line: None)
