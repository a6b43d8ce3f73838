"""`ecanet bench --model`: any network with and without attention, checked, timed in turns, written like other runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ecanet.errors import ConfigError
from ecanet.studies import bench as front_door
from ecanet.studies.bench import arms as bench_arms
from ecanet.studies.bench import attached, measure, timing
from ecanet.studies.bench import networks as bench_networks
from ecanet.studies.bench.measure import Budget

FACTORY = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.norm(self.conv(x))

def make(num_classes=3):
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))

def fail(num_classes=3):
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.Flatten(), nn.Linear(8 * 14 * 14, num_classes))
"""


@pytest.fixture(autouse=True)
def _two_rounds(monkeypatch):
    monkeypatch.setattr(timing, "QUICK", {phase: Budget(seconds=0, least=2) for phase in timing.QUICK})


@pytest.fixture
def factory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text(FACTORY)


def run(model, *attentions, **options):
    lines = []
    result = attached.run_model(model, attentions, quick=True, batch_sizes=[2], say=lines.append, **options)
    return result, lines


def test_our_network_and_its_optimized_copies():
    result, lines = run("resnet8", "eca", "se-var1", image_size=16)
    arms = ["plain", "eca", "se-var1"]
    rows = [(row["phase"], row["variant"]) for row in result["networks"]]
    assert rows == [
        *(("training", name) for name in arms),
        *(("inference", name) for name in [*arms, *(f"optimized {name}" for name in arms)]),
    ]
    assert all(len(row["seconds"]) == 2 for row in result["networks"])
    assert (result["layers"], result["copy"]) == ([], [])
    assert [check["what"] for check in result["checks"]] == [
        "eca: outputs in evaluation",
        *(f"optimized {name}: outputs" for name in arms),
    ]
    pairs = {(r["phase"], r["first"], r["second"]) for r in result["ratios"]}
    assert {("training", "eca", "plain"), ("training", "se-var1", "plain"), ("inference", "eca", "plain")} <= pairs
    assert {("inference", "optimized eca", "optimized plain"), ("inference", "optimized eca", "eca")} <= pairs
    (ratio,) = [r for r in result["ratios"] if (r["phase"], r["first"]) == ("training", "eca")]
    times = {row["variant"]: row["seconds"] for row in result["networks"] if row["phase"] == "training"}
    assert {key: ratio[key] for key in ("low", "median", "high")} == measure.compute_ratio(times["eca"], times["plain"])
    assert (result["environment"]["model"], result["environment"]["image_size"]) == ("resnet8", 16)
    assert result["environment"]["attention"] == ["eca", "se-var1"]
    assert lines == [
        "eca: 3 gates built in",
        "se-var1: 3 gates built in",
        "se-var1: it cannot begin as the identity, so its outputs are not compared with the plain ones",
        "4 checks passed; timing for about 1 min",
    ]


def test_compiled_networks_are_checked_and_divided_by_each_other(monkeypatch):
    """A wrapper stands for the compiler's result, which takes half a minute to make."""

    def compile_networks(networks):
        return {f"{name} compiled": nn.Sequential(network) for name, network in networks.items()}

    monkeypatch.setattr(attached, "compile_networks", compile_networks)
    monkeypatch.setattr(attached, "check_compiler", lambda: None)
    result, lines = run("resnet8", "eca", image_size=16, compiled=True)
    variants = [row["variant"] for row in result["networks"] if row["phase"] == "training"]
    assert variants == ["plain", "eca", "plain compiled", "eca compiled"]
    pairs = {(r["first"], r["second"]) for r in result["ratios"] if r["phase"] == "training"}
    assert pairs == {
        ("eca", "plain"),
        ("eca compiled", "plain compiled"),
        ("plain compiled", "plain"),
        ("eca compiled", "eca"),
    }
    assert "eca compiled: gradients, batch 2" in [check["what"] for check in result["checks"]]
    assert sum(line.endswith("compiled for batch 2 in 0 s") for line in lines) == 4


