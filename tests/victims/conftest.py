from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dipguard.data import ImageSet, load_data
from dipguard.victims import build_victim


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    return load_data("digits")


@pytest.fixture(scope="session")
def digits_cnn() -> nn.Module:
    return build_victim("digits_cnn", progress=False)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def linear(outputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, outputs))


def exported(network: nn.Module) -> nn.Module:
    """What torch.export makes of a network for any number of images."""
    batch = torch.export.Dim("n", min=1, max=1024)
    return torch.export.export(network, (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: batch},)).module()


@pytest.fixture(scope="session")
def photographs(real_data: Path) -> ImageSet:
    """Thirty photographs of the NeurIPS 2017 set."""
    root = real_data / "nips2017"
    columns = {"image_column": "ImageId", "label_column": "TrueLabel", "label_base": 1}
    labels = root / "images.csv"
    return load_data("image_folder", path=root / "images", labels_csv=labels, limit=30, size=224, **columns)
