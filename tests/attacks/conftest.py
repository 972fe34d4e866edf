from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dipguard.attacks import ATTACKS, Attack, DefendedVictim, build_attack
from dipguard.data import ImageSet, load_data
from dipguard.victims import build_victim

STATIC = ("none", "fgsm", "pgd", "bim", "mifgsm", "cw", "ddn", "autoattack", "square", "noise")
ADAPTIVE = ("bpda", "hopskipjump", "adaptive_pgd", "unrolled", "defended_autoattack", "defended_square")
QUICK: dict[str, dict[str, Any]] = {
    "square": {"n_queries": 25},
    "ddn": {"steps": 15},
    "cw": {"steps": 20},
    "autoattack": {"steps": 2, "targets": 2},
    "bpda": {"steps": 3},
    "hopskipjump": {"queries": 50, "init_eval": 10},
    "adaptive_pgd": {"steps": 3},
    "unrolled": {"steps": 1, "T": 2},
    "defended_autoattack": {"steps": 2},
    "defended_square": {"n_queries": 10},
}
"""Options that make the slow rows of `ATTACKS` quick; the others run with their defaults."""
assert (*STATIC, *ADAPTIVE) == tuple(ATTACKS)


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    return load_data("digits", limit=40)


@pytest.fixture(scope="session")
def trained_digits_cnn() -> nn.Module:
    return build_victim("digits_cnn", progress=False)


@pytest.fixture
def digits_cnn(trained_digits_cnn: nn.Module) -> Iterator[nn.Module]:
    """The one victim of all tests; a test that leaves it changed for the next ones fails."""
    yield trained_digits_cnn
    in_train_mode = [name for name, module in trained_digits_cnn.named_modules() if module.training]
    trained_digits_cnn.eval().zero_grad(set_to_none=True)  # a library that is called directly leaves gradients behind
    assert not in_train_mode, f"left in train mode: {in_train_mode}"


def quick(name: str, victim: nn.Module, defense: Any = None, **options: Any) -> Attack:
    """The attack called ``name``, with few steps; an adaptive one of the victim behind ``defense`` (None: a median)."""
    target = DefendedVictim(victim, Median() if defense is None else defense) if name in ADAPTIVE else victim
    return build_attack(name, target, **{**QUICK.get(name, {}), **options})


def adaptive(name: str, victim: nn.Module, defense: Any, **options: Any) -> Attack:
    """The adaptive attack called ``name`` on the defended victim, with its own default options."""
    return build_attack(name, DefendedVictim(victim, defense), **options)


@pytest.fixture(scope="session")
def quick_result(trained_digits_cnn: nn.Module, digits: ImageSet) -> Callable[[str], Tensor]:
    """What each attack makes of the first four digits; it must not be changed."""
    return cache(lambda name: quick(name, trained_digits_cnn)(digits.images[:4], digits.labels[:4]))


def accuracy(attack: Attack, attacked: Tensor, data: ImageSet) -> float:
    """Share of attacked images that the attack's target decides rightly."""
    return 1 - float(attack.fooled(attacked, data.labels).float().mean())


def right(victim: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, 3, H, W] that the victim decides rightly."""
    with torch.no_grad():
        return float((victim(images).argmax(1) == labels).float().mean())


class Changed(nn.Module):
    """A victim with other logits, ``change(logits)``."""

    def __init__(self, victim: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.victim, self.change = victim, change
        self.eval()  # a library that finds a wrapper in train mode leaves all of it, the victim too, in train mode

    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.victim(images))


def scaled(victim: nn.Module, factor: float = 1000.0) -> nn.Module:
    """The same decisions, every margin ``factor`` times as large: a victim that is too sure to have a gradient."""
    return Changed(victim, lambda logits: logits * factor)


class Shadowed(nn.Module):
    """A victim that sees nothing below a level: it is flat around images darker than that."""

    def __init__(self, victim: nn.Module, level: float = 0.2) -> None:
        super().__init__()
        self.victim, self.level = victim, level
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.victim(torch.relu(images - self.level))


def any_size(victim: nn.Module) -> nn.Module:
    """The victim for images of other sizes than 32 x 32 too: it sees them pooled."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(32), victim).eval()


class Purifier:
    """A defence that returns ``change(images)`` and ignores the indices."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        self.change = change

    def purify(self, images: Tensor, *, indices: Tensor | None = None) -> Any:
        return self.change(images)


class NoDefense(Purifier):
    """Returns the images."""

    def __init__(self) -> None:
        super().__init__(lambda images: images)


class Median:
    """Median filter of 3 x 3 pixels; it says that it takes seven DIP steps an image, to be counted."""

    steps_per_image = 7

    def purify(self, images: Tensor, *, indices: Tensor | None = None) -> Tensor:
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        return padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).median(-1).values


class Noise:
    """Noise of std 0.05, drawn from each image's index; it keeps the indices that it was given."""

    def __init__(self) -> None:
        self.indices: list[int] = []

    def purify(self, images: Tensor, *, indices: Tensor | None = None) -> Tensor:
        order = list(range(len(images))) if indices is None else indices.tolist()
        self.indices += order
        draws = [torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(i)) for i in order]
        return (images + 0.05 * torch.stack(draws).to(images)).clamp(0, 1)


class Enlarge(Purifier):
    """Twice the size, as a super-resolving defence returns it."""

    def __init__(self) -> None:
        super().__init__(lambda images: F.interpolate(images, scale_factor=2, mode="nearest"))


@pytest.fixture(scope="session")
def real_victim(real_data: Path) -> tuple[nn.Module, ImageSet]:
    """ResNet-20 and the first eight CIFAR-10 images."""
    victim = build_victim("cifar10_resnet20", weights=real_data / "weights" / "resnet20-12fca82f.th")
    return victim, load_data("arrays", path=real_data / "cifar10" / "tune.npz", limit=8)


@pytest.fixture(scope="session")
def deepest(real_data: Path) -> tuple[nn.Module, ImageSet]:
    """ResNet-56 and the first 64 CIFAR-10 images."""
    victim = build_victim("cifar10_resnet56", weights=real_data / "weights" / "resnet56-4bfd9763.th")
    return victim, load_data("arrays", path=real_data / "cifar10" / "tune.npz", limit=64)