def test_the_command_times_a_network_from_a_file(ecanet, factory):
    arguments = ["--quick", "--batch-size", 5, "--image-size", 16, "--out", "new/mine.json"]
    code, out, err = ecanet("bench", "--model", "mine.py:make", "--attention", "eca,gct", *arguments)
    assert (code, err) == (0, "")
    assert "eca: 1 gates attached" in out.splitlines()
    assert "without optimized copies" not in out
    assert "block tail" not in out
    result = json.loads(Path("new/mine.json").read_text())
    assert [(row["phase"], row["variant"]) for row in result["networks"]] == [
        *(("training", name) for name in ("plain", "eca", "gct")),
        *(("inference", f"{kind}{name}") for kind in ("", "optimized ") for name in ("plain", "eca", "gct")),
    ]
    for r in result["ratios"]:
        assert (
            f"  {r['first']} / {r['second']}: {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f}) of the time" in out
        )
    assert [(check["error"], check["allowed"]) for check in result["checks"][:2]] == [(0, 0), (0, 0)]
    assert [check["what"] for check in result["checks"][2:]] == [
        f"optimized {n}: outputs" for n in ("plain", "eca", "gct")
    ]
    assert Path("new/mine.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = ecanet("bench", "--model", "mine.py:fail", "--image-size", 32, *arguments[:3])
    assert code == 2
    assert "mine.py:fail does not run on 2 images of 32 pixels (" in err
    assert "choose another --batch-size or --image-size" in err
    assert err.count("\n") == 1


class Detector(nn.Module):
    """The parts by which a detector is known; two convolutions are its backbone."""

    def __init__(self, fixed_size=None):
        super().__init__()
        self.transform = nn.Module()
        self.transform.min_size, self.transform.max_size, self.transform.fixed_size = (800,), 1333, fixed_size
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        self.anchor_generator = nn.Identity()
        self.seen = []

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> object:
        self.seen.append((len(images), targets))
        features = self.backbone(torch.stack(images))
        assert self.training == (targets is not None)
        if targets is None:
            return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)} for _ in images]
        return {"loss_one": features.square().mean(), "loss_two": features.abs().mean()}


@pytest.mark.parametrize("wrong", [False, True])
def test_a_detector_gets_lists_boxes_and_the_size_in_every_arm(monkeypatch, wrong):
    """It is checked by its features, since it finds nothing."""

    def attach(model, attention, *, example, preserve):
        model.backbone[2].register_forward_hook(lambda module, args, output: output * (1.1 if wrong else 1))

    monkeypatch.setattr(bench_arms.networks, "find", lambda name: Detector())
    monkeypatch.setattr(bench_arms, "attach", attach)
    monkeypatch.setattr(timing, "time_networks", lambda variants, *_: built.update(variants.trained))
    built = {}
    if wrong:
        with pytest.raises(ConfigError, match=r"eca: outputs in evaluation is off by .*, allowed 0.*nothing was timed"):
            run("torchvision:fcos_resnet50_fpn", "eca", image_size=32)
        return
    result, lines = run("torchvision:fcos_resnet50_fpn", "eca", image_size=32)
    assert [(one.transform.min_size, one.transform.max_size) for one in built.values()] == [((32,), 53)] * 2
    (_, targets), (count, none) = built["plain"].seen[-2:]  # the counts of bytes in training and inference
    assert (count, none, len(targets)) == (2, None, 2)
    assert targets[0]["boxes"].tolist() == [[8, 8, 24, 24]]
    assert targets[0]["masks"].sum() == 16 * 16
    assert not any("without optimized copies" in line for line in lines)
    assert [check["allowed"] for check in result["checks"]] == [0, 1e-8, 1e-8]


def test_a_size_that_a_detector_does_not_take():
    with pytest.raises(ConfigError, match="some resizes every image to 300 pixels: leave --image-size out, got 64"):
        bench_arms.resize_to(Detector(fixed_size=(300, 300)), "some", 64)
    bench_arms.resize_to(Detector(fixed_size=(300, 300)), "some", 300)


