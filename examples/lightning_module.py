"""Attention in torchvision's ResNet-18 inside a LightningModule, trained by Lightning, and loaded from its checkpoint.

python examples/lightning_module.py
"""

import tempfile

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import ecanet


class Classifier(L.LightningModule):
    def __init__(self, classes: int = 3, learning_rate: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        # In __init__, so that load_from_checkpoint builds the same network before it loads the weights.
        self.model = ecanet.attach(resnet18(num_classes=classes), "eca", example=torch.rand(2, 3, 32, 32))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # The gates are a group of their own: ten times the rate, no weight decay.
        groups = ecanet.parameter_groups(self.model, lr=self.hparams["learning_rate"], weight_decay=1e-4)
        return torch.optim.SGD(groups, momentum=0.9)


def make_images(count: int = 96) -> tuple[Tensor, Tensor]:
    """Return noisy images (N, 3, 32, 32) of red, green and blue, and their labels (N,)."""
    labels = torch.arange(count) % 3
    colours = 0.5 * nn.functional.one_hot(labels, 3)[..., None, None]
    return 0.5 * torch.rand(count, 3, 32, 32) + colours, labels


if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = make_images()
    loader = DataLoader(TensorDataset(images, labels), batch_size=24, shuffle=True)
    classifier = Classifier()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=folder, log_every_n_steps=1)
        trainer.fit(classifier, loader)
        trainer.save_checkpoint(f"{folder}/last.ckpt")
        again = Classifier.load_from_checkpoint(f"{folder}/last.ckpt", weights_only=True)
    same = torch.equal(classifier.eval()(images), again.eval()(images))
    correct = (again(images).argmax(1) == labels).float().mean()
    print(f"loss {float(trainer.callback_metrics['train_loss']):.3f}, {len(ecanet.attached(again.model))} gates")
    print(f"loaded again: outputs {'equal' if same else 'differ'}, {correct:.0%} correct")
