"""BPDA: PGD through a defence that has no gradient, whose backward pass is taken for the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from dipguard.attacks.cost import Cost
from dipguard.attacks.defense_aware import DefenseAwareAttack, Purifies
from dipguard.attacks.gradients import Unsaturated
from dipguard.attacks.libraries import torchattacks
from dipguard.attacks.straight_through import straight_through
from dipguard.attacks.torchattacks_base import check_levels
from dipguard.checks import check_int

FIGURE_4 = tuple(range(1, 16))
"""The iterations at which Figure 4 reads the accuracy."""


class BPDA(DefenseAwareAttack):
    """Backward pass differentiable approximation (Athalye et al., 2018) with PGD in L-inf, as in Figure 4.

    At each step the loss's gradient by the *purified* image is applied to the given one (Section 4.3.1). Where a
    defence changes the resolution, the gradient is brought back by the adjoint of a bilinear resize, in the place of
    the paper's down-sampling (appendix A). The steps are those of torchattacks' EOTPGD: with
    ``eot_iter`` 1 that is PGD.

    Args:
        victim: as in `DefenseAwareAttack`.
        defense: as in `DefenseAwareAttack`.
        eps_255: radius of the L-inf ball in levels of 0 to 255, above 0.
        alpha_255: step size in levels of 0 to 255, above 0. The paper does not say; 2 is its PGD's.
        steps: number of steps, at least 1.
        random_start: start at a uniformly drawn point of the ball, not at the image.
        eot_iter: purifications whose gradients are averaged at each step, at least 1 (expectation over transformation);
            more than 1 only helps against random defences with ``fresh`` draws.
        draws: as in `DefenseAwareAttack`.
        seed: as in `DefenseAwareAttack`.
        batch_size: as in `DefenseAwareAttack`.
    """

    name: ClassVar[str] = "bpda"
    norm: str = "Linf"

    def __init__(
        self,
        victim: nn.Module,
        defense: Purifies,
        *,
        eps_255: float = 8,
        alpha_255: float = 2,
        steps: int = 15,
        random_start: bool = True,
        eot_iter: int = 1,
        draws: str = "fresh",
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(victim, defense, draws=draws, seed=seed, batch_size=batch_size)
        self.eps_255 = check_levels(eps_255, name="eps_255")
        self.alpha_255 = check_levels(alpha_255, name="alpha_255")
        self.steps = check_int(steps, name="steps", low=1)
        self.random_start = bool(random_start)
        self.eot_iter = check_int(eot_iter, name="eot_iter", low=1)
        self._version = str(torchattacks().__version__)

    @property
    def budget(self) -> float:
        """eps on the [0, 1] scale."""
        return self.eps_255 / 255

    @property
    def settings(self) -> dict[str, Any]:
        """As in `DefenseAwareAttack`, with PGD's options, the library and its version."""
        own = {"eps_255": self.eps_255, "alpha_255": self.alpha_255, "steps": self.steps}
        own |= {"random_start": self.random_start, "eot_iter": self.eot_iter}
        return {**super().settings, **own, "library": "torchattacks", "library_version": self._version}

    def estimate(self, count: int, *, iterations: int | None = None) -> Cost:
        """Cost of attacking ``count`` images with ``iterations`` steps (by default ``steps``): it is exact."""
        looks = count * self.eot_iter * (self.steps if iterations is None else iterations)
        return self.cost_of(purifications=looks, gradients=looks)

    def __call__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> Tensor:
        """Return the adversarial images after the last step; see `curve` for arguments and errors."""
        return self.curve(images, labels, iterations=(self.steps,), indices=indices)[self.steps]

    def curve(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        iterations: Sequence[int] = FIGURE_4,
        indices: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Return the adversarial images [N, 3, H, W] after each of ``iterations`` steps, from one run of the largest.

        Args:
            images: float [N, 3, H, W] in [0, 1], not purified.
            labels: int [N], the true classes.
            iterations: numbers of steps, each at least 1.
            indices: int [N], positions in the whole data set; by default 0 to N - 1.

        Raises:
            TypeError, ValueError: bad images, labels, indices or iterations.
            RuntimeError: the defence or the attack broke its promise.
        """
        wanted = sorted({check_int(number, name="iterations", low=1) for number in iterations})
        if not wanted:
            raise ValueError("`iterations` must name at least one number of steps, got none")

        def attack(x: Tensor, y: Tensor, positions: Tensor) -> list[Tensor]:
            return self._after_each(x, y, positions, wanted)

        return dict(zip(wanted, self.run_batches(images, labels, indices, attack), strict=True))

    def _after_each(self, images: Tensor, labels: Tensor, indices: Tensor, wanted: list[int]) -> list[Tensor]:
        system = _Defended(self, indices)
        options = {"eps": self.budget, "alpha": self.alpha_255 / 255, "steps": wanted[-1], "eot_iter": self.eot_iter}
        last: Tensor = torchattacks().EOTPGD(system, **options, random_start=self.random_start)(images, labels)
        # What the attack looks at in step k + 1 is what step k made.
        made = [*system.looked_at[:: self.eot_iter], last]
        return [made[number] for number in wanted]


class _Defended(Unsaturated):
    """Victim and defence as one classifier whose gradient by the given image is that by the purified one."""

    def __init__(self, attack: BPDA, indices: Tensor) -> None:
        super().__init__(attack.victim)
        self._attack = attack
        self._indices = indices
        self.looked_at: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        attack = self._attack
        asked = attack.ask_indices(self._indices, len(self.looked_at))
        purified = attack.purified(images, asked)
        attack.spent += attack.cost_of(purifications=len(images), gradients=len(images))
        self.looked_at.append(images.detach().clone())
        return super().forward(straight_through(images, purified))
