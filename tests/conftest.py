"""Settings of every test run: the Triton interpreter, the profiles of random tests, and the command line."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest


def register_profiles() -> None:
    """Draw the same random cases in every run, so that a failure can be repeated, whatever the machine's speed."""
    from hypothesis import HealthCheck, settings

    common = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("default", max_examples=40, derandomize=True, **common)
    settings.register_profile("thorough", max_examples=4000, **common)
    settings.load_profile("default")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose where kernels run, before anything imports Triton: compiled with ``-m gpu`` on a GPU, else interpreted.

    So no test hands a tensor of the CPU to a compiled kernel: those that are not marked run in the interpreter.
    With ``-n``, the first process only hands out tests to others, which begin when it is ready: it imports nothing.
    """
    hands_out = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if hands_out and not config.getoption("--hypothesis-profile"):
        return
    import torch

    import tensors
    from quick_interpreter import run_in_interpreter
    from quick_runs import speed_up_runs
    from quick_weights import speed_up_drawing

    register_profiles()
    speed_up_drawing()
    speed_up_runs()
    os.fsync = lambda descriptor: None  # no test cuts the power
    gc.disable()  # until the tests are collected: the collector would walk through all modules again and again
    config.add_cleanup(gc.unfreeze)  # the first to be added is the last to run, after pytest's own five collections
    chosen = config.option.markexpr
    if torch.cuda.is_available() and "gpu" in chosen and "not gpu" not in chosen:
        tensors.DEVICE = "cuda"
    else:
        run_in_interpreter()


def pytest_collection_finish() -> None:
    """Let the garbage collector leave out what stays to the end, modules and collected tests, and come less often."""
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


@pytest.fixture(autouse=True)
def make_tensors_on_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make the tensors of a test that is marked ``gpu`` on the GPU, if kernels are compiled."""
    import torch

    import tensors

    if tensors.DEVICE == "cpu" or not request.node.get_closest_marker("gpu"):
        yield
        return
    with torch.device(tensors.DEVICE):
        yield


@pytest.fixture(autouse=True, scope="session")
def run_passes_on_small_tensors() -> Iterator[None]:
    """Let gates alone take the passes in training: the tensors of tests are small, and those of networks are not."""
    from ecanet.ops import lean

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "SMALL_SCALE", 0)
        yield


@pytest.fixture(autouse=True, scope="module")
def leave_figures_out(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """Leave the drawings out of the pages of runs, which take longer than the runs of the tests.

    The tests of ``tests/report`` look at drawings; any other test that does so takes the fixture ``figures``.
    """
    from ecanet.report import figures as module

    with pytest.MonkeyPatch.context() as patch:
        drawing = {name: draw for name, draw in vars(module).items() if name.startswith("plot_")}
        if request.path.parent.name != "report":
            for name in drawing:
                patch.setattr(module, name, lambda *values: "")
        yield drawing


@pytest.fixture
def figures(leave_figures_out: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the figures of pages as a user's run does."""
    for name, draw in leave_figures_out.items():
        monkeypatch.setattr(f"ecanet.report.figures.{name}", draw)


@pytest.fixture
def read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read each checkpoint before it has its name, as a user's run does."""
    monkeypatch.setattr("quick_runs.reads_back", True)


@pytest.fixture
def interpreter() -> None:
    """Skip a test that looks into Triton's interpreter, or takes the CPU for a GPU, if kernels are compiled."""
    import tensors

    if tensors.DEVICE != "cpu":
        pytest.skip("needs Triton's interpreter")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Count the random tests among the slow ones under ``--hypothesis-profile=thorough``."""
    if config.getoption("--hypothesis-profile") == "thorough":
        for item in items:
            if item.get_closest_marker("random_cases"):
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def ecanet(monkeypatch, capsys, tmp_path):
    """Return a function that runs a command line in an empty folder: exit code, standard output, standard error."""
    from ecanet.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["ecanet", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return call
