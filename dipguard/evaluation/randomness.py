"""Whether a defended classifier draws random numbers, and whether it optimises while it classifies.

AutoAttack asks the same before it trusts its own result (Croce et al. 2022).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dipguard.data import ImageSet
from dipguard.evaluation.cell import CLEAN, Target
from dipguard.evaluation.matrix import Matrix
from dipguard.fit import Decider
from dipguard.store import Entry

OTHER_DRAWS = 1_000_003  # added to an image's index to get draws that are not those of its evaluation
SAME = 1e-4  # logits that differ by at most this differ by rounding


@dataclass(frozen=True)
class Randomness:
    """The largest change of a logit with other draws, and the calls of autograd's engine in one purification."""

    drawn: float
    backward: int

    @classmethod
    def read(cls, matrix: Matrix, target: Target) -> Randomness | None:
        """The stored result for a target of a matrix; None if there is none."""
        return matrix.store.read_as("cells", _key(matrix, target), cls.of_entry)

    @classmethod
    def of_entry(cls, entry: Entry) -> Randomness:
        """What an entry says."""
        return cls(**{name: entry.header[name] for name in cls.__dataclass_fields__})

    @classmethod
    def find(cls, matrix: Matrix, target: Target) -> None:
        """Check a target of a matrix and store the result, unless that is done."""

        def make() -> Entry:
            found = check_randomness(target, matrix.clean.select(limit=1), matrix.device)
            return Entry({}, {"what": f"randomness of {target.label}", **asdict(found)})

        matrix.store.arrays("cells", _key(matrix, target), make, check=cls.of_entry)


def _key(matrix: Matrix, target: Target) -> str:
    return matrix.cell(CLEAN, target.label).sub_key("randomness")


def check_randomness(target: Target, one: ImageSet, device: torch.device) -> Randomness:
    """Purify the image of a set on a device twice: with its own draws and with others."""
    images = one.images.to(device)

    def logits(indices: Tensor) -> Tensor:
        return Decider(target.victim)(target.bare.purify(images, indices=indices)).cpu()

    with counting_backward() as calls:
        first = logits(one.indices)
    return Randomness(float((logits(one.indices + OTHER_DRAWS) - first).abs().max()), calls[0])


@contextmanager
def counting_backward() -> Iterator[list[int]]:
    """Count the calls of autograd's engine on this thread; yields a list that holds the count so far.

    Like AutoAttack, it watches the interpreter; a running profiler is restored afterwards.
    """
    count = [0]

    def watch(frame: FrameType, event: str, what: Any) -> None:
        count[0] += event == "c_call" and getattr(what, "__name__", "") == "run_backward"

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield count
    finally:
        sys.setprofile(before)
