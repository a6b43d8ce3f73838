"""What the machine can do, and whether the kernels are right on it."""

import copy

import torch
import variants
from setting import Setting
from timing import interleave, summarize
from torch import nn

import ecanet
from ecanet import ops
from ecanet.ops import proof


def measure_ceilings(setting: Setting) -> dict[str, float]:
    """Return the bandwidth of a large copy and the rate of a large product of bfloat16 matrices."""
    source = torch.ones(setting.copied, dtype=torch.bfloat16, device=setting.device)
    target = torch.empty_like(source)
    x = torch.randn(setting.product, setting.product, device=setting.device, dtype=torch.bfloat16)
    times = interleave({"copy": lambda: target.copy_(source), "product": lambda: x @ x}, setting)
    copy_ms, product_ms = (summarize(times[name])["median"] for name in ("copy", "product"))
    return {
        "copy_tb_per_second": 2 * source.nbytes / copy_ms / 1e9,
        "product_tflop_per_second": 2 * setting.product**3 / product_ms / 1e9,
    }


def prove_kernels(setting: Setting) -> dict[str, dict[str, str]]:
    """Return for each dtype "right", or what is wrong with the kernels of the tails and of the expansion.

    These are the checks that the library itself makes before networks use the kernels. The rehearsal takes the
    smallest shapes.
    """
    from ecanet.ops.triton import expansion_proof

    if not setting.on_gpu:
        proof.SHAPES = proof.SHAPES[1:]
        expansion_proof.TRIED = dict(list(expansion_proof.TRIED.items())[:1])
    device = torch.device("cuda", 0) if setting.on_gpu else torch.device("cpu")
    return {
        str(dtype).removeprefix("torch."): {
            "tails": proof.find_failure(device, dtype) or "right",
            "expansion": proof.find_expansion_failure(device, dtype) or "right",
        }
        for dtype in setting.dtypes
    }


def compare_first_steps(setting: Setting) -> dict[str, object]:
    """Return the losses of the first training steps with kernels, with lean passes and in float64.

    All three start from the same weights. The kernels may differ from float64 about as much as the lean passes do.
    """
    torch.manual_seed(0)
    start = ecanet.create_model("resnet20" if setting.on_gpu else "resnet8", num_classes=10)
    losses = {
        "fused": train(start, "fused", torch.float32, setting),
        "lean": train(start, "lean", torch.float32, setting),
        "float64": train(start, "lean", torch.float64, setting),
    }
    errors = {
        f"{name} - float64": max(abs(x - y) for x, y in zip(losses[name], losses["float64"], strict=True))
        for name in ("fused", "lean")
    }
    return {"largest_difference": errors, "losses": losses}


def train(start: nn.Module, impl: str, dtype: torch.dtype, setting: Setting) -> list[float]:
    """Return the losses of a copy of ``start``, trained with SGD on random images."""
    model = variants.place(copy.deepcopy(start), setting).to(dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    count, side = (64, 32) if setting.on_gpu else (2, 16)
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1)).to(setting.device, dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(count, device=setting.device) % 10
    losses: list[torch.Tensor] = []
    with ops.prefer_impl("fused" if impl == "fused" else "lean"):
        for _ in range(setting.steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return [float(loss) for loss in losses]
