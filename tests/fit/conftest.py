"""A few natural images and a victim with smooth decisions, so that fits cross boundaries."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Eight 32x32 crops of scikit-learn's two photographs, reduced eightfold, [8, 3, 32, 32] in [0, 1]."""
    photographs = [torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 255 for p in load_sample_images().images]
    small = [F.avg_pool2d(p, 8)[:, :32, 16 * k : 16 * k + 32] for p in photographs for k in range(3)]
    small += [F.avg_pool2d(p, 12)[:, 2:34, 4:36] for p in photographs]
    return torch.stack(small)


@pytest.fixture(scope="session")
def victim() -> nn.Module:
    """A random classifier of ten classes with BatchNorm and dropout, in train mode as a careless user leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(32 * 36, 10),
        )
    with torch.no_grad():
        net[-1].weight *= 8
    return net


@pytest.fixture(scope="session")
def undecided(images: Tensor) -> nn.Module:
    """A linear classifier that reads nothing from these images themselves, so that small changes of them decide."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 3072, generator=draw)
    basis, _ = torch.linalg.qr(torch.cat([images.flatten(1), torch.ones(1, 3072)]).T)
    linear = nn.Linear(3072, 10, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight - (weight @ basis) @ basis.T)
    return nn.Sequential(nn.Flatten(), linear)
