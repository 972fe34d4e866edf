"""HopSkipJump (Chen, Jordan and Wainwright 2020) on a defended victim, with every query counted.

The walk of one image along the decision boundary (Algorithm 2) is a generator that yields the images it wants to ask
about and is sent the answers, so the questions of many images go through one stacked fit of a DIP defence together.

Constants and thresholds are those of ART (1.20.1), which the paper used (appendix A); but ART draws its start unseeded
and may search a step without end on a random defence. foolbox (3.3.4) stops with an error when an answer changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from dipguard.attacks.base import TOLERANCE, Cost, Snapshot, check_budgets
from dipguard.attacks.target import AdaptiveAttack, DefendedVictim
from dipguard.checks import check_float, check_int, check_positive
from dipguard.seeding import image_generator

TOGETHER = 128  # images that are purified and classified at once, at most
HALVINGS = 30  # of a step, at most: on a random defence there could be more without end

_T = TypeVar("_T")
Walk = Generator[Tensor, Tensor, _T]
"""Yields images [n, 3, H, W] in [0, 1], is sent bool [n] on the CPU: which of them are adversarial."""


class HopSkipJump(AdaptiveAttack):
    """HopSkipJump in L-inf: needs nothing but decisions, and few of them; Figure 5 of the paper.

    An image that goes through defence and victim is one query, from the first look at the clean image on. The images of
    a batch do not influence each other; an image's draws depend on the seed and its index alone. The nearest image that
    was ever *seen* to be adversarial counts, so on a random defence with ``fresh`` draws the evaluation may see less
    success. After a call, ``batches`` holds the `QuerySearch` of each image.

    The paper gives no norm for Figure 5; its eps up to 25 is read as L-inf in levels of 0 to 255, like its other ones.

    Args:
        queries: Largest number of queries per image, at least 1.
        eps_255: How far in levels of 0 to 255 an adversarial image may be from the clean one, above 0; beyond that the
            clean image is returned. None: the nearest one, however far it is.
        budgets: Numbers of queries, from 1 to ``queries``: `snapshots` returns the images found within each.
        radii_255: Distances in levels of 0 to 255: `snapshots` takes each in the place of ``eps_255``.
        init_size: Noise images tried as a start, at least 1.
        init_eval: Probes of the first gradient, at least 2.
    """

    name: ClassVar[str] = "hopskipjump"

    def __init__(
        self,
        target: DefendedVictim,
        *,
        queries: int = 2500,
        eps_255: float | None = None,
        budgets: Sequence[int] = (),
        radii_255: Sequence[float] = (),
        init_size: int = 100,
        init_eval: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        self.queries = check_int(queries, name="queries", low=1)
        self.eps_255 = None if eps_255 is None else check_positive(eps_255, name="eps_255", high=255)
        self.budgets = check_budgets(budgets, high=self.queries)
        if not isinstance(radii_255, Sequence):
            raise TypeError(f"`radii_255` must be a list of numbers, got {radii_255!r}")
        self.radii_255 = sorted({check_float(radius, name="radii_255", low=0, high=255) for radius in radii_255})
        self.init_size = check_int(init_size, name="init_size", low=1)
        self.init_eval = check_int(init_eval, name="init_eval", low=2)

    @property
    def eps(self) -> float:
        """A run has no bound: distances are held against eps afterwards."""
        return math.inf

    def estimate(self, count: int) -> Cost:
        """Cost of one call, at most; less if a clean image is misclassified or no start is found."""
        return self.target.cost(purifications=count * self.queries)

    def attack_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Return the nearest adversarial images within eps after all queries, or else the clean ones."""
        return _within(images, self._search(images, labels, indices), Snapshot(self.eps_255, None))

    def snapshot_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> dict[Snapshot, Tensor]:
        """Return the images for each budget and radius."""
        searches = self._search(images, labels, indices)
        # Of several rows, each has a budget.
        budgets: list[int | None] = [*self.budgets] or [self.queries if self.radii_255 else None]
        limits = [Snapshot(eps, n) for eps in self.radii_255 or (self.eps_255,) for n in budgets]
        return {limit: _within(images, searches, limit) for limit in limits}

    def _search(self, images: Tensor, labels: Tensor, indices: Tensor) -> list[QuerySearch]:
        searches = []
        for image, label, index in zip(images.cpu(), labels.tolist(), indices.tolist(), strict=True):
            generator = image_generator(seed=self.seed, index=index, purpose="hopskipjump")
            route = walk(image, generator, init_size=self.init_size, init_eval=self.init_eval)
            searches.append(QuerySearch(image, label, route, (*self.budgets, self.queries)))
        while live := [at for at, search in enumerate(searches) if search.asked is not None]:
            self._ask([searches[at] for at in live], indices[live], images.device)
        self.batches += searches
        return searches

    def _ask(self, searches: list[QuerySearch], indices: Tensor, device: torch.device) -> None:
        """Put the open questions of all searches to the defended victim, and hand out the answers."""
        questions = [search.asked for search in searches if search.asked is not None]
        sizes = [len(question) for question in questions]
        images = [image for question in questions for image in question]  # views: together they may take gigabytes
        looks = [search.queries + number for search, n in zip(searches, sizes, strict=True) for number in range(n)]
        order = self.ask_indices(
            indices.repeat_interleave(torch.tensor(sizes, device="cpu")), torch.tensor(looks, device="cpu")
        )
        parts = zip(range(0, len(images), TOGETHER), order.split(TOGETHER), strict=True)
        with torch.no_grad():
            made = [self.decide(torch.stack(images[i : i + TOGETHER]).to(device), part).cpu() for i, part in parts]
        decisions = torch.cat(made)
        self.spent += self.target.cost(purifications=len(decisions))
        for search, answers in zip(searches, decisions.split(sizes), strict=True):
            search.answer(answers)


