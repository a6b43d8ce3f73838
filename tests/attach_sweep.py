"""Attach to other people's networks and check every promise: `make sweep`, or this file as a command.

OMP_NUM_THREADS=1 python tests/attach_sweep.py                 # run all, write JSON and table
OMP_NUM_THREADS=1 python tests/attach_sweep.py resnet50 dla34  # run these, print
"""

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ecanet

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "attach-sweep.json"
TABLE = ROOT / "docs" / "attach-sweep.md"

_TORCHVISION = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 mnasnet0_5
mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5
squeezenet1_1 vgg11_bn wide_resnet50_2 swin_t"""

_TIMM = """botnet26t_256 coatnet_pico_rw_224 convformer_s18 convmixer_768_32 convnext_atto convnextv2_atto cpubone_nano
cs3darknet_focus_s csatv2 cspdarknet53 cspnext_tiny cspresnet50 darknet53 davit_tiny densenet121 dla34 dla46_c
dla60_res2net dm_nfnet_f0 dpn48b dpn68 eca_nfnet_l0 ecaresnet26t edgenext_xx_small efficientformer_l1
efficientformerv2_s0 efficientnet_b0 efficientnet_es efficientnet_lite0 efficientvim_m1 efficientvit_b0
efficientvit_m0 ese_vovnet19b_dw fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b focalnet_tiny_srf gernet_s ghostnet_050
ghostnetv2_100 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_next_atto inception_resnet_v2
inception_v3 inception_v4 lambda_resnet26t lcnet_050 lcnetv2_small legacy_seresnet18 legacy_xception levit_conv_128s
lowformer_b0 mambaout_femto maxvit_rmlp_pico_rw_256 mixnet_s mnasnet_050 mobilenetv1_100 mobilenetv2_100
mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 nextvit_small nf_regnet_b0
nf_resnet26 nfnet_l0 poolformer_s12 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_005
regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s res2next50 resnest14d resnet10t resnet18 resnet26d
resnet50 resnetaa50 resnetblur50 resnetv2_18 resnetv2_50 resnetv2_50d_evos resnetv2_50d_gn resnetv2_50x1_bit
resnext50_32x4d rexnet_100 selecsls42 seresnet50 shvit_s1 skresnet18 spnasnet_100 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 tf_efficientnetv2_b0 tinynet_e tresnet_m vgg11_bn visformer_tiny vovnet39a xception41
xception41p"""

TORCHVISION, TIMM = _TORCHVISION.split(), _TIMM.split()

SIZES = (64, 96, 128, 224, 256, 299)


def torchvision_network(name: str) -> nn.Module:
    """torchvision's network ``name`` with random weights."""
    from torchvision.models import get_model

    return get_model(name, **({"init_weights": False} if name in ("googlenet", "inception_v3") else {}))


def timm_network(name: str) -> nn.Module:
    """timm's network ``name`` with random weights."""
    import timm

    return timm.create_model(name)


def noise(*shape: int) -> Tensor:
    """Numbers between 0 and 1, always the same."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def faster_rcnn() -> tuple[nn.Module, tuple[Any, ...]]:
    """torchvision's Faster R-CNN with frozen batch norms, and two images of different sizes."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    model = FasterRCNN(backbone, num_classes=3, min_size=64, max_size=96, box_score_thresh=0.0)
    return model, ([noise(3, 64, 64), noise(3, 64, 80)],)


def retinanet() -> tuple[nn.Module, tuple[Any, ...]]:
    """torchvision's RetinaNet, and one image in a list."""
    from torchvision.models.detection import retinanet_resnet50_fpn

    options = {"min_size": 64, "max_size": 64, "score_thresh": 0.0, "num_classes": 3}
    return retinanet_resnet50_fpn(weights=None, weights_backbone=None, **options), ([noise(3, 64, 64)],)


def deeplabv3() -> tuple[nn.Module, tuple[Any, ...]]:
    """torchvision's DeepLabv3, which returns a dictionary."""
    from torchvision.models.segmentation import deeplabv3_resnet50

    return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3), (noise(2, 3, 64, 64),)


