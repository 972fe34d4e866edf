"""What the store's tests work on, also in processes of their own: smooth images, victims, a short fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dipguard import DIPGuard
from dipguard.store import LAYERS, Store
from dipguard.store.folder import read_entry

FIT: dict[str, Any] = {
    "network": "small", "engine": "native", "jitter": 0.1, "padding": "reflect", "stack_size": 4, "progress": False
}  # fmt: skip
"""The native engine: an image's numbers then do not depend on its stack, bit by bit."""
SHORT: dict[str, Any] = {**FIT, "T": 24, "decisions": 12, "t0": 2, "tau": 0.0, "K": 3, "K_max": 5}


def smooth_images(count: int = 3, side: int = 16) -> Tensor:
    """[count, 3, side, side] in [0, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return F.interpolate(coarse, size=side, mode="bilinear", align_corners=True)


def random_victim(seed: int = 1) -> nn.Module:
    """A random classifier of ten classes, whose decisions change along a fit; in train mode, with BatchNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 10)
        net = nn.Sequential(*layers)
    with torch.no_grad():
        net[-1].weight *= 8
    return net


def guard(store: Path | Store | None = None, *, victim: nn.Module | None = None, **options: Any) -> DIPGuard:
    """A defence with the short fit."""
    return DIPGuard(random_victim() if victim is None else victim, store=store, **{**SHORT, **options})


class Listed(NamedTuple):
    path: Path
    key: str
    header: dict[str, Any]


def list_entries(folder: Path, *, layers: Sequence[str] = LAYERS) -> list[Listed]:
    """All entries of a store; reading one verifies its checksum."""
    paths = [path for layer in layers for path in sorted(folder.glob(f"{layer}/??/*.npz"))]
    return [Listed(path, path.stem, read_entry(path).header) for path in paths]
