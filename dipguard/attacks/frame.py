"""The frame of every attack: the victim left as it was, a seeded draw, fixed batches, checked results, a report."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.attacks.report import AttackReport, perturbation_norms
from dipguard.checks import check_images, check_int, check_labels
from dipguard.classifier import check_is_module, device_of, frozen
from dipguard.seeding import image_generator
from dipguard.victims.base import check_victim

TOLERANCE = 1e-6
"""Float32 rounding of x + delta for values in [0, 1]: so much beyond the budget is no breach."""

BatchAttack = Callable[[Tensor, Tensor, Tensor], list[Tensor]]
"""Images [B, 3, H, W], labels [B] and indices [B] of one batch -> one or more sets of attacked images [B, 3, H, W]."""


class AttackFrame(ABC):
    """What `Attack` and the defence-aware attacks share.

    A subclass sets ``name`` and ``norm``, may add to `settings`, and calls `run_batches`.

    Args:
        victim: classifier of images [B, 3, H, W] in [0, 1], logits [B, C]; attacked in eval mode.
        seed: of the attack's random draws.
        batch_size: images attacked together. Some attacks let batch mates influence each other, so it is part of the
            settings; batches are cut from the first image on.

    Raises:
        TypeError, ValueError: ``victim`` is not a module, or ``seed`` or ``batch_size`` is not an integer in range.
    """

    name: ClassVar[str]
    norm: str  # "Linf", "L2" or "none"

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

    def decide(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return the classes int64 [B] that the attacked system reads in images [B, 3, H, W] on its device."""
        decisions: Tensor = self.victim(images).argmax(dim=1)
        return decisions

    def fooled(self, attacked: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Return whether each attacked image is not read as its true class, bool [N] on the CPU.

        It is that part of `report` which a curve needs, without a look at the clean images (a defence may be dear).

        Args:
            attacked: float [N, 3, H, W] in [0, 1].
            labels: int [N], the true classes.
            indices: int [N], positions in the whole data set; by default 0 to N - 1.

        Raises:
            TypeError, ValueError: bad images, labels or indices, or a victim without logits [B, C].
        """
        check_images(attacked, name="attacked")
        order = _check_indices(indices, len(attacked))
        with torch.inference_mode(False), torch.no_grad(), frozen(self.victim):
            x = attacked.detach().clone().to(device_of(self.victim, attacked.device))
            truth = self._check_labels(x, labels).to(x.device, copy=True)
            parts = zip(*(values.split(self.batch_size) for values in (x, truth, order.clone())), strict=True)
            return torch.cat([self.decide(given, positions) != classes for given, classes, positions in parts]).cpu()

    def report(
        self, images: Tensor, attacked: Tensor, labels: Tensor, *, indices: Tensor | None = None
    ) -> AttackReport:
        """Say which images the attack fooled and how far it moved them; also for attacked images that were kept.

        Args:
            images: float [N, 3, H, W] in [0, 1], the clean images.
            attacked: the attacked ones, of the same shape.
            labels: int [N], the true classes.
            indices: int [N], positions in the whole data set; by default 0 to N - 1.

        Raises:
            TypeError, ValueError: bad images, labels or indices, or a victim without logits [B, C].
            RuntimeError: the attacked images lie beyond the attack's budget.
        """
        check_images(images)
        check_images(attacked, name="attacked")
        if attacked.shape != images.shape:
            raise ValueError(f"`attacked` must have the shape {tuple(images.shape)}, got {tuple(attacked.shape)}")
        with torch.inference_mode(False), torch.no_grad():
            linf, l2 = perturbation_norms(images, attacked)
            self._check_change(float(linf.max()))
            wrong, fooled = (self.fooled(given, labels, indices=indices) for given in (images, attacked))
            return AttackReport(self.settings, fooled=fooled, wrong_before=wrong, linf=linf, l2=l2)

    def run_batches(self, images: Tensor, labels: Tensor, indices: Tensor | None, attack: BatchAttack) -> list[Tensor]:
        """Run ``attack`` on batch after batch and return its sets of attacked images, each [N, 3, H, W].

        ``attack`` is called with copies on the victim's device, gradients enabled (also under ``no_grad`` and
        ``inference_mode``), the victim frozen in eval mode and the random generators seeded from the seed and the index
        of the batch's first image. Its results are checked, detached and brought to the images' device.

        Raises:
            TypeError, ValueError: bad images, labels or indices, or a victim without logits [B, C].
            RuntimeError: the attack broke its promise (values outside [0, 1], not finite, or beyond the budget).
        """
        check_images(images)
        order = _check_indices(indices, len(images))
        # Tensors made in inference mode cannot take part in autograd, even under enable_grad; copies made outside can.
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.victim):
            device = device_of(self.victim, images.device)
            x = images.detach().clone().to(device)
            y = self._check_labels(x, labels).to(device, copy=True)
            batches = zip(*(part.split(self.batch_size) for part in (x, y, order.clone())), strict=True)
            parts: list[list[Tensor]] = []
            for given, classes, positions in batches:
                with seeded(self.seed, int(positions[0]), device):
                    results = attack(given.clone(), classes.clone(), positions)
                parts.append([self._check_result(given, result.detach()) for result in results])
            return [torch.cat(sets).to(images.device) for sets in zip(*parts, strict=True)]

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
        self._check_change(float((attacked - given).abs().max()))
        return attacked

    def _check_change(self, change: float) -> None:
        if self.budget is not None and change > self.budget + TOLERANCE:
            raise RuntimeError(f"attack {self.name!r} changed a pixel by {change:.6g}, its budget is {self.budget:.6g}")


def _check_indices(indices: Tensor | None, count: int) -> Tensor:
    given = torch.arange(count) if indices is None else indices
    return check_labels(given, count=count, name="indices").cpu()


@contextmanager
def seeded(seed: int, index: int, device: torch.device, *, purpose: str = "attack") -> Iterator[None]:
    """Seed the CPU's generator, and the GPU's in use, from (seed, index, purpose); restore every generator afterwards.

    The other GPUs are restored too: torchattacks seeds them all.
    """
    state = image_generator(seed=seed, index=index, purpose=purpose).initial_seed()
    started = torch.cuda.is_initialized() or device.type == "cuda"
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count())) if started else []):
        # torch.manual_seed would also seed the GPUs that are not in use here.
        torch.default_generator.manual_seed(state)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(state)
        yield
