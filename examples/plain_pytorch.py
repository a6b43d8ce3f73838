"""Attention in torchvision's ResNet-18, trained by a plain PyTorch loop, saved and loaded again.

python examples/plain_pytorch.py
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import ecanet


def make_images(count: int = 96) -> tuple[Tensor, Tensor]:
    """Return noisy images (N, 3, 32, 32) of red, green and blue, and their labels (N,)."""
    labels = torch.arange(count) % 3
    colours = 0.5 * nn.functional.one_hot(labels, 3)[..., None, None]
    return 0.5 * torch.rand(count, 3, 32, 32) + colours, labels


def build() -> nn.Module:
    """Return a network with ECA after the convolutions of each of its blocks."""
    model = resnet18(num_classes=3)  # yours: resnet18(weights="DEFAULT"), and a new model.fc for your classes
    return ecanet.attach(model, "eca", example=torch.rand(2, 3, 32, 32))


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 10) -> None:
    # After attach, so that the optimizer holds the gates. They learn at ten times the rate.
    optimizer = torch.optim.SGD(ecanet.parameter_groups(model, lr=0.01, weight_decay=1e-4), momentum=0.9)
    model.train()
    for step in range(steps):
        batch = torch.randint(len(images), (24,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = make_images()
    model = build()
    train(model, images, labels)
    print(
        f"{len(ecanet.attached(model))} gates, first kernel {model.get_parameter('layer1.0.eca.conv.weight').tolist()}"
    )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "attached.pth")
        torch.save(model.state_dict(), path)
        again = build()  # the same attach, then the file
        again.load_state_dict(torch.load(path, weights_only=True))
    same = torch.equal(model.eval()(images), again.eval()(images))
    correct = (again(images).argmax(1) == labels).float().mean()
    print(f"loaded again: outputs {'equal' if same else 'differ'}, {correct:.0%} correct")
