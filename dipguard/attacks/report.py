"""What an attack achieved, image by image: whom it fooled, and how far it had to go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttackReport:
    """The outcome of one attack on N images; all tensors are on the CPU.

    Attributes:
        settings: the attack's.
        fooled: bool [N], whether the attacked image is not read as its true class.
        wrong_before: bool [N], whether the clean image was not either.
        linf: float [N], largest change of a pixel value, on the [0, 1] scale.
        l2: float [N], Euclidean norm of the change, on the [0, 1] scale.
    """

    settings: dict[str, Any]
    fooled: Tensor
    wrong_before: Tensor
    linf: Tensor
    l2: Tensor

    @property
    def not_fooled(self) -> int:
        """Number of images that are still read rightly: the attack could not fool the victim on them."""
        return int((~self.fooled).sum())

    @property
    def accuracy(self) -> float:
        """Share of images that are still read rightly, in [0, 1]."""
        return self.not_fooled / len(self.fooled)

    def summary(self) -> dict[str, Any]:
        """Settings and counts, ready for JSON; the mean norms (in [0, 1]) are of the images that it turned."""
        turned = self.fooled & ~self.wrong_before
        return {
            "settings": self.settings,
            "images": len(self.fooled),
            "wrong_before": int(self.wrong_before.sum()),
            "not_fooled": self.not_fooled,
            "linf_max": float(self.linf.max()),
            "linf_mean": _mean(self.linf[turned]),
            "l2_mean": _mean(self.l2[turned]),
        }


def perturbation_norms(images: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """L-inf and L2 norms [N] of ``attacked - images``, both [N, 3, H, W] in [0, 1], on the CPU."""
    change = (attacked.detach() - images.detach().to(attacked)).flatten(1)
    return change.abs().amax(dim=1).cpu(), torch.linalg.vector_norm(change, dim=1).cpu()


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None
