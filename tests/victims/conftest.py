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
