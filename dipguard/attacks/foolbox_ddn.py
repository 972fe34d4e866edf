"""DDN from the library foolbox (Rauber et al., 2020), with its defaults."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from dipguard.attacks.base import Attack
from dipguard.attacks.gradients import Unsaturated
from dipguard.attacks.libraries import foolbox
from dipguard.checks import check_float, check_int


class DDN(Attack):
    """Decoupled direction and norm (Rony et al., 2019): the smallest L2 change that is found to fool the victim.

    Images that it cannot fool come back unchanged. Batch mates do not influence each other, except through the noise
    that stands in for a gradient of zero.

    Args:
        victim: as in `Attack`.
        init_epsilon: first radius of the L2 ball, on the [0, 1] scale, above 0.
        steps: number of steps, at least 1.
        gamma: factor by which the radius shrinks and grows, above 0 and below 1.
        seed: as in `Attack`; used only where a gradient is zero.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "ddn"
    norm: str = "L2"

    def __init__(
        self,
        victim: nn.Module,
        *,
        init_epsilon: float = 1.0,
        steps: int = 100,
        gamma: float = 0.05,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, seed=seed, batch_size=batch_size)
        self.init_epsilon = check_float(init_epsilon, name="init_epsilon", low=0)
        self.steps = check_int(steps, name="steps", low=1)
        self.gamma = check_float(gamma, name="gamma", low=0, high=1)
        if self.init_epsilon == 0:
            raise ValueError("`init_epsilon` must be above 0, got 0")
        if self.gamma in (0, 1):
            raise ValueError(f"`gamma` must be above 0 and below 1, got {gamma}")
        self._version = str(foolbox().__version__)

    @property
    def settings(self) -> dict[str, Any]:
        """The attack's options, with the library and its version."""
        own = {"init_epsilon": self.init_epsilon, "steps": self.steps, "gamma": self.gamma}
        return {**super().settings, **own, "library": "foolbox", "library_version": self._version, "targeted": False}

    def attack_batch(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run foolbox's DDN on one batch."""
        library = foolbox()
        model = library.PyTorchModel(Unsaturated(self.victim), bounds=(0, 1), device=images.device)
        attack = library.attacks.DDNAttack(init_epsilon=self.init_epsilon, steps=self.steps, gamma=self.gamma)
        attacked: Tensor = attack.run(model, images, library.criteria.Misclassification(labels))
        return attacked.clamp(0, 1)  # it returns x + (y - x), which may round to just outside
