"""Another victim's view of a stored fit, against a fit that asked that victim."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dipguard import DIPGuard
from dipguard.fit.redecide import redecide
from dipguard.victims import build_victim


@pytest.fixture(scope="module")
def digits() -> Tensor:
    from dipguard.data import load_data

    return load_data("digits", limit=3).images


def guard(seed: int, *, keep: bool = True) -> DIPGuard:
    victim = build_victim("digits_cnn", seed=seed, progress=False)
    return DIPGuard(victim, T=40, decisions=20, t0=2, tau=0.1, keep_samples=keep, stack_size=3, progress=False)


@pytest.mark.slow
def test_a_stored_fit_serves_another_victim(digits: Tensor) -> None:
    first, second = guard(0), guard(1)
    mine, theirs = first.defend(digits).traces, second.defend(digits).traces
    assert any(not torch.equal(a.decisions, b.decisions) for a, b in zip(mine, theirs, strict=True))
    assert any(len(trace.crossing_at) > 0 for trace in theirs)
    for trace, wanted in zip(mine, theirs, strict=True):
        got = redecide(trace, second.victim)
        assert (got.index, got.settings) == (wanted.index, wanted.settings)
        for name in ("steps", "decisions", "crossing_at"):
            assert torch.equal(getattr(got, name), getattr(wanted, name)), name
        for name in ("scores", "given_scores", "quality", "alpha", "on_boundary", "last"):
            torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-4, atol=1e-4)


def test_the_same_victim_sees_the_same(digits: Tensor) -> None:
    one = guard(0)
    (trace,) = one.defend(digits[:1]).traces
    again = redecide(trace, one.victim)
    assert torch.equal(again.crossing_at, trace.crossing_at)
    torch.testing.assert_close(again.on_boundary, trace.on_boundary)


def test_a_trace_without_its_samples_is_refused(digits: Tensor) -> None:
    (trace,) = guard(0, keep=False).defend(digits[:1]).traces
    with pytest.raises(ValueError, match="`trace` of image 0 must hold its sampled reconstructions"):
        redecide(trace, guard(0).victim)
