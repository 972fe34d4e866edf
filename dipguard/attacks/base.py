"""What an attack is: `attack(images, labels)` returns adversarial images, made in seeded and checked batches."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dipguard.attacks.libraries import load_library
from dipguard.checks import check_float, check_images, check_int, check_labels
from dipguard.classifier import check_is_module, device_of, frozen
from dipguard.seeding import image_generator
from dipguard.victims.base import check_victim

TOLERANCE = 1e-6
"""Rounding of x + delta in float32 for values in [0, 1]: a change of this much more than eps is no breach."""


class Snapshot(NamedTuple):
    """The limits under which a set of attacked images was made."""

    eps_255: float | None
    """Largest distance from the clean image in levels of 0 to 255; None where there is no limit."""
    budget: int | None
    """Iterations or queries an image; None for the whole run."""


BatchAttack = Callable[[Tensor, Tensor, Tensor], dict[Snapshot, Tensor]]
"""Images [B, 3, H, W], labels [B] and indices [B] of one batch -> attacked images [B, 3, H, W] for each snapshot."""


@dataclass(frozen=True)
class Cost:
    """Work of an attack on a defended victim: estimated before it runs, counted while it does. Costs add up.

    Attributes:
        purifications: images that the defence purified.
        dip_steps: optimiser steps of deep image priors in them.
        victim_queries: purified images that the victim classified for the attack, not for the defence itself.
        gradients: images for which the victim was differentiated.
    """

    purifications: int = 0
    dip_steps: int = 0
    victim_queries: int = 0
    gradients: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)))

    def __str__(self) -> str:
        asked = f"{self.purifications:,} purifications ({self.dip_steps:,} DIP steps)"
        return f"{asked}, {self.victim_queries:,} victim queries, {self.gradients:,} gradients"


@dataclass(frozen=True, eq=False)
class AttackReport:
    """What an attack achieved on N images; all tensors are on the CPU.

    Attributes:
        fooled: bool [N], whether the attacked image is misclassified.
        wrong_before: bool [N], whether the clean image is.
        linf: float [N], largest change of a pixel value, on the [0, 1] scale.
        l2: float [N], Euclidean norm of the change, on the [0, 1] scale.
    """

    settings: dict[str, Any]
    fooled: Tensor
    wrong_before: Tensor
    linf: Tensor
    l2: Tensor

    @property
    def not_fooled(self) -> int:
        """Number of attacked images that are still classified correctly."""
        return int((~self.fooled).sum())

    @property
    def accuracy(self) -> float:
        """Share of attacked images that are still classified correctly, in [0, 1]."""
        return self.not_fooled / len(self.fooled)


class Attack(ABC):
    """An untargeted attack on one target: ``attack(images, labels)`` returns adversarial images.

    A subclass sets ``name`` and ``norm`` ("Linf", "L2" or "none") and implements `attack_batch`. It keeps each of its
    keyword-only arguments in an attribute of the same name, where `settings` finds them. An attack in an L-inf ball has
    the argument ``eps_255``. Images are attacked in batches, cut from the first image on; some attacks let the images
    of a batch influence each other, so ``batch_size`` belongs to the settings.

    Args:
        target: classifier of images [B, 3, H, W] in [0, 1], logits [B, C]; attacked in eval mode. Adaptive attacks take
            a `DefendedVictim`.
        seed: of the random draws, at least 0. Those of a batch also depend on the index of its first image.
        batch_size: images attacked together, at least 1.

    Attributes:
        adaptive: whether the target is a `DefendedVictim`.
        library: the library that the attack is from; empty for our own.
        spent: cost of all calls so far, but not of `report` and `fooled`; only adaptive attacks count it.
        history: after a call of an attack that keeps the best images it saw, share of its images whose best one is
            still classified correctly after step 1, 2, ...; it never rises.
        last_history: share that was classified correctly at each step itself.
        flat: after a call of an attack that takes its own gradients, share of them (one image, one step) that were
            exactly zero, so that the image was not moved; None for the other attacks.
        batches: what the batches of the last call left behind, where an attack keeps something.

    Raises:
        TypeError, ValueError, ImportError: bad arguments, or the attack's library is not installed.
    """

    name: ClassVar[str]
    norm: str
    adaptive: ClassVar[bool] = False
    library: ClassVar[str] = ""
    eps_255: float | None = None

    def __init__(self, target: nn.Module, *, seed: int = 0, batch_size: int = 32) -> None:
        self.victim = check_is_module(target, name="target")
        self.seed = check_int(seed, name="seed", low=0)
        self.batch_size = check_int(batch_size, name="batch_size", low=1)
        self.library_version = str(load_library(self.library).__version__) if self.library else ""
        self.spent = Cost()
        self.history: list[float] = []
        self.last_history: list[float] = []
        self.flat: float | None = None
        self.batches: list[Any] = []

    @abstractmethod
    def attack_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Return adversarial images for one batch; the random generators are seeded and gradients are enabled.

        Images [B, 3, H, W] and labels int64 [B] are copies on the victim's device, indices int64 [B] are on the CPU.
        """

    def snapshot_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> dict[Snapshot, Tensor]:
        """Attack one batch for `snapshots`; arguments are those of `attack_batch`."""
        return {Snapshot(self.eps_255, None): self.attack_batch(images, labels, indices)}

    def finish(self, count: int) -> None:  # noqa: B027 (a hook that few attacks need)
        """Take stock of `batches` after a call with ``count`` images."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on besides target and images, ready for JSON."""
        made = {"library": self.library, "library_version": self.library_version} if self.library else {}
        return {"name": self.name, "norm": self.norm, **kept_options(self), **made}

    @property
    def eps(self) -> float:
        """Largest allowed change of a pixel value, on the [0, 1] scale; infinite where there is no L-inf bound."""
        return math.inf if self.eps_255 is None else self.eps_255 / 255

    def estimate(self, count: int) -> Cost:
        """Cost of one call with ``count`` images, at most; nothing for attacks that are not adaptive."""
        return Cost()

    def __call__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Return adversarial images of the same shape, dtype and device, in [0, 1] and detached.

        Works under ``no_grad`` and ``inference_mode`` too. The caller's random state, the victim's modes, its
        requires_grad flags and its gradients stay as they were.

        Args:
            images: float [N, 3, H, W] in [0, 1]; not purified.
            labels: int [N], the true classes, below the victim's number of classes.
            indices: int [N], positions in the whole data set, on which the random draws depend; by default 0 to N - 1.

        Raises:
            TypeError, ValueError: bad images, labels or indices, or a victim without logits [B, C].
            RuntimeError: attack or defence broke its promise (values outside [0, 1], not finite, changes beyond eps).
        """
        whole = Snapshot(None, None)
        return self._run(images, labels, indices, lambda *batch: {whole: self.attack_batch(*batch)})[whole]

    def snapshots(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> dict[Snapshot, Tensor]:
        """Return the adversarial images [N, 3, H, W] at each limit that one run serves.

        Most attacks give one, which is what a call returns. Arguments and errors are those of a call.
        """
        return self._run(images, labels, indices, self.snapshot_batch)

    def decide(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return the target's decisions int64 [B] on images [B, 3, H, W] on its device."""
        decisions: Tensor = self.victim(images).argmax(dim=1)
        return decisions

    def fooled(self, attacked: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Return whether the target misclassifies each attacked image [N, 3, H, W], bool [N] on the CPU."""
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
        """Say which of the ``attacked`` images the target misclassifies, and how far they are from the clean ones."""
        check_images(images)
        check_images(attacked, name="attacked")
        if attacked.shape != images.shape:
            raise ValueError(f"`attacked` must have the shape {tuple(images.shape)}, got {tuple(attacked.shape)}")
        with torch.inference_mode(False), torch.no_grad():
            change = (attacked.detach() - images.detach().to(attacked)).flatten(1)
            linf, l2 = change.abs().amax(dim=1).cpu(), torch.linalg.vector_norm(change, dim=1).cpu()
            self._check_change(float(linf.max()))
            wrong, fooled = (self.fooled(given, labels, indices=indices) for given in (images, attacked))
            return AttackReport(self.settings, fooled=fooled, wrong_before=wrong, linf=linf, l2=l2)

    def _run(
        self, images: Tensor, labels: Tensor, indices: Tensor | None, attack: BatchAttack
    ) -> dict[Snapshot, Tensor]:
        """Run ``attack`` on batch after batch, on copies, with the victim frozen in eval mode; check and join."""
        check_images(images)
        order = _check_indices(indices, len(images))
        self.batches = []
        # Tensors made in inference mode cannot take part in autograd, even under enable_grad; copies made outside can.
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.victim):
            device = device_of(self.victim, images.device)
            x = images.detach().clone().to(device)
            y = self._check_labels(x, labels).to(device, copy=True)
            batches = zip(*(part.split(self.batch_size) for part in (x, y, order.clone())), strict=True)
            parts: list[dict[Snapshot, Tensor]] = []
            for given, classes, positions in batches:
                with seeded(self.seed, int(positions[0]), device):
                    results = attack(given.clone(), classes.clone(), positions)
                parts.append({limit: self._check_result(given, made.detach()) for limit, made in results.items()})
            self.finish(len(images))
            return {limit: torch.cat([part[limit] for part in parts]).to(images.device) for limit in parts[0]}

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
        if change > self.eps + TOLERANCE:
            raise RuntimeError(f"attack {self.name!r} changed a pixel by {change:.6g}, its budget is {self.eps:.6g}")


def kept_options(made: Any) -> dict[str, Any]:
    """The keyword-only arguments of an object's class and its bases, read off attributes of the same names."""
    kinds = [kind for kind in reversed(type(made).__mro__) if "__init__" in vars(kind)]
    parameters = [p for kind in kinds for p in inspect.signature(kind).parameters.values()]
    return {p.name: getattr(made, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_positive(value: float, *, name: str, high: float | None = None) -> float:
    """Return ``value`` if it is a finite number above 0, and at most ``high`` where that is given; else raise."""
    number = check_float(value, name=name, low=0, high=high)
    if number == 0:
        raise ValueError(f"`{name}` must be above 0{'' if high is None else f' and at most {high:g}'}, got {value}")
    return number


def check_levels(value: float, *, name: str) -> float:
    """Return a pixel distance in levels of 0 to 255 (not in [0, 1]) if it is above 0 and at most 255."""
    return check_positive(value, name=name, high=255)


def check_budgets(budgets: Sequence[int], *, high: int) -> list[int]:
    """Return ``budgets``, sorted and each once, if they are integers from 1 to ``high``; else raise."""
    return sorted({check_int(number, name="budgets", low=1, high=high) for number in budgets})


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


def _check_indices(indices: Tensor | None, count: int) -> Tensor:
    given = torch.arange(count) if indices is None else indices
    return check_labels(given, count=count, name="indices").cpu()
