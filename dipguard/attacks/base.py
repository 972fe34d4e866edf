"""What an attack on a victim is: `attack(images, labels)` returns adversarial images."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from dipguard.attacks.frame import AttackFrame


class Attack(AttackFrame):
    """An untargeted attack on one victim: ``attack(images, labels)`` returns adversarial images.

    A subclass sets ``name`` and ``norm``, and implements `attack_batch`; it may add to `settings`. Its arguments
    are those of `AttackFrame`.
    """

    @abstractmethod
    def attack_batch(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images [B, 3, H, W] for one batch on the victim's device.

        Called with gradients enabled, the victim frozen in eval mode and the random generators seeded.
        """

    def __call__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Return adversarial images of the same shape, dtype and device, in [0, 1] and detached.

        Works under ``no_grad`` and ``inference_mode`` too. The caller's random state, the victim's modes, its
        requires_grad flags and its gradients are left as they were.

        Args:
            images: float [N, 3, H, W] in [0, 1].
            labels: int [N], the true classes, below the victim's number of classes.
            indices: int [N], positions in the whole data set; by default 0 to N - 1. A batch's random draws depend on
                the seed and the index of its first image.

        Raises:
            TypeError, ValueError: bad images, labels or indices, or a victim without logits [B, C].
            RuntimeError: the attack broke its promise (values outside [0, 1], not finite, or beyond the budget).
        """
        (attacked,) = self.run_batches(images, labels, indices, lambda x, y, _: [self.attack_batch(x, y)])
        return attacked
