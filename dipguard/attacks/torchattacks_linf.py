"""The gradient sign family inside the L-inf ball, from torchattacks with its defaults: FGSM, BIM, PGD, EOTPGD.

Where the victim is so sure that the loss has no gradient they get one: see `Unsaturated`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from dipguard.attacks.gradients import Unsaturated
from dipguard.attacks.libraries import VictimView, torchattacks
from dipguard.attacks.torchattacks_base import LinfAttack, check_levels
from dipguard.checks import check_int


class FGSM(LinfAttack):
    """Fast gradient sign method (Goodfellow et al., 2015): one step of size eps in L-inf.

    Args:
        victim: as in `Attack`.
        eps_255: step size in levels of 0 to 255, above 0; fractions are allowed.
        seed: as in `Attack`; FGSM draws nothing.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "fgsm"
    view: ClassVar[type[VictimView]] = Unsaturated

    def __init__(self, victim: nn.Module, *, eps_255: float = 8, seed: int = 0, batch_size: int = 32) -> None:
        super().__init__(victim, eps_255=eps_255, seed=seed, batch_size=batch_size)

    def make(self, victim: nn.Module) -> Any:
        """Return torchattacks' FGSM."""
        return torchattacks().FGSM(victim, eps=self.budget)


class IterativeAttack(LinfAttack):
    """Several steps of size alpha inside the ball: what BIM, PGD, MIFGSM and EOTPGD share."""

    view: ClassVar[type[VictimView]] = Unsaturated

    def __init__(
        self, victim: nn.Module, *, eps_255: float, alpha_255: float, steps: int, seed: int, batch_size: int
    ) -> None:
        super().__init__(victim, eps_255=eps_255, seed=seed, batch_size=batch_size)
        self.alpha_255 = check_levels(alpha_255, name="alpha_255")
        self.steps = check_int(steps, name="steps", low=1)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Attack`, with eps, step size and steps."""
        return {**super().settings, "alpha_255": self.alpha_255, "steps": self.steps}

    @property
    def in_ball(self) -> dict[str, Any]:
        """eps, step size (both on the [0, 1] scale) and steps, as torchattacks names them."""
        return {"eps": self.budget, "alpha": self.alpha_255 / 255, "steps": self.steps}


class BIM(IterativeAttack):
    """Basic iterative method (Kurakin et al., 2017): FGSM in small steps from the image itself.

    Args:
        victim: as in `Attack`.
        eps_255: radius of the ball in levels of 0 to 255, above 0; fractions are allowed.
        alpha_255: step size in levels of 0 to 255, above 0.
        steps: number of steps, at least 1.
        seed: as in `Attack`; BIM draws nothing.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "bim"

    def __init__(
        self,
        victim: nn.Module,
        *,
        eps_255: float = 8,
        alpha_255: float = 2,
        steps: int = 10,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, eps_255=eps_255, alpha_255=alpha_255, steps=steps, seed=seed, batch_size=batch_size)

    def make(self, victim: nn.Module) -> Any:
        """Return torchattacks' BIM."""
        return torchattacks().BIM(victim, **self.in_ball)


class PGD(IterativeAttack):
    """Projected gradient descent (Madry et al., 2018) in the L-inf ball, from a random start.

    Args:
        victim: as in `Attack`.
        eps_255: radius of the ball in levels of 0 to 255, above 0; fractions are allowed.
        alpha_255: step size in levels of 0 to 255, above 0.
        steps: number of steps, at least 1.
        random_start: start at a uniformly drawn point of the ball, not at the image.
        seed: as in `Attack`.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "pgd"

    def __init__(
        self,
        victim: nn.Module,
        *,
        eps_255: float = 8,
        alpha_255: float = 2,
        steps: int = 10,
        random_start: bool = True,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, eps_255=eps_255, alpha_255=alpha_255, steps=steps, seed=seed, batch_size=batch_size)
        self.random_start = bool(random_start)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Attack`, with eps, step size, steps and start."""
        return {**super().settings, "random_start": self.random_start}

    def make(self, victim: nn.Module) -> Any:
        """Return torchattacks' PGD."""
        return torchattacks().PGD(victim, **self.in_ball, random_start=self.random_start)


class EOTPGD(PGD):
    """PGD on a gradient averaged over several looks at a random victim (Athalye et al., 2018; Zimmermann, 2019).

    On a victim that draws nothing it is PGD at ``eot_iter`` times the cost.

    Args:
        victim: as in `Attack`.
        eps_255: radius of the ball in levels of 0 to 255, above 0; fractions are allowed.
        alpha_255: step size in levels of 0 to 255, above 0.
        steps: number of steps, at least 1.
        eot_iter: gradients averaged at each step, at least 1.
        random_start: start at a uniformly drawn point of the ball, not at the image.
        seed: as in `Attack`.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "eotpgd"

    def __init__(
        self,
        victim: nn.Module,
        *,
        eps_255: float = 8,
        alpha_255: float = 2,
        steps: int = 10,
        eot_iter: int = 2,
        random_start: bool = True,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(
            victim,
            eps_255=eps_255,
            alpha_255=alpha_255,
            steps=steps,
            random_start=random_start,
            seed=seed,
            batch_size=batch_size,
        )
        self.eot_iter = check_int(eot_iter, name="eot_iter", low=1)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `PGD`, with the number of gradients averaged."""
        return {**super().settings, "eot_iter": self.eot_iter}

    def make(self, victim: nn.Module) -> Any:
        """Return torchattacks' EOTPGD."""
        return torchattacks().EOTPGD(victim, **self.in_ball, eot_iter=self.eot_iter, random_start=self.random_start)
