"""The fit itself, unrolled over few steps and differentiated: no stand-in for its backward pass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.attacks.cost import Cost
from dipguard.attacks.defended_pgd import DefendedPGD
from dipguard.attacks.defense_aware import Purifies
from dipguard.attacks.gradients import Unsaturated
from dipguard.attacks.short_dip import fits_of
from dipguard.attacks.view_losses import LOSSES
from dipguard.checks import check_choice, check_float, check_int
from dipguard.fit.unrolled import FLOOR, unrolled_fit


class Unrolled(DefendedPGD):
    """PGD on the victim behind a short DIP fit, differentiated through all of its optimiser's steps.

    Forward and backward pass of a step are those of the defence's own fits (networks, rate, draws; each gives a view)
    after T steps, where the defence itself takes many more and does more with them: what is found is handed over. The
    defence itself judges the start, every ``judge_every``-th iterate and the last; `history` and `last_history` stand
    still in between. A defence without a DIP is attacked through :data:`~dipguard.attacks.short_dip.DEFAULT`.

    An image's result does not depend on its batch mates but by rounding, which many steps of Adam amplify.

    Args:
        victim: as in `DefendedPGD`.
        defense: as in `DefendedPGD`.
        eps_255: as in `DefendedPGD`.
        alpha_255: as in `DefendedPGD`.
        steps: as in `DefendedPGD`.
        T: optimiser steps that are unrolled, at least 2; memory and time grow with them.
        floor: as in :func:`~dipguard.fit.unrolled.unrolled_fit`; 0 for the exact gradient.
        eot_iter: as in `DefendedPGD`.
        draws: as in `DefendedPGD`; they settle the unrolled fits' weights, z and jitter too.
        random_start: as in `DefendedPGD`.
        judge_every: steps from one judgement by the defence to the next, at least 1.
        loss: as in `AdaptivePGD`; the views are the fits' last reconstructions.
        seed: as in `DefendedPGD`.
        batch_size: as in `DefendedPGD`; fewer images where memory is short.

    Raises:
        TypeError, ValueError: bad arguments.
    """

    name: ClassVar[str] = "unrolled"

    def __init__(
        self,
        victim: nn.Module,
        defense: Purifies,
        *,
        eps_255: float = 8,
        alpha_255: float = 2,
        steps: int = 20,
        T: int = 40,
        floor: float = FLOOR,
        eot_iter: int = 1,
        draws: str = "fixed",
        random_start: bool = True,
        judge_every: int = 5,
        loss: str = "ce",
        seed: int = 0,
        batch_size: int = 8,
    ) -> None:
        ascent: dict[str, Any] = {"eps_255": eps_255, "alpha_255": alpha_255, "steps": steps, "eot_iter": eot_iter}
        rest: dict[str, Any] = {"random_start": random_start, "draws": draws, "seed": seed, "batch_size": batch_size}
        super().__init__(victim, defense, **ascent, **rest)
        self.T = check_int(T, name="T", low=2)
        self.floor = check_float(floor, name="floor", low=0.0)
        self.judge_every = check_int(judge_every, name="judge_every", low=1)
        self.loss = check_choice(loss, LOSSES, name="loss")
        self.fits = fits_of(defense)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `DefendedPGD`, with T, floor, the loss and the distance of judgements."""
        own = {"T": self.T, "floor": self.floor, "judge_every": self.judge_every, "loss": self.loss}
        return {**super().settings, **own}

    def judged(self, step: int) -> bool:
        """The start, every ``judge_every``-th step and the last."""
        return step % self.judge_every == 0 or step == self.steps

    def estimate(self, count: int) -> Cost:
        """Cost of attacking ``count`` images, exact; the unrolled steps count as DIP steps, though each costs more."""
        judgements = sum(self.judged(step) for step in range(self.steps + 1))
        return self.cost_of(purifications=count * self.eot_iter * judgements) + self._climbed(count * self.steps)

    def gradient(self, images: Tensor, labels: Tensor, indices: Tensor, *, look: int) -> tuple[Tensor, None]:
        """See `DefendedPGD.gradient`; the defence is not asked."""
        victim, total = Unsaturated(self.victim), torch.zeros_like(images)
        for number in range(look, look + self.eot_iter):
            asked = self.ask_indices(indices, number).tolist()
            x = images.detach().clone().requires_grad_()
            views = [unrolled_fit(x, T=self.T, fit=fit, indices=asked, floor=self.floor) for fit in self.fits]
            logits = victim(torch.cat(views)).unflatten(0, (len(views), len(images)))
            total += torch.autograd.grad(LOSSES[self.loss](logits, labels).sum(), x)[0]
        self.spent += self._climbed(len(images))
        return total / self.eot_iter, None

    def _climbed(self, count: int) -> Cost:
        """Of one step."""
        views = count * self.eot_iter * len(self.fits)
        return Cost(0, views * self.T, views, views)
