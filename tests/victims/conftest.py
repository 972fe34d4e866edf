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


@pytest.fixture(scope="session")
def photographs(real_data: Path) -> ImageSet:
    """Thirty photographs of the NeurIPS 2017 set."""
    root = real_data / "nips2017"
    columns = {"image_column": "ImageId", "label_column": "TrueLabel", "label_base": 1}
    labels = root / "images.csv"
    return load_data("image_folder", path=root / "images", labels_csv=labels, limit=30, size=224, **columns)
