"""torchattacks' attacks on a defended victim: PGD (BPDA), AutoAttack's version for random victims, and Square."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dipguard.attacks.backward import straight_through
from dipguard.attacks.base import Cost, Snapshot, check_budgets
from dipguard.attacks.best_found import BestFound, DefendedSearch
from dipguard.attacks.libraries import Unsaturated, torchattacks
from dipguard.attacks.static import check_classes
from dipguard.attacks.target import AdaptiveAttack, DefendedVictim
from dipguard.checks import check_bool, check_int, check_positive

RAND = ("ce", "dlr")  # the losses of AutoAttack's version ``rand``: one run of APGD each


class BPDA(AdaptiveAttack):
    """Backward pass differentiable approximation (Athalye et al. 2018) with PGD in L-inf; Figure 4 of the paper.

    At each step of torchattacks' PGD the loss's gradient by the *purified* image is applied to the given one (Section
    4.3.1); across resolutions by the adjoint of a bilinear resize, where the paper down-samples (appendix A).

    Args:
        eps_255: Radius of the L-inf ball in levels of 0 to 255, above 0.
        alpha_255: Step size in levels of 0 to 255, above 0. The paper does not give it; 2 is that of its PGD.
        steps: Number of steps, at least 1.
        budgets: Numbers of steps, from 1 to ``steps``, after which `snapshots` returns the images; by default the last.
        random_start: Start at a uniformly drawn point of the ball, not at the image.
    """

    name: ClassVar[str] = "bpda"
    library: ClassVar[str] = "torchattacks"

    def __init__(
        self,
        target: DefendedVictim,
        *,
        eps_255: float = 8,
        alpha_255: float = 2,
        steps: int = 15,
        budgets: Sequence[int] = (),
        random_start: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        self.eps_255 = check_positive(eps_255, name="eps_255", high=255)
        self.alpha_255 = check_positive(alpha_255, name="alpha_255", high=255)
        self.steps = check_int(steps, name="steps", low=1)
        self.budgets = check_budgets(budgets, high=self.steps)
        self.random_start = check_bool(random_start, name="random_start")

    def estimate(self, count: int) -> Cost:
        """Cost of one call with ``count`` images, exact."""
        return self.target.cost(purifications=count * self.steps, gradients=count * self.steps)

    def attack_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Return the images after the last step."""
        return self._iterates(images, labels, indices)[-1]

    def snapshot_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> dict[Snapshot, Tensor]:
        """Return the images after each of ``budgets`` steps."""
        made = self._iterates(images, labels, indices)
        return {Snapshot(self.eps_255, number): made[number or -1] for number in self.budgets or (None,)}

    def _iterates(self, images: Tensor, labels: Tensor, indices: Tensor) -> list[Tensor]:
        """The start, and the images after each step."""
        asked: list[Tensor] = []
        module = DefendedModule(self, indices, lambda images, logits, rows: asked.append(images.clone()))
        options = {"eps": self.eps, "alpha": self.alpha_255 / 255, "steps": self.steps}
        last = torchattacks().PGD(module, **options, random_start=self.random_start)(images, labels)
        return [*asked, last]  # what it looks at in step k + 1 is what step k made


class DefendedAutoAttack(DefendedSearch):
    """AutoAttack's version ``rand`` (Croce and Hein 2020): APGD-CE, then APGD-DLR on the images that withstood it.

    The gradient is BPDA's identity. A figure comparable with its authors' needs their 20 looks (``eot_iter``, at least
    1) and 100 ``steps`` of each run (at least 1; a run has one look more). The draws of the starts depend on the seed
    and the index of a batch's first image. The victim needs at least 3 classes, for the DLR loss.
    """

    name: ClassVar[str] = "defended_autoattack"
    library: ClassVar[str] = "torchattacks"

    def __init__(self, target: DefendedVictim, *, steps: int = 10, eot_iter: int = 1, **options: Any) -> None:
        super().__init__(target, **options)
        self.steps = check_int(steps, name="steps", low=1)
        self.eot_iter = check_int(eot_iter, name="eot_iter", low=1)

    def estimate(self, count: int) -> Cost:
        """Cost of one call, at most; less where the first run fooled the victim on some images."""
        looks = count * self.eot_iter * (self.steps + 1) * len(RAND)
        return self.target.cost(purifications=looks, gradients=looks) + self.final_cost(count)

    def search(self, found: BestFound, indices: Tensor) -> None:
        """Run both losses."""
        check_classes(self.victim, found.given, least=3, needed_by=self.name)
        answers: list[Tensor] = []

        def see(images: Tensor, logits: Tensor, rows: Tensor) -> None:
            answers.append(logits)
            if len(answers) == self.eot_iter:  # questions about the same iterate
                found.see(images, torch.stack(answers), rows=rows)
                answers.clear()

        module = DefendedModule(self, indices, see)
        for loss in RAND:
            module.at = left = torch.nonzero(found.withstood).flatten()
            if len(left) == 0:
                return
            options = {"eps": self.eps, "steps": self.steps, "loss": loss, "eot_iter": self.eot_iter}
            run = torchattacks().APGD(module, norm="Linf", **options)
            # Not the object itself: it would leave out images by a look of its own.
            run.attack_single_run(found.given[left], found.labels[left])


