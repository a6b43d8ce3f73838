"""The benchmark: interleaved timing, ratios, counts of bytes, checks before timing, a whole run, the command."""

import json
import re
import sys

import pytest
import torch
from torch import nn

from ecanet import create_model, ops
from ecanet.errors import ConfigError
from ecanet.ops import lean
from ecanet.studies import bench as front_door
from ecanet.studies.bench import check as bench_check
from ecanet.studies.bench import layers as bench_layers
from ecanet.studies.bench import machine, measure
from ecanet.studies.bench import networks as bench_networks
from ecanet.studies.bench import pages as bench_pages
from ecanet.studies.bench import timing as bench
from ecanet.studies.bench.measure import Budget

TINY = {"model": "resnet18", "image_size": 48, "batch_sizes": (2,), "quick": True}
NETWORKS = ["ecanet plain", "ecanet eca", "timm eca", "timm se", "torchvision plain"]
TAILS = ["tail plain", "tail reference", "tail timm", "tail ecanet", "gate timm", "gate ecanet"]


def build_shallow(name, device, build=bench_networks.build):
    """Build the networks with one block in each of the last two stages, which have most of the weights."""
    networks = build(name, device)
    for network in networks.values():
        del network.layer3[1], network.layer4[1]
    return networks


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def result(lines):
    """The result of a run of two rounds on small images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "QUICK", {phase: Budget(seconds=0, least=2) for phase in bench.QUICK})
        patch.setattr(measure, "COPIED", 2**16)
        patch.setattr(bench_networks, "build", build_shallow)
        return bench.run(**TINY, say=lines.append)


class Clock:
    """A clock that only the steps of a test advance."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(measure, "clock", lambda device: self.now)

    def step(self, *seconds):
        """Return a step whose calls take ``seconds`` in turn; all further calls take the last of them."""
        left = list(seconds)

        def step():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return step


# interleaved timing and ratios


def test_variants_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    clock, order = Clock(monkeypatch), []
    steps = {name: lambda name=name: order.append(name) for name in "ABC"}
    times = measure.interleave(steps, Budget(seconds=0, least=3, most=3), device="cpu", title="")
    assert "".join(order) == "CABABCBCACAB"
    assert times == {name: [0.0] * 3 for name in "ABC"}
    cold = {"A": clock.step(50, 1), "B": clock.step(60, 2, 4, 3)}
    times = measure.interleave(cold, Budget(seconds=0, least=3), device="cpu", title="")
    assert times == {"A": [1, 1, 1], "B": [2, 4, 3]}


@pytest.mark.parametrize(("seconds", "rounds"), [(10, 10), (10.9, 10), (1, 5), (1000, 20)])
def test_as_many_rounds_run_as_fit_into_the_time(monkeypatch, seconds, rounds):
    clock = Clock(monkeypatch)
    steps = {"A": clock.step(30, 0.25), "B": clock.step(30, 0.75)}
    times = measure.interleave(steps, Budget(seconds=seconds, least=5, most=20), device="cpu", title="")
    assert [len(values) for values in times.values()] == [rounds, rounds]


