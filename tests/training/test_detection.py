"""Detectors: their cost, their trainable parameters, their scores, their runs, and the detect command."""

import copy
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ecanet import create_model
from ecanet.attention.base import Attention
from ecanet.data.annotations import read_annotations
from ecanet.data.boxes import DetectionDataset
from ecanet.data.coco import decode_mask
from ecanet.data.scenes import SceneConfig, make_scenes
from ecanet.errors import ConfigError, DataError
from ecanet.models.detection import DETECTORS, create_detector
from ecanet.recipes import find, with_settings
from ecanet.report import Report
from ecanet.studies.cost import count
from ecanet.training.tasks.outcome import METRICS, Outcome, compute_average_precision, is_correct

SMALL = {"num_classes": 10, "small": True, "short_side": 128}


def trainable(name, backbone, attention):
    with torch.device("meta"):
        model = create_detector(name, backbone, attention=attention, freeze_attention=True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# Millions of parameters in the paper's Table 5, for no attention, SE and ECA.
TABLE_5 = {
    ("faster_rcnn", "resnet50"): ("41.53", "44.02", "41.53"),
    ("faster_rcnn", "resnet101"): ("60.52", "65.24", "60.52"),
    ("mask_rcnn", "resnet50"): ("44.18", "46.67", "44.18"),
    ("mask_rcnn", "resnet101"): ("63.17", "67.89", "63.17"),
    ("retinanet", "resnet50"): ("37.74", "40.23", "37.74"),
    ("retinanet", "resnet101"): ("56.74", "61.45", "56.74"),
}


@pytest.mark.parametrize(
    ("name", "backbone"), [pytest.param(*cell, marks=[pytest.mark.slow] * (cell[1] == "resnet101")) for cell in TABLE_5]
)
def test_trainable_parameters_are_the_papers(name, backbone):
    measured = tuple(f"{trainable(name, backbone, a) / 1e6:.2f}" for a in ("none", "se", "eca"))
    assert measured == TABLE_5[name, backbone]


def test_plain_counts_are_known_exactly():
    assert [trainable(name, "resnet50", "none") for name in DETECTORS] == [41_531_812, 44_175_349, 37_743_348]


@pytest.mark.parametrize(
    ("backbone", "added"), [("resnet50", "0.11"), pytest.param("resnet101", "0.18", marks=pytest.mark.slow)]
)
def test_the_gates_add_what_the_paper_prints(backbone, added):
    with torch.device("meta"):
        plain, eca = (count(create_model(backbone, attention=a), (3, 800, 1280)) for a in ("none", "eca"))
    assert f"{(eca.operations - plain.operations) / 1e9:.2f}" == added


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    folder = make_scenes(SceneConfig(train=4, held_out=4), tmp_path_factory.mktemp("scenes"))
    return DetectionDataset(read_annotations(folder / "annotations" / "instances_train2017.json", folder / "train2017"))


def batch(data):
    items = [data[at, False] for at in range(len(data))]
    return [image.float() / 255 for image, _ in items], [target for _, target in items]


def cross(names, others):
    """Return all pairs: the first of ``names`` with each of ``others`` and each name with the first are not slow."""
    return [
        pytest.param(name, other, marks=[pytest.mark.slow] * (at > 0 and other != others[0]))
        for at, name in enumerate(names)
        for other in others
    ]


@pytest.mark.parametrize(("name", "norm"), cross(DETECTORS, ["train", "eval", "frozen"]))
def test_frozen_parameters_do_not_change_and_every_gate_has_a_gradient(name, norm, some):
    torch.manual_seed(0)
    model = create_detector(name, "resnet18", norm=norm, **SMALL)
    before = copy.deepcopy(model.state_dict())
    images, targets = batch(some)
    model.train()
    torch.stack(list(model(images, targets).values())).sum().backward()
    gates = [p for m in model.modules() if isinstance(m, Attention) for p in m.parameters()]
    assert len(gates) >= 6
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates)
    body = model.backbone.body
    assert not any(p.requires_grad for p in (body.conv1.weight, body.bn1.weight, body.layer1[0].conv1.weight))
    assert body.layer2[0].conv1.weight.grad is not None
    assert body.layer2[0].bn1.weight.requires_grad == (norm != "frozen")
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    if norm == "train":
        assert moved
        assert not any(k.startswith(("backbone.body.bn1", "backbone.body.layer1")) for k in moved)
        assert "backbone.body.layer2.0.bn1.running_mean" in moved
    else:
        assert not moved


