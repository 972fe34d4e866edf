"""Projected gradient steps on a defended victim, with every iterate judged."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.attacks.best_found import BestFound
from dipguard.attacks.defended_search import DefendedSearch
from dipguard.attacks.defense_aware import Purifies
from dipguard.attacks.torchattacks_base import check_levels
from dipguard.checks import check_int
from dipguard.seeding import image_generator


class DefendedPGD(DefendedSearch):
    """PGD (Madry et al. 2018) in L-inf on gradients that a subclass makes, averaged over ``eot_iter`` draws.

    Unlike a library's PGD it starts each image from the image's own random stream, looks at the last iterate too, and
    returns the best that it saw. A subclass implements `gradient`.

    Args:
        victim: as in `DefendedSearch`.
        defense: as in `DefendedSearch`.
        eps_255: as in `DefendedSearch`.
        alpha_255: step size in levels of 0 to 255, above 0.
        steps: number of steps, at least 1.
        eot_iter: draws whose gradients are averaged at each step, at least 1 (expectation over transformation, Athalye
            et al. 2018); with ``fixed`` draws more than 1 only costs.
        random_start: start at a uniformly drawn point of the ball, not at the image.
        draws: as in `DefendedSearch`.
        seed: as in `DefendedSearch`; an image's start depends on the seed and its index alone.
        batch_size: as in `DefendedSearch`.

    Attributes:
        flat: After a call, share of the gradients (of one image at one step) that were exactly zero: such a step does
            not move its image.
    """

    def __init__(
        self,
        victim: nn.Module,
        defense: Purifies,
        *,
        eps_255: float,
        alpha_255: float,
        steps: int,
        eot_iter: int,
        random_start: bool,
        draws: str,
        seed: int,
        batch_size: int,
    ) -> None:
        super().__init__(victim, defense, eps_255=eps_255, draws=draws, seed=seed, batch_size=batch_size)
        self.alpha_255 = check_levels(alpha_255, name="alpha_255")
        self.steps = check_int(steps, name="steps", low=1)
        self.eot_iter = check_int(eot_iter, name="eot_iter", low=1)
        self.random_start = bool(random_start)
        self.flat = 0.0
        self._flat: list[Tensor] = []

    @property
    def settings(self) -> dict[str, Any]:
        """As in `DefendedSearch`, with PGD's options."""
        own = {"alpha_255": self.alpha_255, "steps": self.steps, "eot_iter": self.eot_iter}
        return {**super().settings, **own, "random_start": self.random_start}

    @abstractmethod
    def gradient(self, images: Tensor, labels: Tensor, indices: Tensor, *, look: int) -> tuple[Tensor, Tensor | None]:
        """The loss's gradient by images [B, 3, H, W], and what was seen on the way.

        Args:
            images: the iterate, [B, 3, H, W].
            labels: int [B], the true classes.
            indices: int [B], positions in the whole data set.
            look: how many draws of each image were used before; ``eot_iter`` more are used here.

        Returns:
            The gradient, mean over the draws, [B, 3, H, W], and the victim's logits on the defence's answers,
            [eot_iter, B, C], or None where the defence was not asked.
        """

    def judged(self, step: int) -> bool:
        """Whether the defence is asked about the iterate after ``step`` steps even where `gradient` does not."""
        return step == self.steps

    def judge(self, images: Tensor, indices: Tensor, *, look: int) -> Tensor:
        """The victim's logits on the defence's answers under ``eot_iter`` draws, [eot_iter, B, C]."""
        answers = []
        for number in range(look, look + self.eot_iter):
            with torch.no_grad():
                answers.append(self.victim(self.purified(images, self.ask_indices(indices, number))))
            self.spent += self.cost_of(purifications=len(images))
        return torch.stack(answers)

    def search(self, found: BestFound, indices: Tensor) -> None:
        """Climb; see `DefendedSearch.search`."""
        x = self._start(found.given, indices)
        look = 0
        for step in range(self.steps + 1):
            gradient, answers = torch.zeros_like(x), None
            if step < self.steps:
                gradient, answers = self.gradient(x, found.labels, indices, look=look)
                self._flat.append((gradient == 0).flatten(1).all(dim=1))
                look += self.eot_iter
            if answers is None and self.judged(step):
                answers = self.judge(x, indices, look=look)
                look += self.eot_iter
            if answers is None:
                found.stay()
            else:
                found.see(x, answers)
            x = self.into_ball(x + self.alpha_255 / 255 * gradient.sign(), found.given)

    def __call__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Attack images; see `DefendedSearch` for arguments, result and errors."""
        self._flat = []
        attacked = super().__call__(images, labels, indices=indices)
        self.flat = float(torch.cat(self._flat).float().mean())
        return attacked

    def _start(self, given: Tensor, indices: Tensor) -> Tensor:
        if not self.random_start:
            return given.clone()
        start = torch.empty(given.shape, dtype=torch.float32)
        for image, index in zip(start, indices.tolist(), strict=True):
            generator = image_generator(seed=self.seed, index=index, purpose="start")
            image.uniform_(-self.budget, self.budget, generator=generator)
        return self.into_ball(given + start.to(given), given)
