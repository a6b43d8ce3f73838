"""A run logs where it is asked to, which changes nothing of the run, and takes callbacks that resume with it."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import loggers
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger

from ecanet.errors import ConfigError
from ecanet.recipes import ModelConfig
from ecanet.training.checkpoints import AtomicCheckpointIO
from ecanet.training.loggers import choose_loggers, open_loggers
from tiny_runs import TINY, add_tiny, equal, run, weights

SERVICES = ("wandb", "mlflow")
SMALL = TINY.but(epochs=1, model=ModelConfig(name="resnet8"))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    add_tiny(monkeypatch)


class Service(Logger):
    """Stands for a logger of a service: it keeps what it was made with and what it was given."""

    def __init__(self, run_id: str | None = None, **settings: Any):
        super().__init__()
        self.settings, self.given_id = settings, run_id or settings.pop("id", None)
        self.metrics: list[str] = []
        self.recipe: Any = None
        type(self).made.append(self)

    made: list["Service"] = []  # noqa: RUF012 - each test has its own

    @property
    def name(self) -> str:
        return "service"

    @property
    def version(self) -> str:
        return self.given_id or f"run {len(self.made)}"

    @property
    def experiment(self) -> object:
        if "unreachable" in str(self.settings):
            raise RuntimeError("no answer\nafter 3 tries")
        return self

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.recipe = params

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics += metrics


@pytest.fixture
def services(monkeypatch, tmp_path):
    """Put packages called wandb and mlflow in reach, and `Service` in the place of Lightning's loggers for them."""
    folder = tmp_path / "packages"
    (folder / "wandb").mkdir(parents=True)
    (folder / "mlflow").mkdir()
    (folder / "wandb" / "__init__.py").write_text("run, ends = None, []\n\ndef finish(**how): ends.append(how)\n")
    (folder / "mlflow" / "__init__.py").write_text("def get_tracking_uri(): return 'sqlite:///mlflow.db'\n")
    monkeypatch.syspath_prepend(folder)
    for name, target in (("wandb", "WandbLogger"), ("mlflow", "MLFlowLogger")):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(loggers, target, Service)
    monkeypatch.setattr(Service, "made", [])
    yield Service.made
    for name in SERVICES:
        sys.modules.pop(name, None)


def results(folder: Path) -> tuple[Any, ...]:
    """Return what a run has written about itself, without times."""
    timed = ("images_per_second", "seconds", "started")
    report = json.loads((folder / "metrics.json").read_text())
    rows = [{k: v for k, v in row.items() if k not in timed} for row in report["history"]]
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    metrics = {k: v for k, v in report["metrics"].items() if k not in timed}
    return rows, metrics, header, sorted(report), json.loads((folder / "recipe.json").read_text())


def test_results_do_not_depend_on_the_loggers(tmp_path, services):
    plain = run(SMALL, tmp_path / "none", loggers="none")
    logged = run(SMALL, tmp_path / "all", loggers=["tensorboard", "csv", *SERVICES, CSVLogger(tmp_path / "own")])
    assert equal(weights(logged), weights(plain))
    assert results(logged.folder) == results(plain.folder)
    assert not (tmp_path / "none" / "tensorboard").exists()
    assert list((tmp_path / "all" / "tensorboard").glob("events*"))
    for folder in (tmp_path / "own" / "lightning_logs", tmp_path / "all" / "csv"):
        header = (folder / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"train_loss", "val_loss", "top1", "learning_rate", "images_per_second"} <= set(header)
    assert len(services) == 2
    for service in services:
        assert {"train_loss", "top1", "learning_rate"} <= set(service.metrics)
        assert service.recipe["optimizer"]["learning_rate"] == 0.02


def log_to(chosen: Any, folder: Path, *, resume: bool = False) -> list[Logger]:
    """Open the loggers of a run in ``folder``, log one value, and close them."""
    with open_loggers(choose_loggers(chosen, folder, resume=resume), TINY, folder, resume=resume) as opened:
        for logger in opened:
            logger.log_metrics({"top1": 1.0}, 0)
            logger.finalize("success")
    return opened


def test_a_resumed_run_logs_where_it_did(tmp_path, services):
    log_to("wandb, csv,mlflow", tmp_path)
    first = json.loads((tmp_path / "loggers.json").read_text())
    assert first == {"wandb": "run 1", "csv": "0", "mlflow": "run 2"}
    assert [service.given_id for service in services] == [None, None]
    log_to(None, tmp_path, resume=True)
    assert [service.given_id for service in services[2:]] == ["run 1", "run 2"]
    assert [service.recipe for service in services[2:]] == [None, None]
    for version in (0, 1):  # what was logged before is still there
        assert "top1" in (tmp_path / "csv" / f"version_{version}" / "metrics.csv").read_text()
    log_to("none", tmp_path, resume=True)
    log_to(None, tmp_path, resume=True)
    assert services[5].given_id == "run 2"
    assert len(services) == 6
    (tmp_path / "loggers.json").write_text("[")
    with pytest.raises(ConfigError, match=r"loggers\.json: cannot be read .* remove it, and choose loggers"):
        log_to(None, tmp_path, resume=True)


def test_the_default_is_tensorboard(tmp_path):
    for resume in (False, True):  # runs of older versions have no list of their loggers
        assert choose_loggers(None, tmp_path, resume=resume) == ["tensorboard"]
    for resume in (False, True):
        log_to(None, tmp_path, resume=resume)
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"tensorboard": "tensorboard"}
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 2


