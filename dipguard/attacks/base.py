"""What an attack is: `attack(images, labels)` returns adversarial images, made in seeded and checked batches."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from threading import RLock
from typing import Any, ClassVar, NamedTuple

import torch
from lightning_fabric.plugins.precision.utils import _DtypeContextManager
from torch import Tensor, nn

from dipguard.attacks.libraries import load_library
from dipguard.checks import Indices, check_images, check_indices, check_int, check_labels, check_made
from dipguard.classifier import check_is_module, device_of, frozen, logits_of
from dipguard.precision import full_precision
from dipguard.registry import foreign_class
from dipguard.seeding import image_generator
from dipguard.victims.base import check_victim

TOLERANCE = 1e-6
"""Rounding of x + delta in float32 for values in [0, 1]: a change of this much more than eps is no breach."""


class Snapshot(NamedTuple):
    """Limits that attacked images keep: largest change, in levels of 0 to 255, and steps or queries per image.

    None stands for no limit.
    """

    eps_255: float | None
    budget: int | None


@dataclass(frozen=True)
class Cost:
    """Work of an attack on a defended victim, estimated or counted. Costs add up.

    Attributes:
        purifications: Images that the defence purified.
        dip_steps: Optimiser steps of deep image priors in them.
        victim_queries: Images that the victim classified for the attack, not for the defence itself.
        gradients: Images for which the victim was differentiated.
    """

    purifications: int = 0
    dip_steps: int = 0
    victim_queries: int = 0
    gradients: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        asked = f"{self.purifications:,} purifications ({self.dip_steps:,} DIP steps)"
        return f"{asked}, {self.victim_queries:,} victim queries, {self.gradients:,} gradients"


class Attack(ABC):
    """An untargeted attack on one target: ``attack(images, labels)`` returns adversarial images.

    A subclass sets ``name``, implements `attack_batch`, and keeps each of its keyword-only arguments in an attribute of
    the same name, where `settings` finds them. An attack in an L-inf ball has the argument ``eps_255``; an attack of a
    ``library`` names it.

    Args:
        target: Classifier of images [B, 3, H, W] in [0, 1], logits [B, C]; attacked in eval mode. Adaptive attacks take
            a `DefendedVictim`.
        seed: Seed of the random draws, at least 0. Those of a batch also depend on the index of its first image.
        batch_size: Images attacked together, at least 1. In some attacks they influence each other.

    Attributes:
        spent: Cost of all calls so far, but not of `fooled`; only adaptive attacks count it.
        history: Share of the last call's images whose best attacked version is still classified correctly after step
            1, 2, ...; empty for attacks that do not keep the best one.
        last_history: Share that was classified correctly at each step itself.
        flat: Share of the last call's gradients that were exactly zero; None for attacks that do not count them.
        batches: What the batches of the last call left behind.

    Raises:
        TypeError, ValueError, ImportError: Bad arguments, or the attack's library is not installed.
    """

    name: ClassVar[str]
    adaptive: ClassVar[bool] = False
    library: ClassVar[str] = ""
    eps_255: float | None = None

    def __init__(self, target: nn.Module, *, seed: int = 0, batch_size: int = 64) -> None:
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
        """Attack one batch for `snapshots`."""
        return {Snapshot(self.eps_255, None): self.attack_batch(images, labels, indices)}

    def finish(self, count: int) -> None:  # noqa: B027 (a hook that few attacks need)
        """Evaluate `batches` after a call with ``count`` images."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on besides target and images, ready for JSON."""
        made = {"library": self.library, "library_version": self.library_version} if self.library else {}
        return {"name": self.name, **foreign_class(self), **kept_options(self), **made}

    @property
    def eps(self) -> float:
        """Largest allowed change of a pixel value, on the [0, 1] scale; infinite where there is no L-inf bound."""
        return math.inf if self.eps_255 is None else self.eps_255 / 255

    def estimate(self, count: int) -> Cost:
        """Cost of one call with ``count`` images, at most; nothing for attacks that are not adaptive."""
        return Cost()

    def __call__(self, images: Tensor, labels: Tensor, *, indices: Indices | None = None) -> Tensor:
        """Return adversarial images of the same shape, dtype and device, in [0, 1] and detached.

        Works under ``no_grad`` and ``inference_mode`` too; the caller's random state and the victim stay as they were.

        Args:
            images: Float [N, 3, H, W] in [0, 1]; not purified. Half precision is attacked in float32; rounding the
                result may then change a pixel by a little more than ``eps``.
            labels: Int [N], the true classes, below the victim's number of classes.
            indices: Int [N], positions in the whole data set, on which the random draws depend; by default 0 to N - 1.

        Raises:
            TypeError, ValueError: Bad images, labels or indices, or a victim without logits [B, C].
            RuntimeError: Attack or defence returned values outside [0, 1] or not finite, or changes beyond eps.
        """
        whole = Snapshot(None, None)
        return self._run(images, labels, indices, lambda *batch: {whole: self.attack_batch(*batch)})[whole]

    def snapshots(self, images: Tensor, labels: Tensor, *, indices: Indices | None = None) -> dict[Snapshot, Tensor]:
        """Return the adversarial images [N, 3, H, W] at each limit that one run serves; arguments as for a call."""
        return self._run(images, labels, indices, self.snapshot_batch)

    def decide(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return the target's decisions int64 [B] on images [B, 3, H, W] on its device."""
        return logits_of(self.victim, images).argmax(dim=1)

    def fooled(self, attacked: Tensor, labels: Tensor, *, indices: Indices | None = None) -> Tensor:
        """Return whether the target misclassifies each attacked image [N, 3, H, W], bool [N] on the CPU."""
        attacked = check_images(attacked, name="attacked")
        with self._exact(attacked), torch.no_grad():
            batches = self._batches(attacked, labels, indices)
            return torch.cat([self.decide(given, positions) != classes for given, classes, positions in batches]).cpu()

    def _run(
        self, images: Tensor, labels: Tensor, indices: Indices | None, attack: Callable[..., dict[Snapshot, Tensor]]
    ) -> dict[Snapshot, Tensor]:
        """Run ``attack`` on batch after batch; check and join."""
        images = check_images(images)
        self.batches = []
        with self._exact(images), torch.enable_grad():
            parts: list[dict[Snapshot, Tensor]] = []
            for given, classes, positions in self._batches(images, labels, indices):
                with seeded(self.seed, int(positions[0]), given.device):
                    results = attack(given.clone(), classes.clone(), positions)
                parts.append({limit: self._check_result(given, made.detach()) for limit, made in results.items()})
            self.finish(len(images))
            return {limit: torch.cat([part[limit] for part in parts]).to(images) for limit in parts[0]}

    @contextmanager
    def _exact(self, images: Tensor) -> Iterator[None]:
        """The victim frozen in eval mode, without the caller's inference mode and autocast, and without TF32."""
        # Tensors made in inference mode cannot take part in autograd, even under enable_grad; copies made outside can.
        full = full_precision(device_of(self.victim, images.device))
        with torch.inference_mode(False), full, frozen(self.victim):
            yield

    def _batches(self, images: Tensor, labels: Tensor, indices: Indices | None) -> Iterator[tuple[Tensor, ...]]:
        """Copies of checked images and labels on the victim's device, and of indices on the CPU, batch by batch."""
        order = torch.tensor(check_indices(indices, count=len(images)), device="cpu")
        dtype = torch.promote_types(images.dtype, torch.float32)
        x = images.detach().to(device_of(self.victim, images.device), dtype, copy=True)
        size = self.batch_size
        num_classes = check_victim(self.victim, x[:size]).shape[1]
        y = check_labels(labels, count=len(x), num_classes=num_classes).to(x.device, copy=True)
        return zip(x.split(size), y.split(size), order.split(size), strict=True)

    def _check_result(self, given: Tensor, attacked: Tensor) -> Tensor:
        if attacked.shape != given.shape or attacked.dtype != given.dtype:
            got = f"{tuple(attacked.shape)} of {attacked.dtype}"
            raise RuntimeError(f"attack {self.name!r} returned {got} for {tuple(given.shape)} of {given.dtype}")
        check_made(attacked, by=f"attack {self.name!r}")
        change = float((attacked - given).abs().max())
        if change > self.eps + TOLERANCE:
            raise RuntimeError(f"attack {self.name!r} changed a pixel by {change:.6g}, its budget is {self.eps:.6g}")
        return attacked


def kept_options(made: Any) -> dict[str, Any]:
    """The keyword-only arguments of an object's class and its bases, read off attributes of the same names."""
    kinds = [kind for kind in reversed(type(made).__mro__) if "__init__" in vars(kind)]
    parameters = [p for kind in kinds for p in inspect.signature(kind).parameters.values()]
    return {p.name: getattr(made, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_budgets(budgets: Sequence[int], *, high: int) -> list[int]:
    """Return ``budgets``, sorted and each once, if they are integers from 1 to ``high``; else raise."""
    if not isinstance(budgets, Sequence):
        raise TypeError(f"`budgets` must be a list of integers, got {budgets!r}")
    return sorted({check_int(number, name="budgets", low=1, high=high) for number in budgets})


_GENERATORS = RLock()  # the global ones: of several threads, one at a time draws from them


@contextmanager
def seeded(seed: int, index: int, device: torch.device, *, purpose: str = "attack") -> Iterator[None]:
    """Seed the generators of the CPU and the GPU in use, with float32 as default dtype; restore those of all GPUs."""
    state = image_generator(seed=seed, index=index, purpose=purpose).initial_seed()
    started = torch.cuda.is_initialized() or device.type == "cuda"
    devices = list(range(torch.cuda.device_count())) if started else []
    with _GENERATORS, _DtypeContextManager(torch.float32), torch.random.fork_rng(devices=devices):
        # torch.manual_seed, which torchattacks calls, would also seed the GPUs that are not in use here.
        torch.default_generator.manual_seed(state)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(state)
        yield
