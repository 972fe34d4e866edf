"""Projected gradient descent on a defended victim: gradients through an approximate backward pass, or a short fit."""

from __future__ import annotations

from abc import abstractmethod
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from dipguard.attacks.backward import BACKWARD, SHORT_T, fits_of, resized, straight_through
from dipguard.attacks.base import Cost
from dipguard.attacks.best_found import LOSSES, BestFound, DefendedSearch
from dipguard.attacks.libraries import Unsaturated, unsaturated
from dipguard.attacks.target import DefendedVictim
from dipguard.checks import check_bool, check_choice, check_int, check_positive
from dipguard.classifier import logits_of, reference_of
from dipguard.decision.intermediates import STITCHED
from dipguard.fit.runner import isolated_trainer
from dipguard.fit.unrolled import FLOOR, unrolled_fit
from dipguard.seeding import image_generator


class DefendedPGD(DefendedSearch):
    """PGD (Madry et al. 2018) in L-inf that looks at the last iterate too, and returns the best image that it saw.

    Args:
        alpha_255: Step size in levels of 0 to 255, above 0.
        steps: Number of steps, at least 1.
        eot_iter: Draws whose gradients are averaged at each step, at least 1 (expectation over transformation, Athalye
            et al. 2018); with ``fixed`` draws more than 1 only adds cost.
        random_start: Start at a uniformly drawn point of the ball, not at the image; drawn from the seed and the index.
        loss: Loss that is maximised: ``ce``, the negative logarithm of the true class's mean probability over the
            views; or ``margin``, the largest other logit minus that of the true class, mean over the views.
        coarse: How many times coarser than the image the perturbation's grid is, at least 1. Above 1, a step takes the
            sign of the gradient at the grid, which is enlarged bilinearly: purifiers let low frequencies pass
            (DiffBreak, NeurIPS 2025).
    """

    evaluate_every: int = 1
    """Steps from one classification behind the defence to the next; iterates that `logits_of` classifies need none."""

    def __init__(
        self,
        target: DefendedVictim,
        *,
        alpha_255: float = 2,
        steps: int = 20,
        eot_iter: int = 1,
        random_start: bool = True,
        loss: str = "ce",
        coarse: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        self.alpha_255 = check_positive(alpha_255, name="alpha_255", high=255)
        self.steps = check_int(steps, name="steps", low=1)
        self.eot_iter = check_int(eot_iter, name="eot_iter", low=1)
        self.random_start = check_bool(random_start, name="random_start")
        self.loss = check_choice(loss, LOSSES, name="loss")
        self.coarse = check_int(coarse, name="coarse", low=1)
        self.fits = fits_of(target.defense)

    @abstractmethod
    def logits_of(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [V, B, C] of the views of ``x`` [B, 3, H, W] under one draw, differentiable by ``x``; cost is counted.

        Or the scores [1, B, C] that the defence decides by. Also the victim's logits [B, C] on the purified images, or
        None if the defence was not asked.
        """

    def gradient(self, images: Tensor, labels: Tensor, indices: Tensor, *, look: int) -> tuple[Tensor, Tensor | None]:
        """The loss's gradient by ``images`` [B, 3, H, W], mean over ``eot_iter`` draws from number ``look`` on.

        Also the victim's logits on the purified images, [eot_iter, B, C], or None if the defence was not asked.
        """
        total, answers = torch.zeros_like(images), []
        for number in range(look, look + self.eot_iter):
            x = images.detach().clone().requires_grad_()
            with isolated_trainer(x.device):  # fits have left their float32 when they are differentiated
                logits, answer = self.logits_of(x, self.ask_indices(indices, number))
                total += torch.autograd.grad(LOSSES[self.loss](logits, labels).sum(), x)[0]
            if answer is not None:
                answers.append(answer)
        return total / self.eot_iter, torch.stack(answers) if answers else None

    def evaluate(self, images: Tensor, indices: Tensor, *, look: int) -> Tensor:
        """The victim's logits on the purified images under ``eot_iter`` draws, [eot_iter, B, C]."""
        self.spent += self.target.cost(purifications=len(images) * self.eot_iter)
        draws = (self.ask_indices(indices, number) for number in range(look, look + self.eot_iter))
        with torch.no_grad():
            return torch.stack([logits_of(self.victim, self.purified(images, asked)) for asked in draws])

    def search(self, found: BestFound, indices: Tensor) -> None:
        """Climb, and show ``found`` every iterate that was looked at."""
        point, look = self._start(found.given, indices), 0
        for step in range(self.steps + 1):
            x = self._image(point, found.given)
            gradient, answers = torch.zeros_like(x), None
            if step < self.steps:
                gradient, answers = self.gradient(x, found.labels, indices, look=look)
                found.flat.append((gradient == 0).flatten(1).all(dim=1))
                look += self.eot_iter
            if answers is None and self._is_evaluated(step):
                answers = self.evaluate(x, indices, look=look)
                look += self.eot_iter
            if answers is None:
                found.stay()
            else:
                found.see(x, answers)
            point = self._climb(point, gradient, found.given)

    def _is_evaluated(self, step: int) -> bool:
        return step % self.evaluate_every == 0 or step == self.steps

    def _start(self, given: Tensor, indices: Tensor) -> Tensor:
        """The first point of the search: an image, or a perturbation on the coarse grid."""
        height, width = (ceil(side / self.coarse) for side in given.shape[-2:])
        start = torch.zeros(*given.shape[:2], height, width, dtype=torch.float32, device="cpu")
        for image, index in zip(start, indices.tolist(), strict=True) if self.random_start else ():
            generator = image_generator(seed=self.seed, index=index, purpose="start")
            image.uniform_(-self.eps, self.eps, generator=generator)
        return start.to(given) if self.coarse > 1 else self.into_ball(given + start.to(given), given)

    def _image(self, point: Tensor, given: Tensor) -> Tensor:
        return self.into_ball(given + resized(point, like=given), given) if self.coarse > 1 else point

    def _climb(self, point: Tensor, gradient: Tensor, given: Tensor) -> Tensor:
        if self.coarse == 1:
            return self.into_ball(point + self.alpha_255 / 255 * gradient.sign(), given)
        grid = point.clone().requires_grad_()
        (by_grid,) = torch.autograd.grad(resized(grid, like=given), grid, gradient)
        return torch.clamp(point + self.alpha_255 / 255 * by_grid.sign(), -self.eps, self.eps)


class AdaptivePGD(DefendedPGD):
    """PGD through a defence without a gradient: forward the defence, backward an approximation (Athalye et al. 2018).

    Every iterate is classified behind the defence without a further purification; `BestFound` says which is returned.
    The images of a batch influence each other by rounding alone, if they do so in the defence.

    Args:
        backward: Approximation of the defence's backward pass, a key of :data:`~dipguard.attacks.backward.BACKWARD`.
        intermediate: What the loss is computed on (Tramer et al. 2020: attack what the defence decides by):
            ``stitched``, the purified image, or another of the defence's ``intermediates``.
    """

    name: ClassVar[str] = "adaptive_pgd"

    def __init__(
        self, target: DefendedVictim, *, backward: str = "identity", intermediate: str = "stitched", **options: Any
    ) -> None:
        super().__init__(target, **options)
        self.backward = check_choice(backward, BACKWARD, name="backward")
        self.intermediate = intermediate
        self.views = target.views(intermediate)

    def estimate(self, count: int) -> Cost:
        """Cost of one call, at most; exact without ``final_looks`` if each image has all views."""
        evaluated = self.target.cost(purifications=count * self.eot_iter)
        return self._cost(count * self.eot_iter * self.steps, views=self.views) + evaluated + self.final_cost(count)

    def logits_of(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the intermediate's views, or its scores [1, B, C], and the logits of the same purification."""
        answer, made = self.target.intermediate(x, indices, name=self.intermediate, seed=self.seed)
        replacement = BACKWARD[self.backward](x, indices, self.fits[0])
        views = torch.stack([straight_through(replacement, view) for view in made.views])
        if made.scores is None:
            logits = Unsaturated(self.victim)(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        else:
            logits = unsaturated(made.scores(views, x), dtype=reference_of(self.victim, x).dtype)[None]
        self.spent += self._cost(len(x), views=made.readings)
        with torch.no_grad():
            return logits, logits[0].detach() if self.intermediate == STITCHED else logits_of(self.victim, answer)

    def _cost(self, looks: int, *, views: int) -> Cost:
        """Cost of purified images whose gradient is taken."""
        fitted = looks * SHORT_T if self.backward == "short_dip" else 0
        extra = 0 if self.intermediate == STITCHED else looks * views
        return self.target.cost(purifications=looks) + Cost(0, fitted, extra, looks * views)


class Unrolled(DefendedPGD):
    """PGD on the victim behind a short DIP fit, differentiated through all steps of its optimiser.

    Each step runs the defence's own fits for ``T`` steps, at least 2, forward and backward, with their networks,
    learning rates and draws; each fit gives a view. The images found are then tried on the defence, whose fits are far
    longer: the start, every ``evaluate_every``-th iterate (at least 1) and the last. A defence without a DIP is
    attacked through :data:`~dipguard.attacks.backward.DEFAULT_FIT`. The images of a batch influence each other by
    rounding alone, which many steps of Adam amplify. Memory grows with ``T`` and ``batch_size``.
    """

    name: ClassVar[str] = "unrolled"

    def __init__(
        self, target: DefendedVictim, *, T: int = 40, evaluate_every: int = 5, batch_size: int = 8, **options: Any
    ) -> None:
        super().__init__(target, batch_size=batch_size, **options)
        self.T = check_int(T, name="T", low=2)
        self.evaluate_every = check_int(evaluate_every, name="evaluate_every", low=1)

    def estimate(self, count: int) -> Cost:
        """Cost of one call, exact without ``final_looks``; unrolled steps, which take longer, count as DIP steps."""
        evaluations = sum(self._is_evaluated(step) for step in range(self.steps + 1))
        looks = count * self.eot_iter
        evaluated = self.target.cost(purifications=looks * evaluations)
        return evaluated + self._unrolled_cost(looks * self.steps) + self.final_cost(count)

    def logits_of(self, x: Tensor, indices: Tensor) -> tuple[Tensor, None]:
        """Logits of the unrolled fits' reconstructions."""
        views = [unrolled_fit(x, T=self.T, fit=fit, indices=indices.tolist(), floor=FLOOR) for fit in self.fits]
        self.spent += self._unrolled_cost(len(x))
        return Unsaturated(self.victim)(torch.cat(views)).unflatten(0, (len(views), len(x))), None

    def _unrolled_cost(self, looks: int) -> Cost:
        """Cost of so many images under one draw."""
        views = looks * len(self.fits)
        return Cost(0, views * self.T, views, views)