class DefendedSquare(DefendedSearch):
    """Square attack (Andriushchenko et al. 2020): random search by squares, no gradients.

    It looks at an image at most ``n_queries`` times, at least 2: stripes, then a square more each time, until it is
    misclassified. `history` counts looks as steps; `last_history` is about what was tried at a look, kept or not. All
    images of a batch get the same squares. Those whose balls overlap are searched one group after the other, since the
    search does not say which image it asks about.
    """

    name: ClassVar[str] = "defended_square"
    library: ClassVar[str] = "torchattacks"

    def __init__(self, target: DefendedVictim, *, n_queries: int = 500, **options: Any) -> None:
        super().__init__(target, **options)
        self.n_queries = check_int(n_queries, name="n_queries", low=2)

    def estimate(self, count: int) -> Cost:
        """Cost of one call, at most; less where images are misclassified before their queries are spent."""
        return self.target.cost(purifications=count * self.n_queries) + self.final_cost(count)

    def search(self, found: BestFound, indices: Tensor) -> None:
        """Try squares."""
        module = DefendedModule(self, indices, lambda images, logits, at: found.see(images, logits[None], rows=at))
        for group in apart_by(2 * self.eps, found.given):
            module.at, module.nearest_of = group, found.given[group]
            run = torchattacks().Square(module, norm="Linf", eps=self.eps, n_queries=self.n_queries - 1)
            # Not the object itself, which would look at the images before and after the search.
            run.init_hyperparam(module.nearest_of)
            run.attack_single_run(module.nearest_of, found.labels[group])


class DefendedModule(Unsaturated):
    """Victim and defence as the one classifier that a library's attack gets to see, with BPDA's identity as gradient.

    It uses the target, the draws and the account of costs of ``attack``, for a batch with the positions ``indices``,
    int [B]. ``seen`` is called after each question with images [n, 3, H, W], logits [n, C] and the images' rows int
    [n]. ``at`` are the rows of the batch that are attacked, int [b]; at first all. Square drops images that are broken
    without saying which: ``nearest_of`` are then the given images of ``at``, and each image that it asks about is
    matched with the nearest of them.
    """

    def __init__(self, attack: AdaptiveAttack, indices: Tensor, seen: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        super().__init__(attack.victim)
        self.attack, self.indices, self.seen = attack, indices, seen
        self.looks = torch.zeros_like(indices)
        self.at = torch.arange(len(indices), device=self.device_marker.device)
        self.nearest_of: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the defended victim's logits [n, C] on attacked images [n, 3, H, W]."""
        attack, given = self.attack, images.detach()
        rows = self.at
        if self.nearest_of is not None:
            rows = rows[torch.cdist(given.flatten(1), self.nearest_of.flatten(1), p=torch.inf).argmin(dim=1)]
        at = rows.to(self.indices.device)
        purified = attack.purified(images, attack.ask_indices(self.indices[at], self.looks[at]))
        self.looks[at] += 1
        gradients = len(images) if images.requires_grad and torch.is_grad_enabled() else 0
        attack.spent += attack.target.cost(purifications=len(images), gradients=gradients)
        logits = super().forward(straight_through(images, purified))
        self.seen(given, logits.detach().clone(), rows)  # Square writes into the logits that it gets
        return logits


def apart_by(distance: float, images: Tensor) -> list[Tensor]:
    """Positions int [b] of groups of images [B, 3, H, W]; within a group all are further apart in L-inf than this."""
    groups: list[list[int]] = []
    for position, image in enumerate(images):
        far = (g for g in groups if float((images[g] - image).abs().flatten(1).amax(dim=1).min()) > distance)
        home = next(far, None)
        if home is None:
            groups.append(home := [])
        home.append(position)
    return [torch.tensor(group, device=images.device) for group in groups]