class QuerySearch:
    """One image's walk: its queries are counted, and its nearest adversarial image is kept at each budget.

    The classes of the images ``asked`` [n, 3, H, W], if any, are to be given to `answer`. The walk ends with the last
    of the rising ``budgets``. ``queries`` is the number of images answered so far; ``distance`` that of the nearest
    adversarial image, in [0, 1]: 0 if the clean image itself was misclassified, infinite if nothing was found.
    """

    def __init__(self, image: Tensor, label: int, route: Walk[None], budgets: Sequence[int]) -> None:
        self.image, self.label, self.budgets = image, label, budgets
        self.queries, self.distance = 0, math.inf
        self.asked: Tensor | None = image[None]  # is there anything to attack?
        self._walk, self._best = route, image
        self._kept: dict[int | None, tuple[Tensor, float]] = {}

    def answer(self, decisions: Tensor) -> None:
        """Take the classes [n] of the images asked about, on the CPU and in their order, and put the next question."""
        assert self.asked is not None
        first, wrong = self.queries == 0, decisions != self.label
        for candidate, adversarial in zip(self.asked, wrong.tolist(), strict=True):
            self.queries += 1
            distance = length(candidate - self.image) if adversarial else math.inf
            if distance < self.distance:
                self._best, self.distance = candidate, distance
            if self.queries in self.budgets:
                self._kept[self.queries] = (self._best, self.distance)
        left, self.asked = self.budgets[-1] - self.queries, None
        if left > 0 and self.distance > 0:
            with suppress(StopIteration):
                self.asked = (next(self._walk) if first else self._walk.send(wrong))[:left]

    def at(self, budget: int | None) -> tuple[Tensor, float]:
        """The nearest adversarial image (or the clean one) and its distance after ``budget`` queries, or at the end."""
        return self._kept.get(budget, (self._best, self.distance))


