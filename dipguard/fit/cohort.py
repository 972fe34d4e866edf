"""Images of a stack that began together, and those that wait for a place in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dipguard.fit.jitter_source import JitterSource
from dipguard.fit.record import StackRecord


@dataclass(eq=False)
class Cohort:
    """Neighbouring rows of a stack that began at one step, and so are at one step of their own.

    Attributes:
        first_step: The Trainer's step at which they took their first.
        places: Where each image that began with it stands in the whole job.
        rows: How many of them are still fitted.
        jitter: The noise on their z; None for none.
        record: What the callbacks have seen of them; None until a callback opens it.
    """

    first_step: int
    places: tuple[int, ...]
    rows: int
    jitter: JitterSource | None = None
    record: StackRecord | None = None

    def step(self, trainers: int) -> int:
        """The images' own step t at a step of the Trainer."""
        return trainers - self.first_step

    def sampled_at(self, trainers: int) -> bool:
        """Whether the newest sample is of this step of the Trainer."""
        return self.record is not None and self.record.steps[-1:] == [self.step(trainers)]


def row_ranges(cohorts: Sequence[Cohort]) -> list[slice]:
    """Each cohort's rows of the stack."""
    ends, end = [], 0
    for cohort in cohorts:
        ends.append(slice(end, end + cohort.rows))
        end += cohort.rows
    return ends


@dataclass(eq=False)
class Waiting:
    """Images that are fitted as soon as others have made room.

    Attributes:
        images: [n, 3, H, W] in [0, 1].
        indices: Their indices in the data set.
        T: Steps of each fit.
        slots: Most images at once.
    """

    images: Tensor
    indices: tuple[int, ...]
    T: int
    slots: int
    _taken: int = field(default=0, init=False)

    REFILL = 8
    """A stack is refilled once an eighth of its places is free: each time has its price, most of all on a GPU."""

    @property
    def left(self) -> int:
        """How many have not begun."""
        return len(self.indices) - self._taken

    def take(self, fitted: int) -> slice:
        """The next to begin, none while too few places are free; ``fitted`` images go on."""
        free = self.slots - fitted
        count = min(free, self.left) if free >= max(1, self.slots // self.REFILL) else 0
        self._taken += count
        return slice(self._taken - count, self._taken)