def test_a_ratio_divides_times_of_the_same_round():
    # The machine is three times slower in the second round and ten times in the third. A always takes half of B's time.
    a, b = [1.0, 3.0, 10.0, 1.0], [2.0, 6.0, 20.0, 2.0]
    assert measure.compute_ratio(a, b) == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert measure.compute_ratio([1.0, 2.0, 6.0], [1.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert measure.compute_spread([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0}
    rows = bench.compute_ratios({"x": a, "y": b}, [("x", "y"), ("y", "x"), ("x", "z")], batch_size=4, phase="training")
    assert [(r["first"], r["second"], r["median"], r["batch_size"]) for r in rows] == [
        ("x", "y", 0.5, 4),
        ("y", "x", 2.0, 4),
    ]


# counts of bytes


def run_tail_pair(b):
    outputs = ops.residual_tail_pair(b.z, b.norm, b.gate.weigh, b.shortcut)
    torch.autograd.grad(outputs, [b.z, b.shortcut], (b.dy, b.shortcut.detach()))


def test_a_kernel_counts_each_of_its_tensors_once():
    """Ten tensors and twice one bit for each element, as Triton's interpreter counts load by load."""
    pytest.importorskip("triton")
    b = bench_layers.make_block((4, 16, 24, 24), "cpu", torch.float32)
    with ops.prefer_impl("fused"):
        assert measure.count_moved_mb(bench_layers.make_steps(b)["tail ecanet"]) == pytest.approx(
            (10 + 2 / 32) * b.z.nbytes / 1e6
        )
        assert measure.count_moved_mb(bench_layers.make_steps(b)["gate ecanet"]) == pytest.approx(7 * b.z.nbytes / 1e6)


def test_random_numbers_are_drawn_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        b = bench_layers.make_block((2, 32, 3, 3), "cpu", torch.float32)
        images = bench_networks.make_images(2, 4, "cpu")
        near = bench_check.perturb_last_digit(images)
    parameters = (p for module in (b.norm, b.gate, b.timm_gate) for p in module.parameters())
    assert {x.device.type for x in (b.z, b.shortcut, b.dy, *parameters, images, near)} == {"cpu"}


def test_a_block_tail_moves_eleven_times_its_output():
    b = bench_layers.make_block((4, 16, 64, 64), "cpu", torch.float32)
    steps, size = bench_layers.make_steps(b), b.z.nbytes / 1e6
    # forward: z; z, shortcut, y. Backward: dy, y, z, t; t, z, dz
    assert measure.count_moved_mb(steps["tail ecanet"]) == pytest.approx(11 * size)
    assert measure.count_moved_mb(lambda: run_tail_pair(b)) == pytest.approx(12 * size)  # reads a second gradient
    assert measure.count_moved_mb(steps["gate ecanet"]) == pytest.approx((1 + 2 + 2 + 2) * size)
    assert measure.count_moved_mb(steps["tail timm"]) > measure.count_moved_mb(steps["tail plain"]) > 11 * size
    assert lean.moments.__module__ == "ecanet.ops.lean"  # the count has put the pass back


def test_a_copy_counts_what_it_reads_and_what_it_writes(monkeypatch):
    monkeypatch.setattr(measure, "COPIED", 1000)
    step, size = measure.make_copy("cpu")
    assert size == 2 * 4 * 1000
    assert float(step().sum()) == 1000


def test_memory_on_a_cpu_is_what_autograd_keeps():
    weight = torch.randn(1000, 500, requires_grad=True)
    x = torch.randn(2000, 1000)
    assert measure.measure_memory(lambda: (x @ weight).sum(), "cpu") == pytest.approx(4 * 2000 * 1000 / 1e6)


def test_stage_shapes_are_those_of_a_resnet():
    with torch.device("meta"):
        network = create_model("resnet50")
    assert bench_networks.list_stage_shapes(network, 224) == [
        (256, 56, 56),
        (512, 28, 28),
        (1024, 14, 14),
        (2048, 7, 7),
    ]
    assert [side for _, side, _ in bench_networks.list_stage_shapes(network, 65)] == [
        17,
        9,
        5,
        3,
    ]  # strided layers round up


# checks before timing


def forget_dm(t, z, form, m, dm, dv, grads=lean.grads):
    return grads(t, z, form, m, None, dv)


def scale_output(z, shortcut, form, apply=lean.apply):
    y, kept = apply(z, shortcut, form)
    return y * 1.0001, kept


@pytest.mark.parametrize(("name", "bug"), [("grads", forget_dm), ("apply", scale_output)])
def test_a_wrong_tail_is_refused(monkeypatch, name, bug):
    assert bench_check.check_layers([(32, 8, 8)], "cpu", fused=False)
    monkeypatch.setattr(lean, name, bug)
    message = r"(tail|gate) ecanet \(3, 17, 17, 19\) float32 is off by .*nothing was timed"
    with pytest.raises(ConfigError, match=message):
        bench_check.check_layers([(32, 8, 8)], "cpu", fused=False)


def test_nothing_is_timed_after_a_failed_check(monkeypatch):
    def unreachable(*args, **options):
        raise AssertionError("timed")

    monkeypatch.setattr(measure, "interleave", unreachable)
    monkeypatch.setattr(bench_networks, "build", build_shallow)
    monkeypatch.setattr(lean, "grads", forget_dm)
    with pytest.raises(ConfigError, match="ecanet eca: gradients is off by.*nothing was timed"):
        bench.run(**TINY, say=lambda line: None)


def test_a_wrong_optimized_network_is_refused(monkeypatch):
    def wrong(model, optimize=bench_check.optimize):
        copied = optimize(model)
        copied.fc.bias.data += 1e-3
        return copied

    monkeypatch.setattr(bench_check, "optimize", wrong)
    with pytest.raises(ConfigError, match="optimized plain: logits is off by"):
        bench_check.check_networks(build_shallow("resnet18", "cpu"), 64, "cpu")


class Compiled(nn.Module):
    """Stands for a compiled network; ``change`` is the compiler's mistake."""

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
    images, said = bench_networks.make_images(4, 8, "cpu"), []
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
    shapes = [[2, 64, 12, 12], [2, 128, 6, 6], [2, 256, 3, 3], [2, 512, 2, 2]]
    assert [(row["shape"], row["variant"]) for row in result["layers"]] == [(s, name) for s in shapes for name in TAILS]
    for row in result["networks"] + result["layers"]:
        assert len(row["seconds"]) == 2
        assert row["ms"] == measure.compute_spread(1e3 * s for s in row["seconds"])
        assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
    for row in result["networks"]:
        assert row["images_per_second"] == pytest.approx(2e3 / row["ms"]["median"])
        assert row["moved_mb_per_image"] > 1
        assert ("memory_mb" in row) == (row["phase"] == "training")
    copied = result["copy"][0]["gb_per_second"]["median"]
    for row in result["layers"]:
        assert row["share_of_copy"] == pytest.approx(row["moved_mb"] / row["ms"]["median"] / copied)


def test_the_ratios_of_a_run_are_those_of_its_times(result):
    def seconds(r, name):
        rows = result["layers"] if r["phase"] == "layers" else result["networks"]
        (row,) = bench_pages.select_rows(
            rows, variant=name, **{k: r[k] for k in ("phase", "shape") if k in r and r[k] != "layers"}
        )
        return row["seconds"]

    pairs = [(r["phase"], r["first"], r["second"]) for r in result["ratios"]]
    assert ("training", "ecanet eca", "timm eca") in pairs
    assert ("inference", "optimized eca", "timm eca") in pairs
    assert pairs.count(("layers", "tail ecanet", "tail reference")) == 4
    assert len(pairs) == 5 + 8 + 4 * 4
    for r in result["ratios"]:
        expected = measure.compute_ratio(seconds(r, r["first"]), seconds(r, r["second"]))
        assert {k: r[k] for k in expected} == expected


def test_a_run_describes_its_environment(result, lines):
    environment = result["environment"]
    for name in ("torch", "torchvision", "timm", "ecanet", "python", "platform", "threads", "device", "date", "dtype"):
        assert environment[name], name
    assert "commit" in environment
    assert (environment["model"], environment["image_size"], environment["layout"]) == ("resnet18", 48, "channels_last")
    assert len(result["checks"]) == 2 * 4 + 5 * len(TAILS)
    assert all(check["error"] <= check["allowed"] for check in result["checks"])
    assert lines == ["checking, then timing for about 1 minutes", f"{len(result['checks'])} checks passed"]


def test_our_networks_move_fewer_bytes_than_timms(result):
    rows = {(row["phase"], row["variant"]): row for row in result["networks"]}
    ours, theirs = rows["training", "ecanet eca"], rows["training", "timm eca"]
    assert ours["moved_mb_per_image"] < theirs["moved_mb_per_image"]
    fast, slow = rows["inference", "optimized eca"], rows["inference", "ecanet eca"]
    assert fast["moved_mb_per_image"] < slow["moved_mb_per_image"]


def test_the_four_minutes_leave_time_for_checks():
    assert sum(budget.seconds for budget in bench.QUICK.values()) <= 180


def test_the_commit_is_that_of_this_source_only(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "bench.py"))
    assert machine.find_commit() is None


# the command


def test_the_command(ecanet, monkeypatch, result, tmp_path):
    options = {}
    monkeypatch.setattr(front_door, "run", lambda **given: options.update(given) or result)
    code, out, err = ecanet("bench", "--quick", "--batch-size", "2,4", "--out", "new/result.json")
    assert (code, err) == (0, "")
    del options["say"]
    assert options == {"device": "cpu", "quick": True, "compiled": None, "batch_sizes": [2, 4]}
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == result
    assert (tmp_path / "new" / "result.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"result.json", "result.png", "result.html"}
    rows = [line for line in out.splitlines() if re.match(rf" ({'|'.join(NETWORKS)}|\d+x\d+x\d+ +\w+ \w+) +\d", line)]
    assert len(rows) == 2 * len(NETWORKS) + 4
    assert max(map(len, rows)) <= 80
    assert "…" not in out
    for r in bench_pages.select_rows(result["ratios"], phase="training"):
        assert f"  {r['first']} / {r['second']}: {r['median']:.3f}" in out
    assert out.splitlines()[-1].startswith(
        f"took {result['seconds']:.0f} s; result new/result.json, page new/result.html"
    )


def test_the_command_compiles_on_request_and_prints_how_long_it_took(ecanet, monkeypatch, result):
    options = {}
    with_time = result | {"compile_seconds": {"a": 30.2, "b": 31.0}}
    monkeypatch.setattr(front_door, "run", lambda **given: options.update(given) or with_time)
    code, out, _ = ecanet("bench", "--quick", "--compile")
    assert (code, options["compiled"], options["batch_sizes"]) == (0, True, None)
    assert "compiling took 61 s" in out.splitlines()


def test_help_fits_a_screen(ecanet):
    code, out, _ = ecanet("bench", "--help")
    assert code == 0
    assert len(out.splitlines()) <= 24


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_mistakes_are_reported_before_the_run_begins(ecanet, monkeypatch, tmp_path, arguments, message):
    def unreachable(*args, **options):
        raise AssertionError("began")

    monkeypatch.setattr(bench_networks, "build", unreachable)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    code, out, err = ecanet("bench", "--quick", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(ecanet):
    assert ecanet("bench", "--device", "cuda")[2].startswith(
        "ecanet: no device 'cuda' on this machine; choose one of auto, cpu"
    )


def test_the_benchmark_needs_a_cpu_or_a_cuda_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="the benchmark does not support device 'mps'; choose cpu or cuda"):
        bench.run(device="mps")


def test_timm_must_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    lines = []
    with pytest.raises(ConfigError, match="timm is not installed: pip install timm"):
        bench.run(**TINY, say=lines.append)
    assert lines == []


def test_only_a_full_run_compiles_by_default(monkeypatch):
    def stop(what):
        raise ConfigError(what)

    monkeypatch.setattr(bench_check, "check_compiler", lambda: stop("compiles"))
    monkeypatch.setattr(bench_networks, "build", lambda name, device: stop("does not"))
    expected = {
        (True, None): "does not",
        (True, True): "compiles",
        (False, None): "compiles",
        (False, False): "does not",
    }
    for (quick, compiled), what in expected.items():
        with pytest.raises(ConfigError, match=what):
            bench.run(quick=quick, compiled=compiled, say=lambda line: None)


def test_a_compiler_that_does_not_work(monkeypatch):
    def broken(function):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"torch.compile does not work here \(no C\+\+ compiler\); use --no-compile"):
        bench.run(**TINY, compiled=True, say=lambda line: None)