def _within(images: Tensor, searches: Sequence[QuerySearch], limit: Snapshot) -> Tensor:
    """The images [B, 3, H, W] found within the budget, if they lie within eps; else the clean ``images``."""
    found, distances = zip(*(search.at(limit.budget) for search in searches), strict=True)
    far = math.inf if limit.eps_255 is None else limit.eps_255 / 255 + TOLERANCE
    near = torch.tensor([distance <= far for distance in distances], device=images.device)
    return torch.where(near.view(-1, 1, 1, 1), torch.stack(found).to(images), images)


def walk(image: Tensor, generator: torch.Generator, *, init_size: int = 100, init_eval: int = 100) -> Walk[None]:
    """Walk from noise towards ``image`` [3, H, W] along the boundary, without end, all on the CPU.

    It gives up after ``init_size`` noise images that are no start. Round t asks about ``init_eval`` times sqrt(t)
    probes, at most 10,000.
    """
    current = yield from _start(image, generator, init_size)
    if current is None:
        return
    for number in count(1):
        far = length(current - image)
        # The first round probes 0.1 around, as the authors' own code does.
        radius = 0.1 if number == 1 else 0.01 * far
        threshold = 0.01 / image.numel() * min(far, 1.0)
        current = yield from _bisect(partial(_nearer, image, current), high=far, threshold=threshold)
        far = length(current - image)
        if far == 0:
            return  # the image itself was misclassified, by a random defence
        probes = min(int(init_eval * math.sqrt(number)), 10_000)
        direction = yield from _gradient(current, radius, probes, generator)
        current = yield from _step(current, direction, far / math.sqrt(number))


def length(change: Tensor) -> float:
    """L-inf norm of one image's change, on the [0, 1] scale."""
    return float(change.abs().max())


def _nearer(image: Tensor, current: Tensor, radius: float) -> Tensor:
    return torch.clamp(current, image - radius, image + radius)


def _start(image: Tensor, generator: torch.Generator, init_size: int) -> Walk[Tensor | None]:
    """Uniform noise that is adversarial, drawn near to the image on a straight line; None if none was found."""
    for _ in range(init_size):
        noise = torch.rand(image.shape, generator=generator, dtype=image.dtype, device="cpu")
        if (yield noise[None]).item():
            return (yield from _bisect(partial(torch.lerp, image, noise), high=1.0, threshold=0.001))
    return None


def _bisect(make: Callable[[float], Tensor], *, high: float, threshold: float) -> Walk[Tensor]:
    """Halve [0, high] until it is as short as ``threshold``; ``make(high)`` stays adversarial, ``make(0)`` is not."""
    low = 0.0
    while high - low > threshold:
        middle = (low + high) / 2
        if (yield make(middle)[None]).item():
            high = middle
        else:
            low = middle
    return make(high)


def _gradient(current: Tensor, radius: float, probes: int, generator: torch.Generator) -> Walk[Tensor]:
    """Signs [3, H, W] of the direction into the adversarial side, from answers about random probes (Eq. 9, 14, 16)."""
    noise = torch.rand((probes, *current.shape), generator=generator, dtype=current.dtype, device="cpu") * 2 - 1
    noise /= torch.linalg.vector_norm(noise.flatten(1), dim=1).view(-1, 1, 1, 1)
    asked = noise.mul_(radius).add_(current).clamp_(0, 1)  # in place: they are hundreds of images
    signs = (yield asked).to(current.dtype) * 2 - 1
    # The mean is taken off to lower the variance; where all answers agree it would leave nothing.
    weights = signs if bool((signs == signs[0]).all()) else signs - signs.mean()
    return (weights.view(-1, 1, 1, 1) * (asked - current)).mean(dim=0).sign()


def _step(current: Tensor, direction: Tensor, size: float) -> Walk[Tensor]:
    """Step along ``direction`` by ``size``, halved until the image is adversarial."""
    for _ in range(HALVINGS):
        candidate = (current + size * direction).clamp(0, 1)
        if (yield candidate[None]).item():
            return candidate
        size /= 2
    return current
