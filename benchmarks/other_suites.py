"""Run timm's and torchvision's own model tests over plain networks and over the same networks after `ecanet.attach`.

    python benchmarks/other_suites.py --timm pytorch-image-models --torchvision vision

Each folder is a checkout of that library's sources, at a tag that fits the installed library, which is the one that is
tested. Give one of them or both. The tests run unchanged, in processes of their own; a plugin
(suites_parts/attaching.py) wraps the functions from which the tests take their networks. The command prints how the
tests of each kind ended, and writes results/other-suites.json, where a suite that did not run keeps its rows;
`--only PATTERN` runs a part of the tests and writes nothing. Two cores need about an hour for each suite.

torchvision compares outputs with stored ones. Plain networks store them first, in a temporary folder, and all others
are compared with these. Most of its tests of whole networks also script the network, which attached networks refuse at
once. So these tests run a second time, over plain and over attached networks, without that check: this shows the rest
of them. test_extended_models.py (names, weights) and test_onnx.py are left out.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE / "suites_parts")]
RESULTS = HERE / "results" / "other-suites.json"

FILES = {
    "timm": ["tests/test_models.py"],
    "torchvision": [
        "test/test_models.py",
        "test/test_backbone_utils.py",
        "test/test_models_detection_negative_samples.py",
    ],
}
"""For each suite, the files of tests in its checkout."""

VERSIONS = ["version.txt", "timm/version.py"]
"""Files that hold the version of a checkout's sources."""

UNSCRIPTED = " without its check of TorchScript"
"""End of the names of the runs in which torchvision's tests do not script."""

OUTCOMES = ["passed", "failed", "skipped", "not scripted", "refused"]
"""How tests end; the last two are one line of this library: for TorchScript, and for a network without a place."""

_TIMM = """
bat_resnext26ts botnet26t_256 coatnet_pico_rw_224 convnext_atto convnextv2_atto cpubone_nano cs3darknet_focus_s csatv2
densenet121 dla46_c dla46x_c dpn48b eca_botnext26ts_256 eca_resnext26ts ecaresnet26t edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_es efficientnet_lite0 efficientvim_m1
efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b gcresnext26ts gernet_s
ghostnet_050 ghostnetv2_100 halonet26t hardcorenas_a hgnetv2_b0 hrnet_w18_small inception_next_atto lambda_resnet26t
lcnet_050 lcnetv2_small legacy_seresnet18 levit_conv_128s lowformer_b0 mambaout_femto mixnet_s mnasnet_050
mobilenet_edgetpu_v2_xs mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0
mobilevit_xxs mobilevitv2_050 nf_regnet_b0 poolformer_s12 pvt_v2_b0 regnetx_002 regnety_002 regnetz_005
repghostnet_050 repvgg_a0 repvit_m0_9 resnest14d resnet10t resnet14t resnet18 resnetv2_18 resnext26ts rexnet_100
semnasnet_075 seresnext26ts shvit_s1 skresnet18 spnasnet_100 starnet_s050 swiftformer_xs test_byobnet test_convnext
test_efficientnet test_mambaout test_nfnet test_resnet tf_efficientnetv2_b0 tf_mobilenetv3_small_075 tinynet_e
vgg11_bn visformer_tiny
"""
TIMM = _TIMM.split()
"""Small networks of timm, at least one of each family of convolutional and hybrid networks."""

LARGEST = 30e6
"""Parameters of the largest networks of torchvision that are tested."""

Row = dict[str, Any]


def list_networks(suite: str) -> list[str]:
    """Return the names of the networks that are tested."""
    if suite == "timm":
        return TIMM
    from torchvision.models import get_model_weights, list_models

    def is_small(name: str) -> bool:
        return all(weights.meta["num_params"] <= LARGEST for weights in get_model_weights(name))

    return sorted({name.removeprefix("quantized_") for name in list_models() if is_small(name)})


def start(suite: str, checkout: Path, only: str, folder: Path, name: str) -> subprocess.Popen[bytes]:
    """Start the run ``name`` of ``suite``; each of its tests adds a line to the file ``name``.jsonl in ``folder``."""
    orders = folder / f"{name}.orders.json"
    content = {
        "suite": suite,
        "attach": name.startswith("attached"),
        "script": not name.endswith(UNSCRIPTED),
        "networks": list_networks(suite),
        "only": only,
        "outputs": str(folder),
        "rows": str(folder / f"{name}.jsonl"),
    }
    orders.write_text(json.dumps(content))
    paths = [str(HERE / "suites_parts"), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "SUITE_ORDERS": str(orders), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if name == "plain" + UNSCRIPTED:
        environment["EXPECTTEST_ACCEPT"] = "1"  # torchvision's tests then store outputs, and compare nothing
    # Warnings, caches and time limits (of pytest-timeout, on a busy machine) are not what is looked at here.
    options = ["-q", "--tb=no", "--no-header", "-p", "attaching", "-W", "ignore"]
    options += ["-p", "no:cacheprovider", "-p", "no:timeout"]
    files = [str(checkout / name) for name in FILES[suite] if (checkout / name).exists()]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(checkout), *files]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run(suite: str, checkout: Path, only: str) -> dict[str, list[Row]]:
    """Return the rows of the tests over plain and over attached networks, and of the runs without TorchScript.

    Raises:
        SystemExit: a run did not come to its end, or ran no test.
    """
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def run_together(*names: str) -> None:
            started = {name: start(suite, checkout, only, Path(folder), name) for name in names}
            for name, process in started.items():
                path = Path(folder) / f"{name}.jsonl"
                # 1: some tests failed. 5: there is no test, as where none of the chosen ones scripts a network.
                if process.wait() not in (0, 1, 5) or not (path.exists() or name.endswith(UNSCRIPTED)):
                    log = path.with_suffix(".log").read_text()[-2000:]
                    sys.exit(f"{suite}: the tests over {name} networks ended with {process.returncode}\n{log}")
                rows[name] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

        if suite == "torchvision":
            run_together("plain" + UNSCRIPTED)  # alone, because it stores the outputs with which others are compared
            run_together("attached" + UNSCRIPTED)
        run_together("plain", "attached")
    return rows