def test_a_wrong_optimized_copy_is_refused(monkeypatch):
    def wrong(model, example, optimize=bench_arms.optimize):
        copied = optimize(model, example=example)
        copied.fc.bias.data += 1e-3
        return copied

    monkeypatch.setattr(bench_arms, "optimize", wrong)
    with pytest.raises(ConfigError, match="optimized plain: outputs is off by .*nothing was timed"):
        run("resnet8", "eca", image_size=16)


@pytest.mark.parametrize("where", ["check_arms", "move_to_device", "timing.time_networks"])
def test_too_little_memory_is_one_line_wherever_it_is_met(monkeypatch, where):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(f"ecanet.studies.bench.attached.{where}", fail)
    line = r"resnet8 does not run on 2 images of 16 pixels \(out of memory.*; choose another .* or --image-size"
    with pytest.raises(ConfigError, match=line):
        run("resnet8", "eca", image_size=16)


def test_arms_have_the_same_weights():
    """A gate that begins as the identity computes the plain network, whose random weights it shares."""
    plain = bench_arms.create("resnet8", "none")
    gated = bench_arms.create("resnet8", "se")
    x = torch.randn(2, 3, 16, 16)
    assert bench_arms.build_in(plain, gated, neutralize=True)
    torch.testing.assert_close(gated.eval()(x), plain.eval()(x))
    gated = bench_arms.create("resnet8", "se")
    assert not bench_arms.build_in(plain, gated, neutralize=False)
    assert not torch.allclose(gated.eval()(x), plain.eval()(x), rtol=1e-3)


def test_outputs_of_any_form_make_a_loss():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.arange(3)  # more images than classes
    expected = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0]))
    assert bench_networks.compute_loss([logits], labels) == expected
    maps = {"out": torch.full((3, 2, 4, 4), 2.0), "aux": torch.full((3, 2, 4, 4), 3.0), "labels": labels}
    assert bench_networks.compute_loss(bench_networks.list_outputs(maps), labels) == 5


def test_each_arm_has_as_much_time_as_a_network_of_the_whole_benchmark():
    budgets = {"training": Budget(seconds=100), "inference": Budget(seconds=50, least=9), "layers": Budget(seconds=1)}
    scaled = attached.scale_budgets(budgets, 2)
    assert scaled == {"training": Budget(seconds=40), "inference": Budget(seconds=20, least=9)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention", "se"], "--attention and --image-size need --model"),
        (["--image-size", 64], "--attention and --image-size need --model"),
        (
            ["--model", "resnet8", "--attention", "none"],
            "give at least one attention to compare with the plain network",
        ),
        (["--model", "resnet8", "--attention", "ecaa"], "unknown attention 'ecaa'"),
        (["--model", "resnet8", "--image-size", 0], "--image-size must be a positive integer, got 0"),
        (["--model", "resnet99"], "unknown model 'resnet99'"),
        (["--model", "torchvision:nothing"], "torchvision has no model 'nothing'"),
        (["--model", "faster_rcnn", "--compile"], "a detector is no single graph"),
    ],
)
def test_mistakes_are_one_line(ecanet, monkeypatch, arguments, message):
    detector = SimpleNamespace(transform=0, backbone=0, anchor_generator=0)
    monkeypatch.setattr(bench_arms, "create_detector", lambda name, attention: detector)
    code, out, err = ecanet("bench", "--quick", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_command_passes_its_options(ecanet, monkeypatch):
    given = []
    monkeypatch.setattr(front_door, "run_model", lambda *args, **options: given.append((args, options)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ecanet("bench", "--model", "timm:resnet26d", "--no-compile", "--batch-size", "1,4")
    ((args, options),) = given
    del options["say"]
    assert args == ("timm:resnet26d", ("eca",))
    assert options == {
        "device": "cpu",
        "quick": False,
        "compiled": False,
        "batch_sizes": [1, 4],
        "image_size": None,
    }