def test_frozen_stages_and_frozen_gates():
    model = create_detector("faster_rcnn", "resnet18", frozen_stages=0, **SMALL)
    assert all(p.requires_grad for p in model.parameters())
    model = create_detector("faster_rcnn", "resnet18", frozen_stages=2, freeze_attention=True, **SMALL)
    still = {n.split(".")[2] for n, p in model.named_parameters() if not p.requires_grad}
    assert still == {"conv1", "bn1", "layer1", "layer2"}
    assert not any(p.requires_grad for p in model.backbone.body.layer2.parameters())
    with pytest.raises(ConfigError, match="frozen_stages must be 0 to 3"):
        # A small Faster R-CNN does not use the fourth stage.
        create_detector("faster_rcnn", "resnet18", frozen_stages=4, **SMALL)
    with pytest.raises(ConfigError, match="frozen_stages must be 0 to 4"):
        create_detector("retinanet", "resnet18", frozen_stages=5, **SMALL)


@pytest.mark.parametrize(("name", "backbone"), cross(DETECTORS, ["resnet20", "mobilenet_v2", "resnet18"]))
def test_every_backbone_fits_every_detector(name, backbone, some):
    model = create_detector(name, backbone, attention="se", **SMALL)
    images, targets = batch(some)
    losses = model(images[:1], targets[:1])
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        found = model.eval()(images[:1])[0]
    assert {"boxes", "labels", "scores"} <= found.keys()
    assert ("masks" in found) == (name == "mask_rcnn")


def test_an_empty_image_gives_finite_losses(some):
    images, targets = batch(some)
    empty = {k: v[:0] for k, v in targets[0].items() if k != "image_id"}
    for name in DETECTORS:
        losses = create_detector(name, "resnet20", **SMALL)(images[:1], [empty])
        assert all(loss.isfinite() for loss in losses.values()), name


def test_the_backbone_takes_classification_weights(tmp_path):
    network = create_model("resnet18", num_classes=7)
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "weights.pth")
    model = create_detector("retinanet", "resnet18", weights=tmp_path / "weights.pth", **SMALL)
    own = model.backbone.body.state_dict()
    assert own
    assert all(torch.equal(own[k], network.state_dict()[k]) for k in own)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"name": "yolo"}, "faster_rcnn, mask_rcnn, retinanet"),
        ({"norm": "group"}, "'eval', 'frozen' or 'train'"),
        ({"num_classes": 0}, "num_classes"),
        ({"short_side": 0}, "positive"),
        ({"backbone": "resnet5"}, "unknown model"),
    ],
)
def test_mistakes_are_named(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        create_detector(**{"name": "faster_rcnn", "backbone": "resnet18", **settings})


def test_retinanet_refuses_labels_below_one(some):
    images, targets = batch(some)
    targets[0] = {**targets[0], "labels": targets[0]["labels"] * 0}
    with pytest.raises(ConfigError, match="labels count from 1"):
        create_detector("retinanet", "resnet20", **SMALL)(images, targets)


# scores


def perfect(data):
    found = []
    for at in range(len(data)):
        target = data[at, False][1]
        sure = torch.ones(len(target["labels"]))
        masks = target["masks"][:, None].float()
        found.append({"boxes": target["boxes"], "labels": target["labels"], "scores": sure, "masks": masks})
    return found


def test_perfect_predictions_score_one_and_none_score_zero(some):
    images, targets = batch(some)
    outcome = Outcome(some.annotations)
    outcome.add(images, targets, perfect(some))
    scores = outcome.score()
    # Each metric is a mean of some hundred ones.
    assert {round(v, 12) for v in scores.values()} - {-1} == {1.0}
    assert set(scores) == {*METRICS, *(f"mask_{name}" for name in METRICS)}
    assert all(example["right"] for example in outcome.examples)
    nothing = Outcome(some.annotations)
    nothing.add(images, targets, [{k: v[:0] for k, v in found.items()} for found in perfect(some)])
    assert {v for v in nothing.score().values() if v != -1} == {0.0}
    assert not any(example["right"] for example in nothing.examples)
    # Objects on images that could not be read do not count.
    part = Outcome(some.annotations)
    part.add(images[:2], targets[:2], perfect(some)[:2])
    assert {round(v, 12) for v in part.score().values()} - {-1} == {1.0}


def test_scores_are_those_of_pycocotools_on_the_files(some, tmp_path):
    images, targets = batch(some)
    random = torch.Generator().manual_seed(0)
    found = perfect(some)
    for each in found:
        n = len(each["labels"])
        each["boxes"] = each["boxes"] + torch.randn(n, 4, generator=random) * 1.5
        each["scores"] = torch.rand(n, generator=random)
        each["masks"] = each["masks"].roll(1, -1)
        each["labels"] = torch.where(torch.rand(n, generator=random) < 0.2, 1, each["labels"])
    outcome = Outcome(some.annotations)
    outcome.add(images, targets, found)
    scores = outcome.score()
    file = some.annotations.pictures[0].path.parents[1] / "annotations" / "instances_train2017.json"
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        (tmp_path / "found.json").write_text(json.dumps(outcome.results[kind]))
        with redirect_stdout(None):
            truth = COCO(str(file))
            scoring = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), kind)
            scoring.evaluate()
            scoring.accumulate()
            scoring.summarize()
        assert [scores[prefix + name] for name in METRICS] == scoring.stats[:6].tolist()
        assert 0 < scores[prefix + "AP"] < 1


