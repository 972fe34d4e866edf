"""HopSkipJump (Chen, Jordan and Wainwright 2020) on a defended victim, with every query counted.

The walk of one image along the decision boundary (Algorithm 2) is a generator that yields the images it wants to ask
about and is sent the answers, so the questions of many images go through one stacked fit of a DIP defence together.

ART's version (1.20.1) draws its start unseeded and may search a step without end on a random defence; foolbox's (3.3.4)
stops with an AssertionError when an answer changes. Constants and thresholds are those of ART, which the paper used
(appendix A); the tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from dipguard.attacks.base import TOLERANCE, Cost, Snapshot, check_budgets, check_levels
from dipguard.attacks.target import AdaptiveAttack, DefendedVictim
from dipguard.checks import check_choice, check_float, check_int
from dipguard.seeding import image_generator

NORMS = ("Linf", "L2")
HALVINGS = 30  # of the step; on a random defence there could be more without end

_T = TypeVar("_T")
Walk = Generator[Tensor, Tensor, _T]
"""Yields images [n, 3, H, W] in [0, 1], is sent bool [n] on the CPU: which of them are adversarial."""


class HopSkipJump(AdaptiveAttack):
    """HopSkipJump: needs nothing but decisions, and few of them; Figure 5 of the paper.

    An image that goes through defence and victim is one query, from the first look at the clean image on; a walk ends
    when ``queries`` are spent. All walks of a batch are asked about together; they do not influence each other, and an
    image's draws depend on the seed and its index alone. The nearest image that was ever *seen* to be adversarial
    counts, so on a random defence with ``fresh`` draws the evaluation may see less success.

    The paper gives no norm for Figure 5; its eps up to 25 is read as L-inf in levels of 0 to 255, like its other ones.

    Args:
        norm: ``Linf`` or ``L2``, the distance that is made small.
        queries: Largest number of queries per image, at least 1.
        eps_255: How far in levels of 0 to 255 an adversarial image may be from the clean one, above 0; beyond that the
            clean image is returned. None: the nearest one, however far it is.
        budgets: Numbers of queries, from 1 to ``queries``: `snapshots` returns the images found within each.
        radii_255: Distances in levels of 0 to 255: `snapshots` takes each in the place of ``eps_255``.
        init_size: Noise images tried as a start, at least 1.
        init_eval: Probes of the first gradient, at least 2.
        together: Images that are purified and classified at once, at least 1.

    Attributes:
        batches: After a call, the `QuerySearch` of each image.
    """

    name: ClassVar[str] = "hopskipjump"

    def __init__(
        self,
        target: DefendedVictim,
        *,
        norm: str = "Linf",
        queries: int = 2500,
        eps_255: float | None = None,
        budgets: Sequence[int] = (),
        radii_255: Sequence[float] = (),
        init_size: int = 100,
        init_eval: int = 100,
        together: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        self.norm = check_choice(norm, NORMS, name="norm")
        self.queries = check_int(queries, name="queries", low=1)
        self.eps_255 = None if eps_255 is None else check_levels(eps_255, name="eps_255")
        self.budgets = check_budgets(budgets, high=self.queries)
        self.radii_255 = sorted({check_float(radius, name="radii_255", low=0, high=255) for radius in radii_255})
        self.init_size = check_int(init_size, name="init_size", low=1)
        self.init_eval = check_int(init_eval, name="init_eval", low=2)
        self.together = check_int(together, name="together", low=1)

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
        limits = [Snapshot(eps, n) for eps in self.radii_255 or (self.eps_255,) for n in self.budgets or (None,)]
        return {limit: _within(images, searches, limit) for limit in limits}

    def _search(self, images: Tensor, labels: Tensor, indices: Tensor) -> list[QuerySearch]:
        budgets, searches = (*self.budgets, self.queries), []
        for image, label, index in zip(images.cpu(), labels.tolist(), indices.tolist(), strict=True):
            generator = image_generator(seed=self.seed, index=index, purpose="hopskipjump")
            route = walk(image, generator, norm=self.norm, init_size=self.init_size, init_eval=self.init_eval)
            searches.append(QuerySearch(image, label, route, self.norm, budgets))
        while live := [at for at, search in enumerate(searches) if search.asked is not None]:
            self._ask([searches[at] for at in live], indices[live], images.device)
        self.batches += searches
        return searches

    def _ask(self, searches: list[QuerySearch], indices: Tensor, device: torch.device) -> None:
        """Put the open questions of all searches to the defended victim, and hand out the answers."""
        questions = [search.asked for search in searches if search.asked is not None]
        sizes = [len(question) for question in questions]
        looks = torch.cat([search.queries + torch.arange(n) for search, n in zip(searches, sizes, strict=True)])
        order = self.ask_indices(indices.repeat_interleave(torch.tensor(sizes)), looks)
        parts = zip(torch.cat(questions).split(self.together), order.split(self.together), strict=True)
        with torch.no_grad():
            decisions = torch.cat([self.decide(part.to(device), positions).cpu() for part, positions in parts])
        self.spent += self.target.cost(purifications=len(decisions))
        for search, answers in zip(searches, decisions.split(sizes), strict=True):
            search.answer(answers)


@dataclass(eq=False)
class QuerySearch:
    """One image's walk: its queries are counted, and its nearest adversarial image is kept at each budget.

    While ``asked`` is not None, its images are to be shown to the defended victim and their classes given to `answer`.

    Attributes:
        budgets: Query budgets, rising; the walk ends with the last.
        queries: Number of images answered so far.
        distance: Of the nearest adversarial image, on the [0, 1] scale: 0 if the clean image itself was misclassified,
            infinite if nothing was found.
        asked: Images [n, 3, H, W] of the open question, within the budget; None at the end.
    """

    image: Tensor
    label: int
    walk: Walk[None]
    norm: str
    budgets: tuple[int, ...]
    queries: int = 0
    distance: float = math.inf
    asked: Tensor | None = None
    _kept: dict[int, tuple[Tensor, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._best = self.image
        self.asked = self.image[None]  # is there anything to attack?

    def answer(self, decisions: Tensor) -> None:
        """Take the classes [n] of the images asked about, on the CPU and in their order, and put the next question."""
        assert self.asked is not None
        first, wrong = self.queries == 0, decisions != self.label
        for candidate, adversarial in zip(self.asked, wrong.tolist(), strict=True):
            self.queries += 1
            distance = length(candidate - self.image, self.norm) if adversarial else math.inf
            if distance < self.distance:
                self._best, self.distance = candidate, distance
            if self.queries in self.budgets:
                self._kept[self.queries] = (self._best, self.distance)
        left, self.asked = self.budgets[-1] - self.queries, None
        if left > 0 and self.distance > 0:
            try:
                self.asked = (next(self.walk) if first else self.walk.send(wrong))[:left]
            except StopIteration:
                return

    def at(self, budget: int | None) -> tuple[Tensor, float]:
        """The nearest adversarial image (or the clean one) and its distance after ``budget`` queries, or at the end."""
        return self._kept.get(budget or self.budgets[-1], (self._best, self.distance))


def _within(images: Tensor, searches: Sequence[QuerySearch], limit: Snapshot) -> Tensor:
    """The images [B, 3, H, W] found within the budget, if they lie within eps; else the clean ``images``."""
    found, distances = zip(*(search.at(limit.budget) for search in searches), strict=True)
    far = math.inf if limit.eps_255 is None else limit.eps_255 / 255 + TOLERANCE
    near = torch.tensor(distances, device=images.device) <= far
    return torch.where(near.view(-1, 1, 1, 1), torch.stack(found).to(images), images)


def walk(
    image: Tensor, generator: torch.Generator, *, norm: str, init_size: int = 100, init_eval: int = 100
) -> Walk[None]:
    """Walk from noise towards ``image`` [3, H, W] along the boundary, without end; each round asks a question or more.

    The image is on the CPU, like all that is yielded. After ``init_size`` noise images that are no start the walk gives
    up. Round t asks about ``init_eval`` times sqrt(t) probes of the gradient, at most 10,000.
    """
    current = yield from _start(image, generator, init_size)
    if current is None:
        return
    for number in count(1):
        # The first round probes 0.1 around, as the authors' own code does.
        radius = 0.1 if number == 1 else 0.01 * length(current - image, norm)
        current = yield from _to_boundary(image, current, norm)
        if length(current - image, norm) == 0:
            return  # the image itself was misclassified, by a random defence
        probes = min(int(init_eval * math.sqrt(number)), 10_000)
        direction = yield from _gradient(current, radius, probes, generator, norm)
        current = yield from _step(image, current, direction, number, norm)


def length(change: Tensor, norm: str) -> float:
    """Norm of one image's change, on the [0, 1] scale."""
    return float(change.abs().max() if norm == "Linf" else torch.linalg.vector_norm(change))