def sum_up(rows: dict[str, list[Row]]) -> Row:
    """Return what the runs of a suite come to."""
    result = tally(rows["plain"], rows["attached"])
    if rows.get("plain" + UNSCRIPTED):
        result[UNSCRIPTED.strip()] = tally(rows["plain" + UNSCRIPTED], rows["attached" + UNSCRIPTED])
    return result


def tally(plain: list[Row], attached: list[Row]) -> Row:
    """Return what two runs come to: counts for each kind of test, and what became of the tests that pass plain."""
    rows = {"plain": plain, "attached": attached}
    pass_plain = {row["test"] for row in rows["plain"] if row["outcome"] == "passed"}
    kinds = {
        kind: {name: dict(Counter(row["outcome"] for row in rows[name] if row["kind"] == kind)) for name in rows}
        for kind in dict.fromkeys(row["kind"] for row in rows["plain"])
    }
    passed = [row for row in rows["attached"] if row["test"] in pass_plain]
    return {
        "networks": len({row["network"] for row in rows["plain"]}),
        "kinds": kinds,
        "pass plain": len(pass_plain),
        "of these attached": dict(Counter(row["outcome"] for row in passed)),
        "refused": group(row for row in passed if row["outcome"] == "refused"),
        "causes": group(row for row in passed if row["outcome"] not in ("passed", "refused")),
        "plain causes": group(row for row in rows["plain"] if row["outcome"] == "failed"),
    }


def group(rows: Iterable[Row]) -> list[Row]:
    """Return the causes of ``rows``, most frequent first; causes that differ in names and numbers are one."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        same = re.sub(r"attached to \w+|'[^']*'|[\d.]+", "*", row["cause"])
        groups.setdefault(f"{row['outcome']} {same}", []).append(row)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [{"cause": g[0]["cause"], "tests": len(g), "networks": sorted({r["network"] for r in g})} for g in ordered]


def draw(title: str, result: Row) -> str:
    """Return the table of two runs, and of those within their result."""
    columns = [(run, outcome) for run in ("plain", "attached") for outcome in OUTCOMES]
    columns = [(r, o) for r, o in columns if any(o in counts[r] for counts in result["kinds"].values())]
    lines = [f"{title}: {result['networks']} networks, {result['pass plain']} tests pass plain", ""]
    lines.append("| test | " + " | ".join(f"{name}: {outcome}" for name, outcome in columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    for kind, counts in result["kinds"].items():
        lines.append(f"| {kind} | " + " | ".join(str(counts[r].get(o, 0)) for r, o in columns) + " |")
    lines += ["", "Of those that pass plain, attached: " + str(result["of these attached"])]
    causes = [*result["refused"], *result["causes"]]
    lines += [f"  {one['tests']} × {one['cause']} ({', '.join(one['networks'][:8])})" for one in causes]
    if UNSCRIPTED.strip() in result:
        lines += ["", draw(title + UNSCRIPTED, result[UNSCRIPTED.strip()])]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites whose checkouts are given; return 1 if a test fails over attached networks alone."""
    parser = argparse.ArgumentParser(prog="python benchmarks/other_suites.py", description=__doc__.splitlines()[0])
    parser.add_argument("--timm", type=Path, help="checkout of huggingface/pytorch-image-models")
    parser.add_argument("--torchvision", type=Path, help="checkout of pytorch/vision")
    parser.add_argument("--only", default="*", help="pattern of test names, such as '*fx*resnet18*'; writes no file")
    options = parser.parse_args(arguments)
    checkouts = {suite: path.resolve() for suite in FILES if (path := getattr(options, suite)) is not None}
    if not checkouts:
        parser.error("give the sources of at least one suite: --timm FOLDER or --torchvision FOLDER")
    for suite, path in checkouts.items():
        if not (path / FILES[suite][0]).exists():
            parser.error(f"--{suite} {path} has no {FILES[suite][0]}; give a checkout of its repository")
    results = {}
    for suite, path in checkouts.items():
        made = describe_run(suite, path)
        results[suite] = {**made, **sum_up(run(suite, path, options.only))}
        print(draw(suite, results[suite]), "", sep="\n", flush=True)
        if options.only == "*":
            save(results)
    parts = [part for result in results.values() for part in (result, result.get(UNSCRIPTED.strip(), {}))]
    return int(any("failed" in part.get("of these attached", {}) for part in parts))


def describe_run(suite: str, checkout: Path) -> Row:
    """Return how the rows of a suite are made: command, machine, versions of the library and of its sources."""
    from ecanet.report import environment
    from ecanet.studies.bench.machine import find_cpu_name

    versions = [path.read_text() for name in VERSIONS if (path := checkout / name).exists()]
    found = re.search(r"\d[\w.+]*", versions[0]) if versions else None
    return {
        "command": f"python benchmarks/other_suites.py --{suite} FOLDER",
        "machine": find_cpu_name(),
        **environment(),
        "version": version(suite),
        "sources": f"version {found[0]}" if found else "unknown version",
    }


def save(results: dict[str, Row]) -> None:
    """Write the results of the suites that ran; those of another suite stay."""
    before = json.loads(RESULTS.read_text())["suites"] if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({"suites": {**before, **results}}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
