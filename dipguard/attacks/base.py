"""What every attack shares: the victim left as it was, a seeded draw, fixed batches, and a result that is checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.checks import check_images, check_int, check_labels
from dipguard.classifier import check_is_module, device_of, frozen
from dipguard.seeding import image_generator
from dipguard.victims.base import check_victim

_TOLERANCE = 1e-6  # float32 rounding of x + delta, for values in [0, 1]


class Attack(ABC):
    """An untargeted attack on one victim: ``attack(images, labels)`` returns adversarial images.

    A subclass sets ``name`` and ``norm``, and implements `attack_batch`; it may add to `settings`.

    Args:
        victim: classifier of images [B, 3, H, W] in [0, 1], logits [B, C]; attacked in eval mode.
        seed: of the attack's random draws.
        batch_size: images attacked together. Some attacks let batch mates influence each other, so it is part of the
            settings; batches are cut from the first image on.

    Raises:
        TypeError, ValueError: ``victim`` is not a module, or ``seed`` or ``batch_size`` is not an integer in range.
    """

    name: ClassVar[str]
    norm: ClassVar[str]  # "Linf", "L2" or "none"

    def __init__(self, victim: nn.Module, *, seed: int = 0, batch_size: int = 32) -> None:
        self.victim = check_is_module(victim)
        self.seed = check_int(seed, name="seed", low=0)
        self.batch_size = check_int(batch_size, name="batch_size", low=1)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on besides victim and images, ready for JSON."""
        return {"name": self.name, "norm": self.norm, "seed": self.seed, "batch_size": self.batch_size}

    @property
    def budget(self) -> float | None:
        """Largest allowed change of a pixel value, in [0, 1]; None where the attack has no L-inf bound."""
        return None

    @abstractmethod
    def attack_batch(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images [B, 3, H, W] for one batch on the victim's device.

        Called with gradients enabled, the victim frozen in eval mode and the random generators seeded.
        """

    def __call__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Return adversarial images of the same shape, dtype and device, in [0, 1] and detached.

        Works under ``no_grad`` and ``inference_mode`` too. The caller's random state, the victim's modes, its
        requires_grad flags and its gradients are left as they were.

        Args:
            images: float [N, 3, H, W] in [0, 1].
            labels: int [N], the true classes, below the victim's number of classes.
            indices: int [N], positions in the whole data set; by default 0 to N - 1. A batch's random draws depend on
                the seed and the index of its first image.

        Raises:
            TypeError, ValueError: bad images, labels or indices, or a victim without logits [B, C].
            RuntimeError: the attack broke its promise (values outside [0, 1], not finite, or beyond the budget).
        """
        check_images(images)
        indices = torch.arange(len(images)) if indices is None else indices
        starts = check_labels(indices, count=len(images), name="indices")[:: self.batch_size].tolist()
        # Tensors made in inference mode cannot take part in autograd, even under enable_grad; copies made outside can.
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.victim):
            device = device_of(self.victim, images.device)
            x = images.detach().clone().to(device)
            y = self._check_labels(x, labels).to(device, copy=True)
            parts: list[Tensor] = []
            for start, given, classes in zip(starts, x.split(self.batch_size), y.split(self.batch_size), strict=True):
                with _seeded(self.seed, start, device):
                    attacked = self.attack_batch(given.clone(), classes.clone()).detach()
                parts.append(self._check_result(given, attacked))
            return torch.cat(parts).to(images.device)

    def _check_labels(self, images: Tensor, labels: Tensor) -> Tensor:
        num_classes = check_victim(self.victim, images[: self.batch_size]).shape[1]
        return check_labels(labels, count=len(images), num_classes=num_classes)

    def _check_result(self, given: Tensor, attacked: Tensor) -> Tensor:
        if attacked.shape != given.shape or attacked.dtype != given.dtype:
            got = f"{tuple(attacked.shape)} of {attacked.dtype}"
            raise RuntimeError(f"attack {self.name!r} returned {got} for {tuple(given.shape)} of {given.dtype}")
        if not bool(torch.isfinite(attacked).all()):
            raise RuntimeError(f"attack {self.name!r} returned NaN or infinite values")
        low, high = (float(value) for value in torch.aminmax(attacked))
        if low < 0 or high > 1:
            raise RuntimeError(f"attack {self.name!r} left [0, 1]: its values go from {low:.4g} to {high:.4g}")
        change = float((attacked - given).abs().max())
        if self.budget is not None and change > self.budget + _TOLERANCE:
            raise RuntimeError(f"attack {self.name!r} changed a pixel by {change:.6g}, its budget is {self.budget:.6g}")
        return attacked


@contextmanager
def _seeded(seed: int, index: int, device: torch.device) -> Iterator[None]:
    """Seed the CPU's generator, and the GPU's in use, from (seed, index); restore them afterwards."""
    state = image_generator(seed=seed, index=index, purpose="attack").initial_seed()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        # torch.manual_seed would also seed the GPUs that are not in use here.
        torch.default_generator.manual_seed(state)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(state)
        yield
