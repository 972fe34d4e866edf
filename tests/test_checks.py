"""The doors: what rounding may leave outside [0, 1] is let in, whatever takes images; the rest is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dipguard import DIPGuard, MirrorGuard, StackedDIP, build_defense
from dipguard.attacks import build_attack
from dipguard.checks import check_images
from dipguard.data import ImageSet
from dipguard.fit import FitOptions
from dipguard.fit.unrolled import unrolled_fit
from dipguard.integrations.inputs import Pixels
from dipguard.store import Store
from dipguard.victims import check_victim

BELOW, ABOVE = -2.98e-8, 1 + 2.4e-7


class Strict(nn.Module):
    """A victim that takes no image outside [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert 0 <= float(x.detach().min()) <= float(x.detach().max()) <= 1
        return self.inner(x.mean(dim=(2, 3)))


def images(low: float = BELOW, high: float = ABOVE) -> Tensor:
    made = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    made[0, 0, 0, :2] = torch.tensor([low, high])
    return made


def attacked(x: Tensor) -> None:
    attack, label = build_attack("fgsm", Strict(), eps_255=8), torch.tensor([0])
    attack(x, label)
    attack.fooled(x, label)


SHORT = {"network": "small", "T": 3, "t0": 0, "decisions": 3, "engine": "torch", "progress": False}
MIRROR = {"networks": ("small",), "T": 4, "t0": 0, "every": 2, "engine": "torch", "progress": False}
DOORS: dict[str, Callable[[Tensor], object]] = {
    "data": lambda x: ImageSet(x, torch.tensor([0]), torch.tensor([0])),
    "victim": lambda x: check_victim(Strict(), x),
    "attack": attacked,
    "module": lambda x: StackedDIP(x),
    "unrolled": lambda x: unrolled_fit(x, T=1, fit=FitOptions(network="small")),
    "pipeline": lambda x: Pixels().restore(x),
    "transform": lambda x: build_defense("bit_depth", Strict()).defend(x),
    "paper": lambda x: DIPGuard(Strict(), **SHORT).defend(x),
    "mirror": lambda x: MirrorGuard(Strict(), **MIRROR).defend(x),
}


@pytest.mark.parametrize("door", DOORS)
def test_rounding_is_let_in_and_more_is_refused(door: str) -> None:
    DOORS[door](images())
    for low, high, got in ((-2e-6, 1.0, "from -2e-06 to 1"), (0.0, 1.000002, "from 0 to 1.00000[12]")):
        with pytest.raises(ValueError, match=rf"`\w+` must lie in \[0, 1\], got values {got}"):
            DOORS[door](images(low, high))


def test_a_store_keeps_what_was_let_in(tmp_path) -> None:
    guard = DIPGuard(Strict(), store=Store(tmp_path), **SHORT)
    (trace,) = guard.defend(images()).traces
    assert (float(trace.given.min()), float(trace.given.max())) == (0, 1)


def test_images_within_the_range_are_not_copied() -> None:
    inside = images(0.0, 1.0)
    assert check_images(inside) is inside
    assert torch.equal(check_images(images()), images().clamp(0, 1))
