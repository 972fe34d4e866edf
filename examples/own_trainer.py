"""The stacked fit and its callbacks in a Lightning Trainer of your own; docs/own_trainer.md explains each part.

    python own_trainer.py
    python own_trainer.py --steps 1000 --images 8 --folder runs/own_trainer

It purifies noisy digits twice: with the paper's loss, and with a total-variation regulariser on the reconstructions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dipguard.fit import BoundaryDetector, DecisionLogger, FitOptions, StackedDIP, Stitcher


class SmoothDIP(StackedDIP):
    """Adds a total-variation regulariser to the loss."""

    weight = 0.02

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The step of Algorithm 1 with another loss."""
        out = super().training_step(batch, batch_idx)
        x = out["reconstructions"]
        roughness = x.diff(dim=-1).abs().mean(dim=(1, 2, 3)) + x.diff(dim=-2).abs().mean(dim=(1, 2, 3))
        out["loss"] = out["loss"] + self.weight * roughness.sum()  # a sum, so that no image depends on the others
        return out


def digits(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier of scikit-learn's digits, and some noisy test images [count, 3, 32, 32] with their labels."""
    pictures, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pictures).float().reshape(-1, 1, 8, 8) / 16
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear").repeat(1, 3, 1, 1)
    labels = torch.from_numpy(targets).long()
    torch.manual_seed(0)
    victim = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 10))
    optimiser = torch.optim.Adam(victim.parameters(), lr=0.01)
    for _ in range(200):
        optimiser.zero_grad()
        nn.functional.cross_entropy(victim(images[:1500]), labels[:1500]).backward()
        optimiser.step()
    noisy = images[-count:] + 0.4 * torch.randn(count, 3, 32, 32)
    return victim, noisy.clamp(0, 1), labels[-count:]


def purify(module: StackedDIP, victim: nn.Module, *, steps: int, folder: Path) -> tuple[Tensor, pl.Trainer]:
    """Fit a stack in a Trainer of our own; return the reconstructions [B, 3, H, W] and the Trainer."""
    stitcher = Stitcher(tau=0.3, t0=20, K=15, beta=0.1)
    trainer = pl.Trainer(
        max_steps=steps,  # the paper's T; epochs are short pieces of it
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=[
            DecisionLogger(victim),
            BoundaryDetector(victim),
            stitcher,
            EarlyStopping("fit/mse", min_delta=1e-4, patience=3),
            ModelCheckpoint(folder, monitor="fit/mse"),
        ],
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return torch.stack([rebuilt.image for rebuilt in stitcher.reconstructions]), trainer


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Purify with both losses and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/own_trainer"))
    given = parser.parse_args(arguments)
    victim, images, labels = digits(given.images)
    found: dict[str, Any] = {}
    for kind in (StackedDIP, SmoothDIP):
        module = kind(images, options=FitOptions(network="small", jitter=1 / 30))
        purified, trainer = purify(module, victim, steps=given.steps, folder=given.folder / kind.__name__)
        with torch.no_grad():
            right = (victim(purified).argmax(dim=1) == labels).float().mean()
        roughness = purified.diff(dim=-1).abs().mean()
        metrics = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
        print(f"{kind.__name__}: {module.step} steps, accuracy {right:.2f}, roughness {roughness:.4f}, {metrics}")
        found[kind.__name__] = {"purified": purified, "steps": module.step, "roughness": float(roughness), **metrics}
    return found


if __name__ == "__main__":
    main()
