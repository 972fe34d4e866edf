"""dipguard in your own Lightning project: three ways, none of which changes your code.

    python lightning_project.py
    python lightning_project.py --steps 1000 --images 16 --devices 2

The first half is the project: a LightningModule and a DataModule that do not know dipguard. The second half defends it.
Its images are digits with strong noise, which a deep image prior removes like the perturbation of an attack.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from dipguard import DIPGuard
from dipguard.integrations.lightning import DefendedClassifier, DefendedModule, PurifyCallback

# --- the project ------------------------------------------------------------------------------------------------------


class Digits(pl.LightningDataModule):
    """Scikit-learn's digits as batches (images [B, 3, 32, 32] in [0, 1], labels [B]); the test images are noisy."""

    def __init__(self, *, test_images: int, batch_size: int = 64) -> None:
        super().__init__()
        self.test_images, self.batch_size = test_images, batch_size

    def setup(self, stage: str) -> None:
        """Load."""
        pictures, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pictures).float().reshape(-1, 1, 8, 8) / 16
        images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear").repeat(1, 3, 1, 1)
        y = torch.from_numpy(labels).long()
        self.train = TensorDataset(images[:1500], y[:1500])
        last = slice(len(y) - self.test_images, None)
        noise = 0.4 * torch.randn(images[last].shape, generator=torch.Generator().manual_seed(0))
        self.test = TensorDataset((images[last] + noise).clamp(0, 1), y[last])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Clean digits."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Noisy digits."""
        return DataLoader(self.test, batch_size=self.batch_size)


class Classifier(pl.LightningModule):
    """A small CNN."""

    def __init__(self, rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.rate = rate
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 64, 10),
        )  # fmt: skip
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10]."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy."""
        self.accuracy(self(batch[0]), batch[1])
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.rate)


# --- and its defence --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, then test in each of the three ways; return the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="T, optimiser steps of each image's fit")
    parser.add_argument("--images", type=int, default=8, help="test images")
    parser.add_argument("--devices", type=int, default=1, help="processes")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args(arguments)

    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    data, model = Digits(test_images=options.images), Classifier()
    common = {"accelerator": "cpu", "devices": options.devices, "logger": False, "enable_checkpointing": False}
    common |= {"strategy": "ddp" if options.devices > 1 else "auto", "enable_model_summary": False}
    pl.Trainer(max_epochs=options.epochs, enable_progress_bar=False, **common).fit(model, data)

    # The victim of the defence is the model itself. Its images are in [0, 1]; if your DataModule normalises, put the
    # normalisation inside the victim (nn.Sequential(Normalize(mean, std), model)), and give mean and std to the
    # callback.
    guard = DIPGuard(model, T=options.steps, decisions=min(100, options.steps), seed=0)

    # 1. A callback: batches are purified on their way into test_step; accuracy is logged with and without the defence.
    (found,) = pl.Trainer(callbacks=[PurifyCallback(guard)], **common).test(model, data, verbose=False)

    # 2. A module around the classifier, for any code that calls one.
    images, labels = data.test.tensors
    defended = DefendedClassifier(model.eval(), guard)
    logits = defended(images[:2], indices=torch.arange(2))

    # 3. The LightningModule itself with a defended forward: same class, steps, hooks, hyper-parameters, state dict.
    (whole,) = pl.Trainer(**common).test(DefendedModule(model, guard), data, verbose=False)

    if model.trainer.is_global_zero:
        print(f"callback: {found}\nclassifier: {logits.argmax(1).tolist()} for {labels[:2].tolist()}\nmodule: {whole}")
    return {**found, "module": whole["test_accuracy"]}


if __name__ == "__main__":
    main()