def smp_network(name: str, encoder: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """segmentation_models_pytorch's network ``name``."""
    import segmentation_models_pytorch as smp

    return getattr(smp, name)(encoder, encoder_weights=None), (noise(2, 3, 64, 64),)


def hugging_face(kind: str, **config: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """Hugging Face's model ``kind`` from a small configuration."""
    import transformers

    settings = getattr(transformers, f"{kind}Config")(**config)
    return getattr(transformers, f"{kind}ForImageClassification")(settings), (noise(2, 3, 64, 64),)


def yolo(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Ultralytics' detection network from its YAML."""
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(name, verbose=False), (noise(2, 3, 64, 64),)


def monai_resnet() -> tuple[nn.Module, tuple[Any, ...]]:
    """MONAI's 3-D ResNet."""
    from monai.networks.nets import resnet10

    return resnet10(spatial_dims=3, n_input_channels=1, num_classes=2), (noise(2, 1, 24, 24, 24),)


def monai_unet() -> tuple[nn.Module, tuple[Any, ...]]:
    """MONAI's 3-D U-Net with residual units."""
    from monai.networks.nets import UNet

    sizes = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}
    return UNet(spatial_dims=3, in_channels=1, out_channels=2, **sizes), (noise(2, 1, 16, 16, 16),)


class Block1d(nn.Module):
    """A residual block of a network for signals."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv1d(channels, channels, 5, padding=2), nn.BatchNorm1d(channels), nn.ReLU(),
            nn.Conv1d(channels, channels, 5, padding=2), nn.BatchNorm1d(channels), nn.Dropout(0.1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()


def signals() -> tuple[nn.Module, tuple[Any, ...]]:
    """A 1-D residual network, and two signals."""
    blocks = [Block1d(12) for _ in range(3)]
    return nn.Sequential(nn.Conv1d(2, 12, 7), *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten()), (noise(2, 2, 50),)


OTHERS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "faster_rcnn": faster_rcnn,
    "retinanet": retinanet,
    "deeplabv3": deeplabv3,
    "signals": signals,
    "smp-unet-resnet18": partial(smp_network, "Unet", "resnet18"),
    "smp-unet-timm": partial(smp_network, "Unet", "tu-convnext_atto"),
    "smp-deeplabv3plus": partial(smp_network, "DeepLabV3Plus", "resnet34"),
    "hf-resnet": partial(hugging_face, "ResNet", depths=[1, 2, 1, 1], hidden_sizes=[16, 32, 64, 64], embedding_size=16),
    "hf-convnext": partial(hugging_face, "ConvNext", depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 48, 64]),
    "hf-regnet": partial(hugging_face, "RegNet", depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 48, 64], groups_width=8),
    "yolo11n": partial(yolo, "yolo11n.yaml"),
    "yolov8n": partial(yolo, "yolov8n.yaml"),
    "yolov5n": partial(yolo, "yolov5n.yaml"),
    "monai-resnet10-3d": monai_resnet,
    "monai-unet-3d": monai_unet,
}
"""Detectors, segmentation networks, other libraries, other dimensions."""

EVALUATED_ONLY = ("faster_rcnn", "retinanet")
"""Their training needs boxes; the gradients of their backbones are those of any ResNet."""


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Move norm affines, running statistics, layer scales and skip gains away from 0, 1 and 1e-6.

    Fresh networks hide a wrong placement: a zero gamma makes any branch vanish.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> None:
        t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            vector = parameter.numel() == max(parameter.shape, default=1)
            if not vector or not parameter.is_floating_point():
                continue
            if name.endswith("bias"):
                uniform(parameter, -0.3, 0.3)
            else:
                uniform(parameter, 0.4, 0.9)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                uniform(buffer, -0.3, 0.3)
            elif name.endswith("running_var"):
                uniform(buffer, 0.5, 1.5)


def outputs(result: Any) -> list[Tensor]:
    """The floating-point tensors of whatever a model returns."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    if isinstance(result, dict):
        return [t for v in result.values() for t in outputs(v)]
    return [t for v in result for t in outputs(v)] if isinstance(result, tuple | list) else []


def equal(a: Any, b: Any) -> bool:
    """Whether two results are the same tensors bit for bit, and finite."""
    left, right = outputs(a), outputs(b)
    finite = all(bool(t.isfinite().all()) for t in left)
    return finite and len(left) == len(right) > 0 and all(map(torch.equal, left, right))


@torch.no_grad()
def evaluate(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The model's outputs in evaluation mode, always from the same random state."""
    torch.manual_seed(0)
    return model.eval()(*copy.deepcopy(inputs))


def gradients(model: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> tuple[dict[str, Tensor], Any]:
    """Gradients of a random projection of the training outputs in every parameter, and the outputs."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    result = model.train()(*copy.deepcopy(inputs))
    generator = torch.Generator().manual_seed(1)
    sum((t * torch.rand(t.shape, generator=generator)).sum() for t in outputs(result)).backward()  # pyright: ignore
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, result


def last_layers(gate: nn.Module) -> list[Tensor]:
    """The parameters that a neutral gate has at zero."""
    return list(gate.last_parameters())  # pyright: ignore[reportCallIssue]


def excite(gates: Iterable[nn.Module], seed: int = 0) -> None:
    """Random numbers in the last layers of ``gates``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates:
            for parameter in last_layers(gate):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def check(model: nn.Module, inputs: tuple[Any, ...], *, train: bool = True, **options: Any) -> list[Any]:
    """Attach to ``model`` and hold it to every promise; AssertionError says which is broken."""
    randomize(model)
    plain = copy.deepcopy(model)
    before, plain_state = evaluate(plain, inputs), copy.deepcopy(plain.state_dict())
    assert all(bool(t.isfinite().all()) for t in outputs(before)), "the plain network's outputs are not finite"
    flags = [(m, m.training) for m in model.train().modules()]
    ecanet.attach(model, **{"example": inputs, **options})
    assert all(m.training == training for m, training in flags), "a training flag changed"
    report = ecanet.attached(model)
    gates = [model.get_submodule(site.name) for site in report]

    assert equal(evaluate(model, inputs), before), "evaluation outputs differ"
    own = model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in plain_state.items()), "an old tensor changed"
    if train:
        check_gradients(model, plain, inputs, report)
        plain.load_state_dict(plain_state)
        model.load_state_dict(plain_state, strict=False)
    for gate in gates[:: max(1, len(gates) // 12)]:
        excite([gate])
        assert not equal(evaluate(model, inputs), before), "a gate has no effect"
        gate.neutralize()  # pyright: ignore[reportCallIssue]
    check_copies(model, plain, inputs, gates, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ecanet.detach(model)
    assert list(model.state_dict()) == list(plain_state), "keys after detach"
    assert all(torch.equal(v, plain_state[k]) for k, v in model.state_dict().items()), "tensors after detach"
    assert equal(evaluate(model, inputs), before), "outputs after detach"
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in plain.modules()], "hooks after detach"
    return report


def check_gradients(model: nn.Module, plain: nn.Module, inputs: tuple[Any, ...], report: Any) -> None:
    """In training: same outputs, same gradients of old parameters, and gradients that flow into every gate."""
    expected, result = gradients(plain, inputs)
    actual, attached_result = gradients(model, inputs)
    assert equal(attached_result, result), "training outputs differ"
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), f"the gradient of {name} differs"
    gates = {site.name: model.get_submodule(site.name) for site in report}
    for name, gate in gates.items():
        assert all(p.grad is not None for p in gate.parameters()), f"{name}: an unused parameter"
    # stochastic depth may drop both samples of a block: look again with other random numbers
    for seed in range(8):
        gates = {n: g for n, g in gates.items() if not all(p.grad is not None and p.grad.any() for p in last_layers(g))}
        if not gates:
            break
        gradients(model, inputs, seed + 1)
    assert not gates, f"{next(iter(gates))}: no gradient"


def check_copies(
    model: nn.Module, plain: nn.Module, inputs: tuple[Any, ...], gates: list[nn.Module], options: dict[str, Any]
) -> None:
    """State dict round trip and deepcopy, with gates that do something."""
    excite(gates, seed=1)
    expected = evaluate(model, inputs)
    again = ecanet.attach(copy.deepcopy(plain), **{"example": inputs, **options})
    missing = set(again.load_state_dict(plain.state_dict(), strict=False).missing_keys)
    added = set(again.state_dict()) - set(plain.state_dict())
    assert missing == {key for key in added if not key.endswith(".gain")}, "an old checkpoint misses more than gates"
    again.load_state_dict(model.state_dict())
    assert equal(evaluate(again, inputs), expected), "outputs after a state-dict round trip"
    twin = copy.deepcopy(model)
    assert equal(evaluate(twin, inputs), expected), "outputs of a deep copy"
    for site in ecanet.attached(twin):
        twin.get_submodule(site.name).neutralize()  # pyright: ignore[reportCallIssue]
    assert equal(evaluate(model, inputs), expected), "a deep copy shares its gates with the original"
    assert equal(evaluate(twin, inputs), evaluate(plain, inputs)), "a deep copy's gates do not act"
    for gate in gates:
        gate.neutralize()  # pyright: ignore[reportCallIssue]


def image_for(model: nn.Module) -> Tensor:
    """Two random images of the smallest size that ``model`` takes.

    Raises:
        RuntimeError: none will do.
    """
    wanted = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    for size in sorted({*SIZES, wanted[-1]}):
        image = noise(2, wanted[0], size, size)
        try:
            with torch.no_grad():
                copy.deepcopy(model).eval()(image)
                copy.deepcopy(model).train()(image)
        except Exception:  # too small, or not the size it was built for
            continue
        return image
    raise RuntimeError("no image size will do")


def run_case(library: str, name: str) -> dict[str, Any]:
    """One row of the table."""
    started = time.perf_counter()
    row: dict[str, Any] = {"library": library, "name": name}
    try:
        torch.manual_seed(0)
        if library == "others":
            model, inputs = OTHERS[name]()
        else:
            model = {"torchvision": torchvision_network, "timm": timm_network}[library](name)
            inputs = (image_for(model),)
        row["family"] = type(model).__module__.rpartition(".")[2]
        row["size"] = (inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]).shape[-1]
        report = check(model, inputs, train=name not in EVALUATED_ONLY)
        row |= {"sites": len(report), "first": report[0].after, "parameters": sum(s.parameters for s in report)}
        row["result"] = "pass"
    except Exception as error:  # the table gives every failure with its cause
        row["result"] = "fail"
        row["cause"] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def table(results: dict[str, Any]) -> str:
    """The committed page."""
    rows = results["rows"]
    lines = [
        "# Attach, architecture by architecture",
        "",
        "Each network is built with random weights; norm affines, running statistics, layer scales and skip gains are",
        'moved away from 0, 1 and 1e-6; then `ecanet.attach(model, "eca")` must leave evaluation and training outputs',
        "and the gradients of all old parameters as they were, bit for bit; every gate must get a gradient, and up to",
        "twelve of them, one at a time, must change the output; state dict, deep copy and detach must be exact.",
        "",
        f"Made by `{results['command']}` on {results['machine']}.",
        "",
    ]
    for library in ("torchvision", "timm", "others"):
        mine = [r for r in rows if r["library"] == library]
        if not mine:
            continue
        passed = [r for r in mine if r["result"] == "pass"]
        families = len({r["family"] for r in mine if "family" in r})
        lines += [f"## {library}: {len(passed)} of {len(mine)} pass, {families} families", ""]
        lines += [
            "| network | family | px | gates | first gate after | parameters added | result |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in mine:
            result = "pass" if r["result"] == "pass" else f"fail: {r['cause']}"
            cells = (
                r["name"],
                r.get("family"),
                r.get("size"),
                r.get("sites"),
                r.get("first"),
                r.get("parameters"),
                result,
            )
            lines.append("| " + " | ".join("" if c is None else str(c) for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these networks, without writing anything")
    chosen = parser.parse_args().names
    cases = [("torchvision", n) for n in TORCHVISION] + [("timm", n) for n in TIMM]
    cases += [("others", n) for n in OTHERS]
    rows = []
    for library, name in cases:
        if not chosen or name in chosen or f"{library}:{name}" in chosen:
            rows.append(run_case(library, name))
            print(" ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    if not chosen:
        import platform

        machine = (
            f"a {torch.get_num_threads()}-thread {platform.machine()} CPU, torch {torch.__version__.split('+')[0]}"
        )
        results = {
            "command": "OMP_NUM_THREADS=1 python tests/attach_sweep.py",
            "machine": machine,
            "rows": rows,
        }
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        TABLE.write_text(table(results))
    return sum(r["result"] != "pass" for r in rows) > 0


if __name__ == "__main__":
    sys.exit(main())
