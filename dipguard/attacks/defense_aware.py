"""What the attacks that know the defence share: they meet victim and defence as one system, and count its use."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dipguard.attacks.cost import Cost
from dipguard.attacks.frame import AttackFrame, seeded
from dipguard.checks import check_choice
from dipguard.decision.readout import STITCHED, Readout

DRAWS = ("fresh", "fixed")
"""How a random defence draws while it is attacked, see `DefenseAwareAttack`."""

_WORD = 2**32  # data sets are smaller: no index of an attack is one of the evaluation's


class Purifies(Protocol):
    """What is needed of a defence: the shape of `dipguard.defenses.Defense`."""

    def purify(self, images: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] in [0, 1] and int [B] -> purified images [B, 3, H', W'] in [0, 1]."""
        ...


class DefenseAwareAttack(AttackFrame):
    """An untargeted attack on ``victim(defense.purify(images))``.

    ``draws`` says what a random defence does while it is attacked. ``fresh``: each purification has draws of its own,
    as in a service that does not repeat itself, and none of them is one of the evaluation's; this is the paper's
    setting (Section 4.3), where a DIP starts anew at each look. ``fixed``: an image gets the draws of its evaluation
    each time; the attacker knows the seed, and the system is deterministic. That is the strongest attack, and the one
    to choose where the defence must not live on its randomness.

    ``spent`` is the cost of all calls so far, counted; `report` asks the defence too, but is no part of the attack.

    Args:
        victim: classifier of images [B, 3, H, W] in [0, 1], logits [B, C].
        defense: has ``purify(images, *, indices)``; ``steps_per_image``, if it has that, is an image's DIP steps.
        draws: ``fresh`` or ``fixed``.
        seed: of the attack's random draws.
        batch_size: images attacked together, at least 1.

    Raises:
        TypeError, ValueError: bad arguments.
    """

    def __init__(
        self,
        victim: nn.Module,
        defense: Purifies,
        *,
        draws: str = "fresh",
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, seed=seed, batch_size=batch_size)
        self.defense = check_defense(defense)
        self.draws = check_choice(draws, DRAWS, name="draws")
        self.steps_per_image = int(getattr(defense, "steps_per_image", 0))
        self.spent = Cost()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on besides victim, defence and images, ready for JSON."""
        return {**super().settings, "draws": self.draws}

    def decide(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return the classes int64 [B] that the defended victim reads, with the draws of the evaluation."""
        return super().decide(self.purified(images, indices), indices)

    def cost_of(self, *, purifications: int, gradients: int = 0) -> Cost:
        """Cost of so many purified images, each read once by the victim."""
        return Cost(purifications, purifications * self.steps_per_image, purifications, gradients)

    def ask_indices(self, indices: Tensor, looks: Tensor | int) -> Tensor:
        """Indices [B] whose draws the defence shall make when it purifies image ``indices`` for the ``looks``-th time.

        Args:
            indices: int [B], positions in the whole data set.
            looks: how often the attack has looked at each image before; int or int [B].
        """
        if self.draws == "fixed":
            return indices
        # A defence may seed a generator with the index itself, and torch's looks at the lower 32 bits alone: those must
        # differ from look to look too, and from image to image. The factors are odd, so that they do.
        return (looks + 1) * _WORD + (indices * 0x9E3779B1 + (looks + 1) * 0x85EBCA6B) % _WORD

    def purified(self, images: Tensor, indices: Tensor) -> Tensor:
        """Purify images [B, 3, H, W] with the draws of ``indices`` [B]; no gradient, the random state untouched.

        Raises:
            RuntimeError: the defence returned something that is no set of images in [0, 1].
        """
        with torch.no_grad(), seeded(self.seed, int(indices[0]), images.device, purpose="defense"):
            result = self.defense.purify(images.detach().clone(), indices=indices)
        return _check_purified(result, images)

    def look(self, images: Tensor, indices: Tensor, *, readout: str = STITCHED) -> tuple[Tensor, Readout]:
        """One purification of images [B, 3, H, W]: the defence's answer, and what ``readout`` names of its way there.

        Args:
            images: [B, 3, H, W] in [0, 1].
            indices: int [B]; their draws are made.
            readout: a key of what the defence's ``readouts(images, *, indices)`` returns; ``stitched`` is the answer,
                which every defence has.

        Returns:
            The answer [B, 3, H', W'] as `purified` returns it, and the readout, its views like ``images``.

        Raises:
            RuntimeError: the defence returned something that is no set of images in [0, 1].
        """
        if readout == STITCHED:
            answer = self.purified(images, indices)
            return answer, Readout(answer[None])
        with torch.no_grad(), seeded(self.seed, int(indices[0]), images.device, purpose="defense"):
            made: dict[str, Readout] = self.defense.readouts(images.detach().clone(), indices=indices)
        views = torch.stack([_check_purified(view, images) for view in made[readout].views])
        return _check_purified(made[STITCHED].views[0], images), Readout(views, made[readout].look)


def _check_purified(result: Any, images: Tensor) -> Tensor:
    if not isinstance(result, Tensor) or result.ndim != 4 or result.shape[:2] != images.shape[:2]:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise RuntimeError(f"`defense` returned {got} for images {tuple(images.shape)}")
    low, high = (float(value) for value in torch.aminmax(result))
    if not (low >= 0 and high <= 1):  # false for NaN
        raise RuntimeError(f"`defense` left [0, 1]: its values go from {low:.4g} to {high:.4g}")
    return result.detach().to(images)


def check_readout(defense: Any, name: str) -> int:
    """Return how many views an image of ``defense`` has, at most, in the readout called ``name``.

    Raises:
        ValueError: the defence has no such readout; the message lists those that it has.
    """
    counts: dict[str, int] = getattr(defense, "readout_views", {STITCHED: 1})
    return counts[check_choice(name, counts, name="readout")]


def check_defense(defense: Any) -> Any:
    """Return ``defense`` if it has ``purify(images, *, indices=None)``.

    Raises:
        TypeError: it has not.
    """
    purify = getattr(defense, "purify", None)
    if not callable(purify):
        raise TypeError(f"`defense` must have purify(images, *, indices=None), got {type(defense).__name__}")
    parameters = inspect.signature(purify).parameters
    if "indices" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(f"`defense` must have purify(images, *, indices=None), got purify({', '.join(parameters)})")
    return defense
