import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.fit.conftest import images, victim

__all__ = ["images", "victim"]


@contextmanager
def all_stays(victim: nn.Module, *, seed: int = 1) -> Iterator[None]:
    """Seed every generator; afterwards they and the victim must be as they were, and so must the gradient mode."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    modes = [part.training for part in victim.modules()]
    state = {name: value.clone() for name, value in victim.state_dict().items()}
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    yield
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert [part.training for part in victim.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in victim.parameters())
    assert all(torch.equal(value, state[name]) for name, value in victim.state_dict().items())


@pytest.fixture(scope="session")
def small_images(images: Tensor) -> Tensor:
    """The images at 16x16 pixels: a fit takes a fraction of the time."""
    return images[:, :, ::2, ::2].contiguous()


@pytest.fixture(scope="session")
def small_victim(victim: nn.Module) -> nn.Module:
    """The victim for these images."""
    return nn.Sequential(nn.Upsample(size=32), victim)
