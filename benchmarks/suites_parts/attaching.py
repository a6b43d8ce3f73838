"""A pytest plugin (`-p attaching`): other people's tests meet attached networks, and every outcome is written down.

It reads its orders, a JSON file, whose path is in the environment variable `SUITE_ORDERS`: ``suite`` (a name in
`BUILDERS`), ``attach`` (whether the networks are attached to), ``script`` (false leaves torchvision's check of
TorchScript out, and all tests that do not have it), ``networks`` (tests of other networks are left out), ``only`` (a
pattern of test names), ``outputs`` (a folder of stored outputs) and ``rows`` (a file that gets one JSON line for each
test).

torchvision's tests compare outputs with files of their checkout, which another version of PyTorch made: from the same
seed it initialises some networks with other numbers. So they read ``outputs`` instead, where plain networks have stored
theirs.
"""

import fnmatch
import functools
import importlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import ecanet
from ecanet.errors import EcanetError

ORDERS = json.loads(Path(os.environ["SUITE_ORDERS"]).read_text())

NEED_DOWNLOADS = {"test_model_inference", "test_model_load_pretrained", "test_model_features_pretrained"}
"""timm's tests that load weights from the internet."""

NAMED = {
    "test_resnet_dilation": "resnet50",
    "test_mobilenet_v2_residual_setting": "mobilenet_v2",
    "test_fasterrcnn_double": "fasterrcnn_resnet50_fpn",
    "test_feature_extraction_methods_equivalence": "resnet18",
    "test_deepcopy": "efficientnet_b3",
    "test_forward_negative_sample_mrcnn": "maskrcnn_resnet50_fpn",
    "test_forward_negative_sample_krcnn": "keypointrcnn_resnet50_fpn",
    "test_forward_negative_sample_retinanet": "retinanet_resnet50_fpn",
    "test_forward_negative_sample_fcos": "fcos_resnet50_fpn",
    "test_forward_negative_sample_ssd": "ssd300_vgg16",
}
"""The networks of torchvision's tests that name theirs in their code alone."""

SCRIPT_CHECK = "_check_jit_scriptable"
"""torchvision's function that scripts a network and compares the outputs."""

EXAMPLES = {"s3d": (1, 3, 16, 224, 224)}
"""Shapes of examples, for networks that take none of those which `attach` tries."""


class RefusedByAttachError(Exception):
    """`attach` refused a network: the test says nothing about attached networks."""


def attach_to_result(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return ``build``, whose networks now come attached."""

    @functools.wraps(build)
    def build_attached(*args: object, **kwargs: object) -> nn.Module:
        model = build(*args, **kwargs)
        try:
            shape = EXAMPLES.get(build.__name__)
            return ecanet.attach(model, example=torch.zeros(shape) if shape else None)
        except EcanetError as error:
            raise RefusedByAttachError(str(error)) from error

    return build_attached


def wrap_timm() -> None:
    """Wrap `timm.create_model` where tests import it; timm's own files import it from elsewhere."""
    import timm

    timm.create_model = attach_to_result(timm.create_model)


def wrap_torchvision() -> None:
    """Wrap the builders of `torchvision.models`, in its table of names and where tests find them.

    Builders that build on others (detectors) find those in their own files, unwrapped: nothing is attached to twice.
    """
    from torchvision import models
    from torchvision.models import _api

    wrapped = {build: attach_to_result(build) for build in _api.BUILTIN_MODELS.values()}
    _api.BUILTIN_MODELS.update({name: wrapped[build] for name, build in _api.BUILTIN_MODELS.items()})
    for package in (models, models.detection, models.segmentation, models.video, models.quantization):
        for name, value in list(vars(package).items()):
            if callable(value) and value in wrapped:
                setattr(package, name, wrapped[value])


BUILDERS = {"timm": wrap_timm, "torchvision": wrap_torchvision}
"""For each suite, the function that wraps its builders."""


def pytest_configure() -> None:
    """Import the installed library, not the checkout's, and wrap its builders before the tests are imported."""
    importlib.import_module(ORDERS["suite"])
    if ORDERS["attach"]:
        BUILDERS[ORDERS["suite"]]()


def find_network(item: pytest.Item) -> str:
    """Return the name of the network that a test is about, without the tag of its weights; "" for none."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    named = params.get("model_name") or params.get("name") or getattr(params.get("model_fn"), "__name__", "")
    return str(named or NAMED.get(find_kind(item), "")).partition(".")[0]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep one test of each kind and parameters for each chosen network."""
    kept, seen = [], set()
    for item in items:
        network, kind = find_network(item), find_kind(item)
        tag = str(getattr(getattr(item, "callspec", None), "params", {}).get("model_name", "")).partition(".")[2]
        name = item.nodeid.replace(f".{tag}", "") if tag else item.nodeid
        wanted = network in ORDERS["networks"] and kind not in NEED_DOWNLOADS and fnmatch.fnmatch(name, ORDERS["only"])
        if wanted and name not in seen and (ORDERS["script"] or checks_script(item)):
            seen.add(name)
            kept.append(item)
    items[:] = kept
    for module in {item.getparent(pytest.Module).obj for item in items}:
        adapt(module)


def checks_script(item: pytest.Item) -> bool:
    """Return whether a test calls torchvision's check of TorchScript."""
    return SCRIPT_CHECK in inspect.unwrap(item.obj).__code__.co_names


def adapt(module: ModuleType) -> None:
    """Exchange the functions of torchvision's tests that find stored outputs and, if so ordered, check TorchScript."""
    if hasattr(module, "_get_expected_file"):
        module._get_expected_file = lambda name: str(Path(ORDERS["outputs"]) / f"{name}.pkl")
    if hasattr(module, SCRIPT_CHECK) and not ORDERS["script"]:
        setattr(module, SCRIPT_CHECK, lambda *args, **kwargs: None)


def find_kind(item: pytest.Item) -> str:
    """Return the name of a test's function."""
    return str(getattr(item, "originalname", item.name))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Write one line about a test when its outcome is known."""
    report = yield
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        outcome, cause = judge(report.outcome, call.excinfo.value if call.excinfo else None)
        row = {
            "test": item.nodeid.rpartition("/")[2],
            "kind": find_kind(item),
            "network": find_network(item),
            "outcome": outcome,
            "cause": cause,
            "seconds": round(report.duration, 2),
        }
        with Path(ORDERS["rows"]).open("a") as file:
            print(json.dumps(row), file=file)
    return report


def judge(outcome: str, error: BaseException | None) -> tuple[str, str]:
    """Return the outcome of a test and the first line of its error."""
    if error is None or outcome == "passed":
        return outcome, ""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    for one in chain:
        line = (str(one).strip() or type(one).__name__).splitlines()[0][:300]
        if isinstance(one, RefusedByAttachError):
            return "refused", line
        if isinstance(one, EcanetError) and line.startswith("torch.jit.script cannot read"):
            return "not scripted", line
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return outcome, f"{type(error).__name__}: {line}"
