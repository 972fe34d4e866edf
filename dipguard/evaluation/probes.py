"""What AutoAttack asks of a system before it believes its own result: does it draw, does it optimise while it reads?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dipguard.fit import Decider

if TYPE_CHECKING:
    from dipguard.data import ImageSet
    from dipguard.evaluation.ladder_plan import Target

OTHER_DRAWS = 1_000_003
"""Added to an image's index for draws that are not those of its evaluation."""
SAME = 1e-4
"""Logits that differ by no more are the same but for rounding."""


@dataclass(frozen=True)
class Probe:
    """What was found out about a system by purifying one image.

    Attributes:
        drawn: Largest change of a logit when the defence draws anew.
        repeated: The same when it draws as before: 0 where seed and index settle everything.
        backward: Calls of autograd's engine during one purification.
    """

    drawn: float
    repeated: float
    backward: int

    @property
    def randomised(self) -> bool:
        """Whether two looks at one image give different logits."""
        return self.drawn > SAME

    @property
    def dynamic(self) -> bool:
        """Whether the forward pass itself takes gradients."""
        return self.backward > 0

    def arrays(self) -> dict[str, Any]:
        """As it is stored."""
        return {"drawn": np.float64(self.drawn), "repeated": np.float64(self.repeated), "backward": self.backward}

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> Probe:
        """What `arrays` stored."""
        return cls(float(arrays["drawn"]), float(arrays["repeated"]), int(arrays["backward"]))


def probe(target: Target, one: ImageSet, device: torch.device) -> Probe:
    """Look at one image three times: twice with its own draws, once with others.

    Args:
        target: The system.
        one: The image.
        device: Where it is purified.
    """
    images = one.images.to(device)

    def look(indices: Tensor) -> Tensor:
        return Decider(target.victim)(target.row.purify(images, indices=indices)).cpu()

    with counting_backward() as calls:
        first = look(one.indices)
    again, other = look(one.indices), look(one.indices + OTHER_DRAWS)
    return Probe(float((other - first).abs().max()), float((again - first).abs().max()), calls[0])


@contextmanager
def counting_backward() -> Iterator[list[int]]:
    """Count the calls of autograd's engine on this thread; yields a list whose one number is the count so far.

    As AutoAttack does it, by watching the interpreter: whatever a defence calls its optimiser, and in whichever library
    its steps are computed, autograd's engine is where a gradient comes from. A profiler that runs is not disturbed,
    but sees nothing meanwhile.
    """
    count = [0]

    def watch(frame: FrameType, event: str, what: Any) -> None:
        if event == "c_call" and getattr(what, "__name__", "") == "run_backward":
            count[0] += 1

    before: Callable[..., Any] | None = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield count
    finally:
        sys.setprofile(before)
