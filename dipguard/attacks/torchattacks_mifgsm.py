"""MIFGSM from torchattacks, kept from the one place where it breaks: a gradient of zero.

torchattacks 3.5.1 divides each gradient by its mean size. Where a confident victim's cross-entropy has underflowed,
that is 0/0: the momentum is NaN from then on, the sign of NaN is 0, and the image is silently never moved.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from dipguard.attacks.gradients import NeverFlat
from dipguard.attacks.libraries import VictimView, torchattacks
from dipguard.attacks.torchattacks_linf import IterativeAttack
from dipguard.checks import check_float


class MIFGSM(IterativeAttack):
    """Momentum iterative FGSM (Dong et al., 2018), from the image itself.

    Args:
        victim: as in `Attack`.
        eps_255: radius of the ball in levels of 0 to 255, above 0; fractions are allowed.
        alpha_255: step size in levels of 0 to 255, above 0.
        steps: number of steps, at least 1.
        decay: share of the momentum that is kept from step to step, at least 0.
        seed: as in `Attack`; used only where the victim is flat, see `NeverFlat`.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "mifgsm"
    view: ClassVar[type[VictimView]] = NeverFlat

    def __init__(
        self,
        victim: nn.Module,
        *,
        eps_255: float = 8,
        alpha_255: float = 2,
        steps: int = 10,
        decay: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, eps_255=eps_255, alpha_255=alpha_255, steps=steps, seed=seed, batch_size=batch_size)
        self.decay = check_float(decay, name="decay", low=0)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Attack`, with eps, step size, steps and decay."""
        return {**super().settings, "decay": self.decay}

    def make(self, victim: nn.Module) -> Any:
        """Return torchattacks' MIFGSM."""
        return torchattacks().MIFGSM(victim, **self.in_ball, decay=self.decay)