@pytest.mark.parametrize(("begun", "ends"), [(False, [{"exit_code": 0}, {"exit_code": 1}]), (True, [])])
def test_a_wandb_run_ends_with_the_run_that_began_it(tmp_path, services, monkeypatch, begun, ends):
    import wandb  # pyright: ignore[reportMissingImports]

    wandb.run = object() if begun else None
    monkeypatch.setattr(Service, "experiment", property(lambda self: setattr(wandb, "run", object())))
    log_to("wandb", tmp_path)
    wandb.run = wandb.run if begun else None
    with pytest.raises(ZeroDivisionError), open_loggers(["wandb"], TINY, tmp_path, resume=False):
        _ = 1 / 0
    assert wandb.ends == ends


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("tensorbord", "unknown logger 'tensorbord'; did you mean 'tensorboard'?"),
        ("csv,", "unknown logger ''; choose one of tensorboard, csv, wandb, mlflow, none"),
        ("csv,none", "unknown logger 'none'; leave it out beside others"),
        ([3], "unknown logger 3; choose one of tensorboard, csv, wandb, mlflow, none"),
        ("csv,wandb", "logger 'wandb' needs a package: pip install 'ecanet[wandb]'"),
        ("mlflow", "logger 'mlflow' needs a package: pip install 'ecanet[mlflow]'"),
    ],
)
def test_a_logger_that_is_not_there_is_one_line(tmp_path, monkeypatch, chosen, message):
    (tmp_path / "wandb").mkdir()  # as wandb itself leaves it where it runs; it is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError) as caught:
        run(TINY, tmp_path / "run", loggers=chosen)
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_the_extras_that_the_messages_name_exist():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert all(project["optional-dependencies"][name][0].startswith(name) for name in SERVICES)


def test_a_service_that_does_not_answer_is_one_line(tmp_path, services, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "unreachable")
    with pytest.raises(ConfigError) as caught:
        run(SMALL, tmp_path / "run", loggers="csv,mlflow")
    assert str(caught.value) == (
        "cannot log to mlflow: no answer; check MLFLOW_TRACKING_URI, such as sqlite:///mlflow.db"
    )
    assert not (tmp_path / "run" / "recipe.json").exists()  # so that the same command can be given again


def test_the_option_chooses_the_loggers(tmp_path, ecanet, monkeypatch):
    given: list[object] = []
    monkeypatch.setattr("ecanet.training.run", lambda *_, loggers, **__: given.append(loggers))
    assert ecanet("train", "digits", "--logger", "csv,wandb")[0] == 0
    assert ecanet("train", "digits")[0] == 0
    assert given == ["csv,wandb", None]


# callbacks


class Counter(L.Callback):
    """Counts the steps, and logs their number."""

    def __init__(self, kept: Any = None):
        self.steps, self.kept = 0, kept

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.steps += 1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("steps", float(self.steps))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "kept": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]


def test_callbacks_resume_with_their_run(tmp_path):
    run(SMALL, tmp_path / "run", callbacks=[Counter(torch.ones(2))])
    counter = Counter()
    resumed = run(SMALL.but(epochs=2), tmp_path / "run", callbacks=[counter], resume=True)
    assert counter.steps == 6
    assert [row["steps"] for row in resumed.history] == [3, 6]
    assert resumed.metrics["steps"] == 6


@pytest.mark.slow
def test_a_run_that_resumes_with_callbacks_ends_as_a_whole_one_without(tmp_path):
    plain = run(SMALL.but(epochs=3), tmp_path / "plain")
    run(SMALL.but(epochs=3), tmp_path / "run", callbacks=[Counter(), Stop()])
    resumed = run(SMALL.but(epochs=3), tmp_path / "run", callbacks=[Counter()], resume=True)
    assert equal(weights(resumed), weights(plain))
    stop = EarlyStopping("top1", mode="max", patience=1, min_delta=1000)
    stopped = run(SMALL.but(epochs=4), tmp_path / "stopped", callbacks=[stop])
    assert [row["epoch"] for row in stopped.history] == [1, 2]


class Stop(L.Callback):
    """Ends the run after its first epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize("kept", [Path("here"), Counter, lambda: 0, np.float32(1)], ids=lambda kept: str(type(kept)))
def test_a_checkpoint_that_could_not_be_read_again_is_not_written(read_back, tmp_path, kept):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    with pytest.raises(
        ConfigError, match=r"last\.ckpt was not written, .* a callback's state may hold tensors"
    ) as caught:
        AtomicCheckpointIO().save_checkpoint({"callbacks": {"mine": kept}}, path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([print], "callbacks must be a list of Lightning callbacks"),
        (Counter(), "callbacks must be a list of Lightning callbacks"),
        ([Counter(), Counter()], "cannot train like this: Found more than one stateful callback of type `Counter`"),
    ],
)
def test_other_callbacks_are_refused(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(TINY, tmp_path / "run", callbacks=wrong)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# the packages themselves, where they are installed


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVICES)
def test_the_real_packages_log_without_a_network(tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run(SMALL, tmp_path / "run", loggers=name)
    run(SMALL.but(epochs=2), tmp_path / "run", resume=True)
    if name == "wandb":
        ids = [p.name.rpartition("-")[2] for p in (tmp_path / "run" / "wandb").glob("offline-run-*")]
        assert len(ids) == 2
        assert len(set(ids)) == 1
    else:
        import mlflow  # pyright: ignore[reportMissingImports]

        client = mlflow.MlflowClient()
        (only,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
        assert len(client.get_metric_history(only.info.run_id, "top1")) == 2
