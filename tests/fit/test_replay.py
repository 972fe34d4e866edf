"""Another victim's view of a stored fit, against a fit that asked that victim."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dipguard.decision import DecisionTrace
from dipguard.fit import (
    DecideOptions,
    Decider,
    FitOptions,
    StitchOptions,
    decide_samples,
    fit_samples,
    fit_stack,
    redecide,
    trace_settings,
)
from dipguard.victims import build_victim

CPU = torch.device("cpu")
FIT = FitOptions(network="small")
DECIDE = DecideOptions(T=40, decisions=20, keep_samples=True)
STITCH = StitchOptions(tau=0.1, t0=2, K=15, beta=0.5)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    from dipguard.data import load_data

    return load_data("digits", limit=3).images


def digit_victim(seed: int) -> nn.Module:
    return build_victim("digits_cnn", seed=seed, progress=False)


def traces(images: Tensor, victim: nn.Module, decide: DecideOptions = DECIDE) -> list[DecisionTrace]:
    indices = range(len(images))
    return fit_stack(images, victim=victim, indices=indices, fit=FIT, decide=decide, stitch=STITCH, device=CPU).traces


@pytest.mark.slow
def test_a_stored_fit_serves_another_victim(digits: Tensor) -> None:
    first, second = digit_victim(0), digit_victim(1)
    mine, theirs = traces(digits, first), traces(digits, second)
    assert any(not torch.equal(a.decisions, b.decisions) for a, b in zip(mine, theirs, strict=True))
    assert any(len(trace.crossing_at) > 0 for trace in theirs)
    for trace, wanted in zip(mine, theirs, strict=True):
        got = redecide(trace, second)
        assert (got.index, got.settings) == (wanted.index, wanted.settings)
        for name in ("steps", "decisions", "crossing_at"):
            assert torch.equal(getattr(got, name), getattr(wanted, name)), name
        for name in ("scores", "given_scores", "quality", "alpha", "on_boundary", "last"):
            torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-4, atol=1e-4)


def test_the_same_victim_sees_the_same(images: Tensor, undecided: nn.Module) -> None:
    (trace,) = traces(images[:1], undecided)
    again = redecide(trace, undecided)
    assert len(trace.crossing_at) > 0
    assert torch.equal(again.crossing_at, trace.crossing_at)
    torch.testing.assert_close(again.on_boundary, trace.on_boundary)


def test_samples_without_a_victim_give_the_traces_of_a_fit_with_one(images: Tensor, undecided: nn.Module) -> None:
    wanted = traces(images[:2], undecided)
    fits, seconds = fit_samples(images[:2], steps=range(44), T=44, indices=[0, 1], fit=FIT, device=CPU)
    assert set(seconds) == {"start", "fit"}
    for fitted, trace in zip(fits, wanted, strict=True):
        got = decide_samples(
            fitted,
            given=images[trace.index],
            index=trace.index,
            victim=Decider(undecided),
            fit=FIT,
            decide=DECIDE,
            stitch=STITCH,
        )
        assert got.settings == trace.settings == trace_settings(FIT, DECIDE, STITCH)
        assert got.samples is not None
        assert trace.samples is not None
        for name in ("steps", "quality", "loss", "samples", "last", "crossing_at"):
            assert torch.equal(getattr(got, name), getattr(trace, name)), name
        torch.testing.assert_close(got.scores, trace.scores, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"`steps` must be among the sampled ones, got also \[44\]"):
        fits[0].at([1, 44])
    with pytest.raises(RuntimeError, match="ended before the last step to keep, 7: 1 of 2 were sampled"):
        fit_samples(images[:1], steps=[2, 7], T=5, indices=[0], fit=FIT, device=CPU)


def test_a_trace_without_its_samples_is_refused(images: Tensor, victim: nn.Module) -> None:
    (trace,) = traces(images[:1], victim, DecideOptions(T=4))
    with pytest.raises(ValueError, match="`trace` of image 0 must hold its sampled reconstructions"):
        redecide(trace, victim)
