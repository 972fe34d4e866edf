"""The target of adaptive attacks: a victim behind a defence, with rules for the defence's draws and counted costs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dipguard.attacks.base import Attack, Cost, seeded
from dipguard.checks import check_choice, check_made
from dipguard.classifier import check_is_module
from dipguard.decision.intermediates import STITCHED, Intermediate

DRAWS = ("fresh", "fixed")
_WORD = 2**32  # data sets are smaller: no index of an attack is one of the evaluation's
FINAL, JUDGE = 2**29, 2**30
"""The first of an attack's final looks, and of those that judge its images; no search looks as often."""


class Purifies(Protocol):
    """What an attack needs of a defence; each `dipguard.defenses.Defense` has it.

    Also used, if there: ``intermediates(images, *, indices)``, a dict of
    :class:`~dipguard.decision.intermediates.Intermediate`; ``intermediate_views``, its names with how often the victim
    reads an image in each; ``steps_per_image``, the DIP steps of one image; ``dip_fits``, the options of its DIP fits.
    """

    def purify(self, images: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] in [0, 1] and int [B] -> purified images [B, 3, H', W'] in [0, 1]."""
        ...


class DefendedVictim:
    """The target of adaptive attacks, ``victim(defense.purify(images))``; for the victim see `Attack`.

    ``tell``, if set, is called with the number of images after each purification, as for a progress bar.
    """

    tell: Callable[[int], object] | None = None

    def __init__(self, victim: nn.Module, defense: Purifies) -> None:
        self.victim = check_is_module(victim)
        self.defense: Any = check_defense(defense)
        self.steps_per_image = int(getattr(defense, "steps_per_image", 0))

    def views(self, intermediate: str) -> int:
        """Return how often the victim reads an image in an intermediate, at most; ValueError for an unknown one."""
        counts: dict[str, int] = getattr(self.defense, "intermediate_views", {STITCHED: 1})
        return counts[check_choice(intermediate, counts, name="intermediate")]

    def cost(self, *, purifications: int, gradients: int = 0) -> Cost:
        """Cost of purified images, each classified once by the victim."""
        return Cost(purifications, purifications * self.steps_per_image, purifications, gradients)

    def purified(self, images: Tensor, indices: Tensor, *, seed: int) -> Tensor:
        """Purify images [B, 3, H, W] with the draws of ``indices`` [B]; no gradient, the random state untouched.

        ``seed`` is for a defence that draws from the global generators. RuntimeError if no images in [0, 1] come back.
        """
        return _check_purified(self._made(self.defense.purify, images, indices, seed), images)

    def intermediate(self, images: Tensor, indices: Tensor, *, name: str, seed: int) -> tuple[Tensor, Intermediate]:
        """Purify images once: the purified images [B, 3, H', W'], and the intermediate called ``name``.

        Arguments and errors are those of `purified`. ``stitched`` is the purified images themselves.
        """
        if name == STITCHED:
            answer = self.purified(images, indices, seed=seed)
            return answer, Intermediate(answer[None])
        made: dict[str, Intermediate] = self._made(self.defense.intermediates, images, indices, seed)
        views = torch.stack([_check_purified(view, images) for view in made[name].views])
        return _check_purified(made[STITCHED].views[0], images), replace(made[name], views=views)

    def _made(self, make: Callable[..., Any], images: Tensor, indices: Tensor, seed: int) -> Any:
        with torch.no_grad(), seeded(seed, int(indices[0]), images.device, purpose="defense"):
            made = make(images.detach().clone(), indices=indices)
        if self.tell is not None:
            self.tell(len(images))
        return made


class AdaptiveAttack(Attack):
    """An untargeted attack on a `DefendedVictim`.

    Args:
        draws: What a random defence does while it is attacked. ``fresh``: each purification has draws of its own,
            different from those of the evaluation (Section 4.3 of the paper does not mention draws). ``fixed``: an
            image gets the draws of its evaluation each time, as for an attacker who knows the seed: the stronger
            attack.
    """

    adaptive: ClassVar[bool] = True

    def __init__(
        self, target: nn.Module | DefendedVictim, *, draws: str = "fresh", batch_size: int = 32, **options: Any
    ) -> None:
        if not isinstance(target, DefendedVictim):
            wanted = f"a DefendedVictim(victim, defense) for the attack {self.name!r}"
            raise TypeError(f"`target` must be {wanted}, got {type(target).__name__}")
        super().__init__(target.victim, batch_size=batch_size, **options)
        self.target = target
        self.draws = check_choice(draws, DRAWS, name="draws")

    def decide(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return the defended victim's decisions int64 [B], under the draws of ``indices``, int [B]."""
        return super().decide(self.purified(images, indices), indices)

    def purified(self, images: Tensor, indices: Tensor) -> Tensor:
        """Purify with the attack's seed; see `DefendedVictim.purified`."""
        return self.target.purified(images, indices, seed=self.seed)

    def ask_indices(self, indices: Tensor, looks: Tensor | int) -> Tensor:
        """Indices [B] to purify the images ``indices`` [B] with after ``looks`` purifications, int or int [B]."""
        if self.draws == "fixed":
            return indices
        return fresh_indices(indices, looks)


def fresh_indices(indices: Tensor, looks: Tensor | int) -> Tensor:
    """Indices that give the images ``indices`` [B] draws of their own at their look of this number, int or int [B]."""
    # A defence may seed a generator with the index itself, and torch's reads its lower 32 bits alone: those must
    # differ from look to look too, and from image to image. The factors are odd, so that they do.
    return (looks + 1) * _WORD + (indices * 0x9E3779B1 + (looks + 1) * 0x85EBCA6B) % _WORD


def check_defense(defense: Any) -> Any:
    """Return ``defense`` if it has ``purify(images, *, indices=None)``; TypeError if it has not."""
    purify, needed = getattr(defense, "purify", None), "`defense` must have purify(images, *, indices=None)"
    if not callable(purify):
        raise TypeError(f"{needed}, got {type(defense).__name__}")
    parameters = inspect.signature(purify).parameters
    if "indices" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(f"{needed}, got purify({', '.join(parameters)})")
    return defense


def _check_purified(result: Any, images: Tensor) -> Tensor:
    if not isinstance(result, Tensor) or result.ndim != 4 or result.shape[:2] != images.shape[:2]:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise RuntimeError(f"`defense` returned {got} for images {tuple(images.shape)}")
    return check_made(result, by="`defense`").detach().to(images)
