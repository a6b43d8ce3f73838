"""The networks of the paper: their gates' parameters, their equations, and files like the authors' released ones."""

import re

import torch
import torchvision
from torch.nn import functional as F

GATES = {
    "resnet18": (44, 36, 24),
    "resnet34": (72, 74, 48),
    "resnet50": (80, 86, 48),
    "resnet101": (157, 171, 99),
    "resnet152": (234, 256, 150),
    "mobilenet_v2": (31, 59, 51),
}
"""Parameters of all gates: in the released checkpoints, with the sizes of Equation 12, and with size 3 everywhere."""

RELEASED = {
    "resnet18": (3, 5, 7, 7),
    "resnet34": (3, 3, 5, 7),
    "resnet50": (3, 5, 5, 7),
    "resnet101": (3, 3, 5, 7),
    "resnet152": (3, 3, 5, 7),
}
"""Kernel sizes in the names of the authors' released files."""


def randomize(model, seed=0):
    """Give every tensor of ``model`` a value away from 0 and 1, so that nothing hides behind a fresh network."""
    g = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=g)
            if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
                state[name] = (1.0 if name.endswith("running_var") else 0.3) + 0.1 * noise.abs()
            elif tensor.dim() == 1:
                state[name] = 0.1 * noise
            elif tensor.dim() == 3:
                state[name] = 2 * noise
            else:
                state[name] = noise * (2 / max(1, tensor[0].numel())) ** 0.5
    model.load_state_dict(state)
    return model.eval()


def recompute_gate(x, kernel):
    """ECA from its definition: means, taps over zero-padded channels, sigmoid, product."""
    taps = kernel.flatten()
    means = F.pad(x.flatten(2).mean(2), (len(taps) // 2, len(taps) // 2))
    logits = sum(taps[j] * means[:, j : j + x.shape[1]] for j in range(len(taps)))
    return x / (1 + torch.exp(-logits))[:, :, None, None]


def recompute(name, state, x):
    """Return the network's logits from the tensors of ``state`` alone, by functional calls."""

    def conv(x, key, **options):
        return F.conv2d(x, state[key + ".weight"], **options)

    def norm(x, key):
        return F.batch_norm(
            x, state[key + ".running_mean"], state[key + ".running_var"], state[key + ".weight"], state[key + ".bias"]
        )

    if name == "mobilenet_v2":
        return recompute_mobilenet(state, x, conv, norm)
    x = F.relu(norm(conv(x, "conv1", stride=2, padding=3), "bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    for block in sorted({".".join(k.split(".")[:2]) for k in state if k.startswith("layer")}, key=natural):
        first = block.endswith(".0") and not block.startswith("layer1")
        stride = 2 if first else 1
        if f"{block}.conv3.weight" in state:
            b = F.relu(norm(conv(x, f"{block}.conv1"), f"{block}.bn1"))
            b = F.relu(norm(conv(b, f"{block}.conv2", stride=stride, padding=1), f"{block}.bn2"))
            b = norm(conv(b, f"{block}.conv3"), f"{block}.bn3")
        else:
            b = F.relu(norm(conv(x, f"{block}.conv1", stride=stride, padding=1), f"{block}.bn1"))
            b = norm(conv(b, f"{block}.conv2", padding=1), f"{block}.bn2")
        b = recompute_gate(b, state[f"{block}.eca.conv.weight"])
        if f"{block}.downsample.0.weight" in state:
            x = norm(conv(x, f"{block}.downsample.0", stride=stride), f"{block}.downsample.1")
        x = F.relu(b + x)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def recompute_mobilenet(state, x, conv, norm):
    """Return the logits of MobileNetV2; ``conv`` and ``norm`` look their tensors up in ``state``."""
    strides = {2: 2, 4: 2, 7: 2, 14: 2}  # first block of the stages that halve the image
    x = F.relu6(norm(conv(x, "features.0.0", stride=2, padding=1), "features.0.1"))
    for n in range(1, 18):
        at = f"features.{n}.conv"
        y, depthwise = x, 0
        if n > 1:
            y, depthwise = F.relu6(norm(conv(y, f"{at}.0.0"), f"{at}.0.1")), 1
        stride = strides.get(n, 1)
        y = conv(y, f"{at}.{depthwise}.0", stride=stride, padding=1, groups=y.shape[1])
        y = F.relu6(norm(y, f"{at}.{depthwise}.1"))
        y = norm(conv(y, f"{at}.{depthwise + 1}"), f"{at}.{depthwise + 2}")
        y = recompute_gate(y, state[f"{at}.{depthwise + 3}.conv.weight"])
        x = x + y if stride == 1 and x.shape == y.shape else y
    x = F.relu6(norm(conv(x, "features.18.0"), "features.18.1"))
    return F.linear(x.mean((2, 3)), state["classifier.1.weight"], state["classifier.1.bias"])


def natural(key):
    """Return a sort key that puts ``layer1.10`` after ``layer1.9``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def authors_state(name):
    """Return tensors like those of the authors' file: torchvision's network, and one kernel for each block."""
    state = dict(randomize(torchvision.models.get_model(name)).state_dict())
    g = torch.Generator().manual_seed(3)
    if name == "mobilenet_v2":
        # torchvision's `features.N.conv.M` is theirs; the gate follows the projection's norm; k = 1 below 96 channels
        for n in range(1, 18):
            last = max(int(k.split(".")[3]) for k in state if k.startswith(f"features.{n}.conv."))
            channels = len(state[f"features.{n}.conv.{last}.bias"])
            k = 1 if channels < 96 else 3
            state[f"features.{n}.conv.{last + 1}.conv.weight"] = torch.randn(1, 1, k, generator=g)
    else:
        for block in sorted({k.rsplit(".", 2)[0] for k in state if k.startswith("layer") and ".conv1." in k}):
            k = RELEASED[name][int(block[len("layer")]) - 1]
            state[f"{block}.eca.conv.weight"] = torch.randn(1, 1, k, generator=g)
    return state


def authors_file(path, name):
    """Save a file as the authors' `main.py` does: DataParallel's prefix, a wrapper, and one file's wrong ``arch``."""
    state = {"module." + key: value for key, value in authors_state(name).items()}
    torch.save({"epoch": 100, "arch": "se_resnet50", "state_dict": state, "best_prec1": 77.48}, path)