def test_an_example_is_correct_if_every_object_is_found(some):
    target, found = some[0, False][1], perfect(some)[0]
    assert is_correct(target, found)
    assert not is_correct(target, {**found, "labels": found["labels"] % 10 + 1})
    assert not is_correct(target, {**found, "boxes": found["boxes"] + 40})
    assert not is_correct(target, {**found, "scores": found["scores"] * 0.4})


# runs


def test_the_papers_recipe():
    from ecanet.training.tasks import learning_rate_factor

    recipe = find("coco:/data")
    o = recipe.optimizer
    assert (recipe.epochs, recipe.data.batch_size, recipe.data.image_size) == (12, 8, 800)
    assert (o.learning_rate, o.base_batch, o.momentum, o.weight_decay) == (0.01, 8, 0.9, 1e-4)
    assert recipe.data.name == "coco:/data"
    rates = [learning_rate_factor(recipe.schedule, epoch, 12) for epoch in (1, 7.99, 8, 10.99, 11, 11.9)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-12)


def tiny(monkeypatch, tmp_path, **settings):
    """Return the scenes recipe on eight scenes, with ``settings`` changed."""
    few = SceneConfig(train=8, held_out=4)
    monkeypatch.setattr("ecanet.data.boxes.SceneConfig", lambda **_: few)
    changes = {"data.root": str(tmp_path / "scenes"), "data.batch_size": 4, "detector.backbone": "resnet8"}
    return with_settings(find("scenes"), {**changes, "epochs": 2, **settings})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of one epoch, which no test changes."""
    from ecanet.training.trainer import run

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        return run(tiny(patch, folder, epochs=1), folder=folder / "run", device="cpu", quiet=True).folder


def test_a_run_writes_its_results_and_resumes_exactly(monkeypatch, tmp_path, figures):
    import lightning as L

    from ecanet.training.trained import evaluate
    from ecanet.training.trainer import run

    recipe = tiny(monkeypatch, tmp_path)
    whole = run(recipe, folder=tmp_path / "whole", device="cpu", quiet=True)

    class Stop(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise RuntimeError("cut off")

    made = L.Trainer.__init__
    monkeypatch.setattr(
        L.Trainer, "__init__", lambda self, **o: made(self, **{**o, "callbacks": [*o["callbacks"], Stop()]})
    )
    with pytest.raises(RuntimeError, match="cut off"):
        run(recipe, folder=tmp_path / "cut", device="cpu", quiet=True)
    monkeypatch.setattr(L.Trainer, "__init__", made)
    resumed = run(recipe, folder=tmp_path / "cut", resume=True, device="cpu", quiet=True)
    states = [torch.load(r.last_checkpoint, weights_only=True)["state_dict"] for r in (whole, resumed)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert whole.metrics["AP"] == resumed.metrics["AP"]
    for kind in ("bbox", "segm"):
        assert isinstance(json.loads((tmp_path / "whole" / "results" / f"{kind}.json").read_text()), list)
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "Precision by recall" in page
    assert "Detections" in page
    scores = evaluate(whole.last_checkpoint, device="cpu")
    assert scores["AP"] == whole.metrics["AP"]
    assert (tmp_path / "whole" / "checkpoints" / "last-results" / "bbox.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_overfits_four_images(name, some):
    torch.manual_seed(0)
    model = create_detector(name, "resnet20", norm="train", frozen_stages=0, **SMALL)
    images, targets = batch(some)
    steps = 400
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        loss = torch.stack(list(model(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    outcome = Outcome(some.annotations)
    with torch.no_grad():
        outcome.add(images, targets, model.eval()(images))
    scores = outcome.score()
    assert scores["AP50"] == pytest.approx(1.0)
    if name == "mask_rcnn":
        assert scores["mask_AP50"] == pytest.approx(1.0)


def test_no_detections_score_zero(some):
    truth = some.annotations.to_coco()
    figures, curve = compute_average_precision(truth, [], "segm", [p.id for p in some.annotations.pictures])
    assert figures["AP"] == 0
    assert set(curve) == {0.0}


def test_detect_draws_and_lists_what_is_found(monkeypatch, tmp_path, some):
    from ecanet.data.sources import DataSpec
    from ecanet.training.detections import detect
    from ecanet.training.tasks import build

    recipe = tiny(monkeypatch, tmp_path)
    spec = DataSpec(class_names=tuple("0123456789"), channels=3, size=128, mean=(0.5,) * 3, std=(0.2,) * 3)
    task = build(recipe, spec)
    found = perfect(some)
    # The network returns known detections, so the expected files are known.
    monkeypatch.setattr(task.model, "forward", lambda images, targets=None: [dict(found[0])])
    path = some.annotations.pictures[0].path
    answers = list(detect(task, [path, path], tmp_path / "out"))
    boxes, labels = found[0]["boxes"], found[0]["labels"]
    listed = json.loads((tmp_path / "out" / f"{path.stem}.json").read_text())["objects"]
    assert [o["name"] for o in listed] == [str(label - 1) for label in labels.tolist()]
    assert listed[0]["box"] == [*boxes[0, :2].tolist(), *(boxes[0, 2:] - boxes[0, :2]).tolist()]
    assert decode_mask(listed[0]["mask"], *found[0]["masks"].shape[-2:]).tolist() == found[0]["masks"][0, 0].tolist()
    assert len({answer["picture"] for answer in answers}) == 2
    from ecanet.data.pictures import read_image

    assert not torch.equal(read_image(answers[0]["picture"], 3), read_image(path, 3))
    found[0]["scores"] = found[0]["scores"] * 0.3
    assert next(detect(task, [path], tmp_path / "low"))["objects"] == []
    enlarged = read_image(tmp_path / "low" / f"{path.stem}.png", 3)
    assert torch.equal(enlarged[:, ::3, ::3], read_image(path, 3))
    assert enlarged.shape[1:] == (384, 384)


def test_detect_never_overwrites_its_images(monkeypatch, tmp_path, some):
    import shutil

    from ecanet.data.sources import DataSpec
    from ecanet.training.detections import detect
    from ecanet.training.tasks import build

    spec = DataSpec(class_names=tuple("0123456789"), channels=3, size=128, mean=(0.5,) * 3, std=(0.2,) * 3)
    task = build(tiny(monkeypatch, tmp_path), spec)
    photo = shutil.copy(some.annotations.pictures[0].path, tmp_path / "photo.png")
    with pytest.raises(ConfigError, match=r"photo\.png would be overwritten; choose another --out"):
        next(detect(task, [photo], tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        next(detect(task, [photo], photo))
    # A broken file yields its error, and the next file is read.
    (tmp_path / "broken.png").write_bytes(b"no image")
    answers = list(detect(task, [tmp_path / "broken.png", photo], tmp_path / "out"))
    assert isinstance(answers[0], DataError)
    assert answers[1]["path"] == str(photo)


def test_a_picture_is_enlarged_within_bounds():
    from ecanet.report.pictures import draw_detections

    nothing = {"boxes": torch.empty(0, 4)}
    assert draw_detections(torch.zeros(3, 100, 200, dtype=torch.uint8), nothing, []).shape == (3, 400, 800)
    assert draw_detections(torch.zeros(3, 1, 1333, dtype=torch.uint8), nothing, []).shape == (3, 1, 1333)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"task": "classification", "model.name": "resnet20"}, "set task=detection"),
        ({"data.name": "digits"}, "detection needs annotated images"),
    ],
)
def test_settings_of_the_other_task_are_refused(monkeypatch, tmp_path, settings, complaint):
    from ecanet.data.sources import DataSpec
    from ecanet.training.tasks import build

    spec = DataSpec(class_names=tuple("0123456789"), channels=3, size=128, mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(ConfigError, match=complaint):
        build(tiny(monkeypatch, tmp_path, **settings), spec)


def test_unreadable_images_neither_train_nor_count(monkeypatch, tmp_path, capsys):
    from ecanet import data
    from ecanet.training.trained import evaluate
    from ecanet.training.trainer import run

    recipe = tiny(monkeypatch, tmp_path, **{"data.batch_size": 1, "data.on_corrupt": "skip", "epochs": 1})
    module = data.build(recipe.data)
    for part, kept in ((module.train, 2), (module.held_out, 3)):
        for picture in part.annotations.pictures[kept:]:
            picture.path.write_bytes(picture.path.read_bytes()[:50])
    report = run(recipe, folder=tmp_path / "run", device="cpu", quiet=True)
    last = report.last_checkpoint
    skipped = evaluate(last, device="cpu")
    with pytest.raises(DataError, match="on-corrupt skip"):
        evaluate(last, device="cpu", on_corrupt="error")
    # A removed image and an unreadable one give the same metrics.
    picture = module.held_out.annotations.pictures[3].path
    picture.unlink()
    assert evaluate(last, device="cpu") == skipped
    for picture in module.held_out.annotations.pictures[:3]:
        picture.path.write_bytes(b"no image")
    with pytest.raises(DataError, match="not one held-out image could be read"):
        evaluate(last, device="cpu")


def test_metrics_are_returned_if_result_files_cannot_be_written(monkeypatch, tmp_path, capsys, finished):
    from ecanet.training import trained

    tiny(monkeypatch, finished.parent)
    place = Path(shutil.copytree(finished, tmp_path / "run"))
    (place / "checkpoints" / "last-results").write_text("in the way")
    scores = trained.evaluate(place / "checkpoints" / "last.ckpt", device="cpu")
    assert scores["AP"] == Report.read(finished).metrics["AP"]
    assert "result files were not written" in capsys.readouterr().err


def test_functions_for_classifiers_refuse_a_detector(some, finished):
    from ecanet.training import restore, trained

    with pytest.raises(ConfigError, match="mask_rcnn is a detector; use ecanet detect"):
        next(trained.predict(restore(finished), [some.annotations.pictures[0].path]))


@pytest.mark.parametrize("setting", [{"mixup": 0.8}, {"loss": "bce"}, {"label_smoothing": 0.1}, {"cutmix": 1.0}])
def test_losses_of_the_other_task_are_refused_in_training(monkeypatch, tmp_path, setting):
    from ecanet.training.trainer import run

    with pytest.raises(ConfigError, match=f"{next(iter(setting))} is for classification"):
        run(tiny(monkeypatch, tmp_path, **setting), folder=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_detect_by_the_command_line(tmp_path, some, ecanet, finished):
    shutil.copytree(finished, tmp_path / "run")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        shutil.copy(some.annotations.pictures[number].path, photos / f"{number}.png")
    before = (photos / "0.png").read_bytes()
    code, _, err = ecanet("detect", "run", "photos", "--out", "photos")
    assert (code, err.count("\n")) == (2, 1)
    assert (photos / "0.png").read_bytes() == before
    # The output folder may be below the images or above them. A second run does not read the first run's pictures.
    for out in ("photos/found", "photos/found", "."):
        code, lines, _ = ecanet("detect", "run", "photos" if out != "." else "photos/0.png", "--out", out)
        assert (code, len(lines.splitlines())) == (0, 1 if out == "." else 2)
    shutil.rmtree(photos / "found")
    (photos / "2.png").write_bytes(b"no image")
    code, text, err = ecanet("detect", "run", "photos", "--out", "found", "--json", "--on-corrupt", "skip")
    assert [Path(answer["path"]).name for answer in json.loads(text)] == ["0.png", "1.png"]
    assert err.startswith("skipped: photos/2.png")
    code, text, err = ecanet("detect", "run", "photos", "--out", "found")
    assert (code, len(text.splitlines())) == (2, 2)
    assert "2.png" in err


def test_eval_prints_json_and_nothing_else(monkeypatch, tmp_path, ecanet):
    from ecanet import data
    from ecanet.training.trainer import run

    recipe = tiny(monkeypatch, tmp_path, epochs=1)
    run(recipe, folder=tmp_path / "run", device="cpu", quiet=True)
    picture = data.build(recipe.data).held_out.annotations.pictures[0].path
    picture.write_bytes(picture.read_bytes()[:50])
    code, text, err = ecanet("eval", "run", "--on-corrupt", "skip", "--json")
    assert code == 0
    assert "AP" in json.loads(text)
    assert "skipped: " in err
    # The data folder of the run is not used for other data.
    scenes_folder = picture.parents[1]
    code, _, err = ecanet("eval", "run", "--data", f"coco:{scenes_folder}", "--on-corrupt", "skip")
    assert code == 0, err
