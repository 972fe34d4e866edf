"""A Lightning project of its own: a LightningModule and a DataModule that do not know dipguard."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

MEAN, STD = (0.3, 0.31, 0.32), (0.3, 0.33, 0.36)

Pair = namedtuple("Pair", ["picture", "target"])


class Features(UserDict):
    """As some libraries return their batches: a mapping that is no dict."""


@dataclass
class Sample:
    picture: Tensor
    target: Tensor


KINDS: dict[str, tuple[Any, Any]] = {
    "tensor": ((), None),
    "tuple": (0, 1),
    "list": (0, 1),
    "target_first": (1, 0),
    "dict": ("image", "label"),
    "userdict": ("pixel_values", "labels"),
    "namedtuple": ("picture", "target"),
    "dataclass": ("picture", "target"),
    "nested": (("inputs", 0, "image"), ("meta", "label")),
}
"""Structures of a batch, and where in each the images and the labels are."""


def pack(kind: str, x: Tensor, y: Tensor) -> Any:
    return {
        "tensor": x,
        "tuple": (x, y),
        "list": [x, y],
        "target_first": (y, x),
        "dict": {"image": x, "label": y, "name": "digits"},
        "userdict": Features({"pixel_values": x, "labels": y}),
        "namedtuple": Pair(x, y),
        "dataclass": Sample(x, y),
        "nested": {"inputs": [{"image": x, "size": len(x)}], "meta": {"label": y}},
    }[kind]


def unpack(kind: str, batch: Any) -> tuple[Tensor, Tensor | None]:
    def at(place: Any) -> Any:
        part = batch
        for key in place if isinstance(place, tuple) else (place,):
            part = getattr(part, key) if isinstance(part, Pair | Sample) else part[key]
        return part

    images, labels = KINDS[kind]
    return at(images), None if labels is None else at(labels)


def digits(first: int, count: int, *, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Digits as [count, 3, 16, 16] in [0, 1], the noisy ones on a grid of 1/255, and their labels."""
    pictures, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pictures[first : first + count]).float().reshape(-1, 1, 8, 8) / 16
    x = F.interpolate(x, size=(16, 16), mode="nearest").expand(-1, 3, -1, -1)
    x = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(first))
    return (x.clamp(0, 1) * 255).round() / 255, torch.from_numpy(labels[first : first + count]).long()


class Pictures(Dataset[Any]):
    """Holds its images, so that a write to a batch in place is noticed."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class DigitsData(pl.LightningDataModule):
    """Batches of one of `KINDS`, perhaps normalised; the same images for every loop."""

    def __init__(
        self, *, kind: str = "tuple", count: int = 5, batch_size: int = 2, noise: float = 0.35, normalised: bool = False
    ) -> None:
        super().__init__()
        self.kind, self.batch_size, self.normalised = kind, batch_size, normalised
        self.pictures = Pictures(*digits(0, count, noise=noise))

    def collate(self, items: list[tuple[Tensor, Tensor]]) -> Any:
        x, y = torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])
        if self.normalised:
            x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        return pack(self.kind, x, y)

    def _loader(self) -> DataLoader[Any]:
        return DataLoader(self.pictures, batch_size=self.batch_size, collate_fn=self.collate)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


class DigitsModule(pl.LightningModule):
    """A small CNN with BatchNorm and dropout. It keeps what its steps were given."""

    def __init__(self, *, kind: str = "tuple", rate: float = 0.01, folder: Path | None = None) -> None:
        super().__init__()
        self.save_hyperparameters({"rate": rate})
        self.kind, self.folder = kind, folder
        first = nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU()
        self.net = nn.Sequential(*first, nn.Dropout(0.2), nn.Flatten(), nn.Linear(12 * 64, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.seen: list[Tensor] = []
        self.autocast: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def _read(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        images, labels = unpack(self.kind, batch)
        self.seen.append(images.clone())
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return self(images), labels

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, labels = self._read(batch)
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.test_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        logits, labels = self._read(batch)
        if labels is not None:
            self.accuracy(logits, labels)
            self.log("their_accuracy", self.accuracy, on_step=False, on_epoch=True)

    def predict_step(self, batch: Any) -> Tensor:
        return self._read(batch)[0].argmax(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["rate"])

    def on_test_end(self) -> None:
        if self.folder is not None:
            ranks = (self.global_rank, rank_zero_only.rank, torch.distributed.get_rank())
            torch.save({"seen": self.seen, "ranks": ranks}, self.folder / f"{self.global_rank}.pt")