def _start(image: Tensor, generator: torch.Generator, init_size: int) -> Walk[Tensor | None]:
    """Uniform noise that is adversarial, drawn near to the image on a straight line; None if none was found."""
    for _ in range(init_size):
        noise = torch.rand(image.shape, generator=generator, dtype=image.dtype)
        if (yield noise[None]).item():
            return (yield from _bisect(partial(torch.lerp, image, noise), high=1.0, threshold=0.001))
    return None


def _to_boundary(image: Tensor, current: Tensor, norm: str) -> Walk[Tensor]:
    """The adversarial end of the last interval of a binary search between ``image`` and ``current``."""
    values = image.numel()
    if norm == "L2":
        threshold = 0.01 / math.sqrt(values)
        return (yield from _bisect(partial(torch.lerp, image, current), high=1.0, threshold=threshold))
    high = length(current - image, norm)

    def at(radius: float) -> Tensor:
        return torch.clamp(current, image - radius, image + radius)

    return (yield from _bisect(at, high=high, threshold=0.01 / values * min(high, 1.0)))


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


def _gradient(current: Tensor, radius: float, probes: int, generator: torch.Generator, norm: str) -> Walk[Tensor]:
    """Direction [3, H, W] into the adversarial side, from answers about random probes (Eq. 9, 14 and 16)."""
    shape = (probes, *current.shape)
    if norm == "L2":
        noise = torch.randn(shape, generator=generator, dtype=current.dtype)
    else:
        noise = torch.rand(shape, generator=generator, dtype=current.dtype) * 2 - 1
    noise /= torch.linalg.vector_norm(noise.flatten(1), dim=1).view(-1, 1, 1, 1)
    asked = (current + radius * noise).clamp(0, 1)
    signs = (yield asked).to(current.dtype) * 2 - 1
    # The mean is taken off to lower the variance; where all answers agree it would leave nothing.
    weights = signs if bool((signs == signs[0]).all()) else signs - signs.mean()
    estimate = (weights.view(-1, 1, 1, 1) * (asked - current)).mean(dim=0)
    if norm == "Linf":
        return estimate.sign()
    return estimate / torch.linalg.vector_norm(estimate).clamp_min(torch.finfo(estimate.dtype).tiny)


def _step(image: Tensor, current: Tensor, direction: Tensor, number: int, norm: str) -> Walk[Tensor]:
    """Step along ``direction`` by distance / sqrt(number), halved until the image is adversarial."""
    size = length(current - image, norm) / math.sqrt(number)
    for _ in range(HALVINGS):
        candidate = (current + size * direction).clamp(0, 1)
        if (yield candidate[None]).item():
            return candidate
        size /= 2
    return current
