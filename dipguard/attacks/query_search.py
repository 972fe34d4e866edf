"""Decision queries, counted: what one image's walk asks, what it has found at each budget, and the curve of all."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dipguard.attacks.hsj_walk import Walk, length
from dipguard.checks import check_float


@dataclass(frozen=True, eq=False)
class QueryCurve:
    """What HopSkipJump found within each query budget; all tensors are on the device of the images.

    Attributes:
        norm: ``Linf`` or ``L2``.
        images: query budget -> the nearest adversarial image of each, [N, 3, H, W]; the clean one where none was found.
        distances: query budget -> its distance [N] from the clean image, on the [0, 1] scale; 0 where the clean image
            itself was read wrongly, infinite where nothing was found.
        queries: int64 [N], queries spent on each image.
    """

    norm: str
    images: dict[int, Tensor]
    distances: dict[int, Tensor]
    queries: Tensor

    def accuracy(self, *, budget: int, eps_255: float) -> float:
        """Share of images for which nothing was found within ``budget`` queries and a distance of ``eps_255`` levels.

        Raises:
            ValueError: ``budget`` is none of the curve's.
            TypeError, ValueError: ``eps_255`` is no number of at least 0.
        """
        if budget not in self.distances:
            raise ValueError(f"`budget` must be one of {', '.join(map(str, self.distances))}, got {budget!r}")
        reach = check_float(eps_255, name="eps_255", low=0) / 255 + 1e-6  # a distance is a difference of float32 values
        return float((self.distances[budget] > reach).float().mean())


@dataclass(eq=False)
class QuerySearch:
    """One image's walk, its queries counted, its nearest adversarial image kept at each budget.

    While ``asked`` is not None, its images are to be shown to the defended victim and their classes handed to `answer`.

    Attributes:
        image: [3, H, W] in [0, 1], on the CPU.
        label: its true class.
        walk: yields images and is sent which of them are adversarial.
        norm: ``Linf`` or ``L2``.
        budgets: query budgets, rising; the walk ends with the last.
        queries: number of images answered so far.
        distance: of the nearest adversarial image, on the [0, 1] scale.
        asked: images [n, 3, H, W] of the open question, within the budget; None at the end.
    """

    image: Tensor
    label: int
    walk: Walk[None]
    norm: str
    budgets: tuple[int, ...]
    queries: int = 0
    distance: float = float("inf")
    asked: Tensor | None = None
    _best: Tensor = field(init=False)
    _kept: dict[int, tuple[Tensor, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._best = self.image
        self.asked = self.image[None]  # is there anything to attack?

    def answer(self, decisions: Tensor) -> None:
        """Take the classes [n] of the images asked about, on the CPU and in their order, and put the next question."""
        assert self.asked is not None
        first, wrong = self.queries == 0, decisions != self.label
        for candidate, adversarial in zip(self.asked, wrong.tolist(), strict=True):
            self._count(candidate, adversarial=adversarial)
        left = self.budgets[-1] - self.queries
        if left == 0 or self.distance == 0:
            self.asked = None
            return
        try:
            self.asked = (next(self.walk) if first else self.walk.send(wrong))[:left]
        except StopIteration:
            self.asked = None

    def at(self, budget: int) -> tuple[Tensor, float]:
        """The nearest adversarial image and its distance after ``budget`` queries, or at the end if that was before."""
        return self._kept.get(budget, (self._best, self.distance))

    def _count(self, candidate: Tensor, *, adversarial: bool) -> None:
        self.queries += 1
        if adversarial:
            distance = length(candidate - self.image, self.norm)
            if distance < self.distance:
                self._best, self.distance = candidate, distance
        if self.queries in self.budgets:
            self._kept[self.queries] = (self._best, self.distance)
