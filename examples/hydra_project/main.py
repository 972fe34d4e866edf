"""A Hydra project of your own that takes its defence and its attack from dipguard's config groups.

    python main.py
    python main.py dipguard/defense@defense=jpeg defense.quality=50
    python main.py dipguard/attack=fgsm model.width=32 seed=1
    python main.py dipguard/defense@defense=mirror defense.mirror=false

The groups are found because dipguard is installed: the defaults list of conf/config.yaml names them, like the project's
own group ``model``.

``mirror`` needs ``defense.mirror=false`` here: a mirrored digit is not a digit.
"""

from __future__ import annotations

from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dipguard.attacks import build_attack
from dipguard.defenses import build_defense


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits, [1797, 3, 32, 32] in [0, 1], and their labels."""
    pictures, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pictures).float().reshape(-1, 1, 8, 8) / 16
    return nn.functional.interpolate(images, size=(32, 32)).repeat(1, 3, 1, 1), torch.from_numpy(labels).long()


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int) -> nn.Module:
    """Fit a classifier."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimiser.step()
    return model.eval()


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Train, attack, purify, and print how many images are classified correctly."""
    torch.manual_seed(cfg.seed)
    images, labels = digits()
    width = cfg.model.width
    model: nn.Module = nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * width * 64, 10),
    )  # fmt: skip
    model = train(model, images[:1500], labels[:1500], epochs=cfg.model.epochs)
    images, labels = images[-cfg.images :], labels[-cfg.images :]

    # A group holds the arguments of dipguard's builders.
    groups: Any = OmegaConf.to_container(cfg, resolve=True)
    attack = build_attack(target=model, seed=cfg.seed, **groups["dipguard"]["attack"])
    defense = build_defense(victim=model, seed=cfg.seed, **groups["defense"])

    attacked = attack(images, labels)
    purified = defense.purify(attacked)
    with torch.no_grad():
        for name, given in (("clean", images), ("attacked", attacked), ("purified", purified)):
            print(f"{name}: {int((model(given).argmax(1) == labels).sum())} of {len(labels)}")


if __name__ == "__main__":
    main()
