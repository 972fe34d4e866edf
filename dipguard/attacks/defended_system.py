"""Victim and defence as the one classifier that a library's attack gets to see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dipguard.attacks.best_found import BestFound
from dipguard.attacks.defense_aware import DefenseAwareAttack
from dipguard.attacks.gradients import Unsaturated
from dipguard.attacks.straight_through import straight_through

Rows = Callable[[Tensor], Tensor]
"""Images [n, 3, H, W] of a question -> which images of the batch they are attacked versions of, int [n]."""


class DefendedSystem(Unsaturated):
    """Answers with the victim's logits on what the defence makes of a question, and shows ``found`` each look.

    Its gradient by the given image is that by the purified one (BPDA's identity, Athalye et al. 2018).

    Args:
        attack: whose defence, draws and account of costs.
        found: the batch's; every look is shown to it.
        indices: the batch's positions in the whole data set, int [B].
        looks: how often the attack has looked at each image, int [B]; counted on.
        rows: which images of the batch a question is about. A library's search leaves out images that it has fooled,
            and does not say which; the draws of the others would be mixed up.
        eot_iter: questions that follow each other about the same iterate, which count as one look.
    """

    def __init__(
        self,
        attack: DefenseAwareAttack,
        found: BestFound,
        indices: Tensor,
        *,
        looks: Tensor,
        rows: Rows,
        eot_iter: int = 1,
    ) -> None:
        super().__init__(attack.victim)
        self._attack = attack
        self._found = found
        self._indices = indices
        self._rows = rows
        self._eot_iter = eot_iter
        self._looks = looks
        self._answers: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """Return the defended victim's logits [n, C] on attacked images [n, 3, H, W]."""
        attack, rows = self._attack, self._rows(images)
        at = rows.to(self._indices.device)
        purified = attack.purified(images, attack.ask_indices(self._indices[at], self._looks[at]))
        self._looks[at] += 1
        gradients = len(images) if images.requires_grad and torch.is_grad_enabled() else 0
        attack.spent += attack.cost_of(purifications=len(images), gradients=gradients)
        logits = super().forward(straight_through(images, purified))
        self._answers.append(logits.detach().clone())  # Square writes into the logits that it gets
        if len(self._answers) == self._eot_iter:
            self._found.see(images, torch.stack(self._answers), rows=rows)
            self._answers = []
        return logits


def nearest(images: Tensor, given: Tensor) -> Tensor:
    """Which of ``given`` [B, 3, H, W] each of ``images`` [n, 3, H, W] is nearest to in L-inf, int [n]."""
    return torch.stack([(images - one).abs().flatten(1).amax(dim=1) for one in given]).argmin(dim=0)


def apart_by(distance: float, images: Tensor) -> list[Tensor]:
    """Positions int [b] of groups of images [B, 3, H, W], all further apart in L-inf than this within each of them.

    Then of an image that lies within half that distance of one of them, `nearest` tells which.
    """
    groups: list[list[int]] = []
    for position, image in enumerate(images):
        far = (g for g in groups if float((images[g] - image).abs().flatten(1).amax(dim=1).min()) > distance)
        home = next(far, None)
        if home is None:
            groups.append([position])
        else:
            home.append(position)
    return [torch.tensor(group, device=images.device) for group in groups]
