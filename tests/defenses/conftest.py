import pytest
from torch import Tensor, nn

from tests.fit.conftest import images, victim

__all__ = ["images", "victim"]


@pytest.fixture(scope="session")
def small_images(images: Tensor) -> Tensor:
    """The images at 16x16 pixels: a fit takes a fraction of the time."""
    return images[:, :, ::2, ::2].contiguous()


@pytest.fixture(scope="session")
def small_victim(victim: nn.Module) -> nn.Module:
    """The victim for these images."""
    return nn.Sequential(nn.Upsample(size=32), victim)
