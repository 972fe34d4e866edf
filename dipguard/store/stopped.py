"""What stopping rules chose of stored fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dipguard.decision.stopping import FixedStep, Stopped, StopRule
from dipguard.store.folder import TraceStore
from dipguard.store.keys import digest_of
from dipguard.store.traces import read_samples


@dataclass(frozen=True, kw_only=True)
class RuleAsked:
    """A stopping rule whose choice is asked for.

    Attributes:
        make: Makes a fresh rule.
        settings: What the rule depends on, as JSON can hold it.
        T: Length of the fit that it watches.
    """

    make: Callable[[], StopRule]
    settings: dict[str, Any]
    T: int

    def key(self, fit_key: str) -> str:
        """The key of its choice on a fit."""
        rule = self.make()
        return digest_of([fit_key, type(rule).__name__, self.settings, rule.steps_needed(self.T)])


class Choice(NamedTuple):
    """x(t), [3, H, W], its t, and the seconds of the fit and the rule when it was made."""

    image: Tensor
    step: int
    seconds: float


def read_choice(store: TraceStore, fit_key: str, asked: RuleAsked) -> Choice | None:
    """What a rule chose of a fit, or None where nobody knows; a fixed step is also looked up among a fit's samples."""
    entry = store.read("stopped", asked.key(fit_key))
    if entry is not None:
        image, step = torch.from_numpy(entry.arrays["image"]), int(entry.arrays["step"])
        return Choice(image, step, float(entry.header.get("seconds", 0.0)))
    rule = asked.make()
    if not isinstance(rule, FixedStep):
        return None
    found = read_samples(store, fit_key)
    if found is None or not found[0].covers([rule.step]):
        return None
    return Choice(found[0].at([rule.step]).images[0].clone(), rule.step, found[1])


def write_choice(store: TraceStore, fit_key: str, asked: RuleAsked, choice: Choice, about: dict[str, Any]) -> None:
    """Keep what a rule chose."""
    arrays = {"image": choice.image.cpu().numpy(), "step": np.int64(choice.step)}
    name = type(asked.make()).__name__
    more = {"what": f"{name} chose step {choice.step}", "rule": {"name": name, **asked.settings}}
    store.write("stopped", asked.key(fit_key), arrays, {**about, **more, "seconds": choice.seconds})


def one_a_key(rows: Sequence[int], keys: Sequence[str]) -> list[int]:
    """The first of the rows that share a key."""
    first: dict[str, int] = {}
    for b in rows:
        first.setdefault(keys[b], b)
    return list(first.values())


def stacked(choices: Sequence[Choice]) -> Stopped:
    """The choices of one rule on B images."""
    return Stopped(torch.stack([one.image for one in choices]), torch.tensor([one.step for one in choices]))
