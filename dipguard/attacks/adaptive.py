"""Adaptive PGD: what the defence looks at is attacked through a stand-in for its backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dipguard.attacks.cost import Cost
from dipguard.attacks.defended_pgd import DefendedPGD
from dipguard.attacks.defense_aware import Purifies, check_readout
from dipguard.attacks.gradients import Unsaturated
from dipguard.attacks.stand_ins import build_stand_in
from dipguard.attacks.straight_through import straight_through
from dipguard.attacks.view_losses import LOSSES
from dipguard.checks import check_choice
from dipguard.decision.readout import STITCHED


class AdaptivePGD(DefendedPGD):
    """PGD through a defence without a gradient, on whichever of its readouts and with whichever stand-in one asks for.

    Forward, the defence itself; backward, the gradient of a ``stand_in`` that can be differentiated (BPDA, Athalye et
    al. 2018; a smooth one where the identity serves badly); the loss is read off a ``readout`` (Tramer et al. 2020:
    attack what the defence decides by). Every iterate, the last one too, is judged by the defence's own answer, which
    the same purification yields: see `BestFound` for which of them is returned.

    An image's result does not depend on its batch mates but by rounding, if the defence's does not.

    Args:
        victim: as in `DefendedPGD`.
        defense: as in `DefendedPGD`; for a ``readout`` other than ``stitched`` one of `dipguard.defenses`.
        eps_255: as in `DefendedPGD`.
        alpha_255: as in `DefendedPGD`.
        steps: as in `DefendedPGD`; there is one look more than steps.
        eot_iter: as in `DefendedPGD`.
        draws: as in `DefendedPGD`. ``fixed`` is the stronger attack.
        random_start: as in `DefendedPGD`.
        stand_in: whose gradient is taken, a key of :data:`~dipguard.attacks.stand_ins.STAND_INS`.
        stand_in_options: its options.
        readout: what the loss reads: ``stitched``, or another key of the defence's ``readouts``.
        loss: ``ce``, the negative logarithm of the true class's probability, mean over the readout's views; or
            ``margin``, the largest other logit minus the true class's, mean over the views.
        seed: as in `DefendedPGD`.
        batch_size: as in `DefendedPGD`.

    Raises:
        TypeError, ValueError: bad arguments; a readout that the defence does not have.
    """

    name: ClassVar[str] = "adaptive_pgd"

    def __init__(
        self,
        victim: nn.Module,
        defense: Purifies,
        *,
        eps_255: float = 8,
        alpha_255: float = 2,
        steps: int = 20,
        eot_iter: int = 1,
        draws: str = "fixed",
        random_start: bool = True,
        stand_in: str = "identity",
        stand_in_options: Mapping[str, Any] | None = None,
        readout: str = STITCHED,
        loss: str = "ce",
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        ascent: dict[str, Any] = {"eps_255": eps_255, "alpha_255": alpha_255, "steps": steps, "eot_iter": eot_iter}
        rest: dict[str, Any] = {"random_start": random_start, "draws": draws, "seed": seed, "batch_size": batch_size}
        super().__init__(victim, defense, **ascent, **rest)
        self.stand_in = build_stand_in(stand_in, defense, **(stand_in_options or {}))
        self.views = check_readout(defense, readout)
        self.readout = readout
        self.loss = check_choice(loss, LOSSES, name="loss")

    @property
    def settings(self) -> dict[str, Any]:
        """As in `DefendedPGD`, with stand-in, readout and loss."""
        own = {"stand_in": self.stand_in.name, "stand_in_options": self.stand_in.settings}
        return {**super().settings, **own, "readout": self.readout, "loss": self.loss}

    def estimate(self, count: int) -> Cost:
        """Cost of attacking ``count`` images: at most, and exact where the defence has its full number of views."""
        looks = count * self.eot_iter * (self.steps + 1)
        gradients = count * self.eot_iter * self.steps * self.views
        extra = 0 if self.readout == STITCHED else gradients
        own = Cost(0, count * self.eot_iter * self.steps * self.stand_in.steps_per_image, extra, gradients)
        return self.cost_of(purifications=looks) + own

    def gradient(self, images: Tensor, labels: Tensor, indices: Tensor, *, look: int) -> tuple[Tensor, Tensor]:
        """See `DefendedPGD.gradient`."""
        victim, total, answers = Unsaturated(self.victim), torch.zeros_like(images), []
        for number in range(look, look + self.eot_iter):
            asked = self.ask_indices(indices, number)
            answer, readout = self.look(images, asked, readout=self.readout)
            x = images.detach().clone().requires_grad_()
            replacement = self.stand_in(x, asked)
            views = torch.cat([straight_through(replacement, view) for view in readout.views])
            logits = victim(readout.seen(views)).unflatten(0, (len(readout.views), len(images)))
            total += torch.autograd.grad(LOSSES[self.loss](logits, labels).sum(), x)[0]
            stitched = self.readout == STITCHED
            answers.append(logits[0].detach() if stitched else self._read(answer))
            self._count(len(images), views=len(readout.views), stitched=stitched)
        return total / self.eot_iter, torch.stack(answers)

    def _read(self, answer: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.victim(answer)
        return logits

    def _count(self, images: int, *, views: int, stitched: bool) -> None:
        own = Cost(0, images * self.stand_in.steps_per_image, 0 if stitched else images * views, images * views)
        self.spent += self.cost_of(purifications=images) + own
