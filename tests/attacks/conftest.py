import pytest
import torch
from torch import nn

from dipguard.data import ImageSet, load_data
from dipguard.victims import build_victim


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    return load_data("digits", limit=40)


@pytest.fixture(scope="session")
def digits_cnn() -> nn.Module:
    return build_victim("digits_cnn", progress=False)


def right(victim: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images [N, 3, H, W] that the victim decides rightly."""
    with torch.no_grad():
        return float((victim(images).argmax(1) == labels).float().mean())
