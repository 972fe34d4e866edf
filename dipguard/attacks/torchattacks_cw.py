"""C&W from torchattacks, with its defaults and a working objective (see `LogitsAboveZero`)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from dipguard.attacks.libraries import VictimView, torchattacks
from dipguard.attacks.torchattacks_base import TorchAttack
from dipguard.checks import check_float, check_int


class LogitsAboveZero(VictimView):
    """Adds a constant to each image's logits, so that the lowest is 0: decisions and margins stay as they are.

    torchattacks' C&W finds the best other class as the maximum of logits with the true class's set to 0. Where all
    others are negative, that finds the 0: the attack then pushes the true logit below 0 instead of below its rivals.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return the shifted logits [B, C]."""
        logits = super().forward(images)
        return logits - logits.detach().amin(dim=1, keepdim=True)


class CW(TorchAttack):
    """Carlini and Wagner's L2 attack (2017), in tanh space, with a fixed c (torchattacks has no binary search for it).

    Images that it cannot fool come back unchanged; pixels at exactly 0 or 1 never move (tanh cannot leave its limits).
    It stops early when the summed cost of the whole batch rises, so an image's result depends on its batch mates: keep
    ``batch_size`` and the order of the images fixed to compare results.

    Args:
        victim: as in `Attack`.
        c: weight of the misclassification term against the squared L2 distance, above 0.
        kappa: confidence, the logit margin aimed at, at least 0.
        steps: number of Adam steps, at least 1.
        lr: Adam's learning rate, above 0.
        seed: as in `Attack`; C&W draws nothing.
        batch_size: as in `Attack`.
    """

    name: ClassVar[str] = "cw"
    norm: str = "L2"
    view: ClassVar[type[VictimView]] = LogitsAboveZero

    def __init__(
        self,
        victim: nn.Module,
        *,
        c: float = 1,
        kappa: float = 0,
        steps: int = 50,
        lr: float = 0.01,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, seed=seed, batch_size=batch_size)
        self.c = check_float(c, name="c", low=0)
        self.kappa = check_float(kappa, name="kappa", low=0)
        self.steps = check_int(steps, name="steps", low=1)
        self.lr = check_float(lr, name="lr", low=0)
        for name, value in (("c", self.c), ("lr", self.lr)):
            if value == 0:
                raise ValueError(f"`{name}` must be above 0, got 0")

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Attack`, with c, kappa, steps and learning rate."""
        return {**super().settings, "c": self.c, "kappa": self.kappa, "steps": self.steps, "lr": self.lr}

    def make(self, victim: nn.Module) -> Any:
        """Return torchattacks' C&W."""
        return torchattacks().CW(victim, c=self.c, kappa=self.kappa, steps=self.steps, lr=self.lr)
