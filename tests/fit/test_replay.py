"""Traces that are made from a stored fit, against those of a fit that asked the victim."""

import pytest
import torch
from torch import Tensor, nn

from dipguard.classifier import Decider
from dipguard.fit import DecideOptions, FitOptions, StitchOptions, fit_stack
from dipguard.fit.options import trace_settings
from dipguard.fit.replay import decide_samples, fit_samples

CPU = torch.device("cpu")
FIT = FitOptions(network="small")
DECIDE = DecideOptions(T=20, decisions=10)


def test_samples_without_a_victim_give_the_traces_of_a_fit_with_one(images: Tensor, undecided: nn.Module) -> None:
    stitch = StitchOptions(tau=0.1, t0=2, K=15, beta=0.5)
    how = {"indices": [0, 1], "fit": FIT, "device": CPU}
    wanted = fit_stack(images[:2], victim=undecided, decide=DECIDE, stitch=stitch, **how).traces
    fits, seconds = fit_samples(images[:2], steps=range(24), T=24, **how)
    assert set(seconds) == {"start", "fit"}
    assert any(len(trace.crossing_at) > 0 for trace in wanted)
    for fitted, trace in zip(fits, wanted, strict=True):
        own = {"given": images[trace.index], "index": trace.index, "victim": Decider(undecided)}
        got = decide_samples(fitted, fit=FIT, decide=DECIDE, **own)
        assert got.settings == trace_settings(FIT, DECIDE)
        assert got.settings.items() <= trace.settings.items()
        assert len(got.last) == 10
        for name in ("steps", "quality", "loss", "last", "crossing_at"):
            assert torch.equal(getattr(got, name), getattr(trace, name)), name
        torch.testing.assert_close(got.scores, trace.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.on_boundary, trace.on_boundary)
    with pytest.raises(ValueError, match=r"`steps` must be among the sampled ones, got also \[24\]"):
        fits[0].at([1, 24])
    with pytest.raises(RuntimeError, match="ended before the last step to keep, 7: 1 of 2 were sampled"):
        fit_samples(images[:1], steps=[2, 7], T=5, indices=[0], fit=FIT, device=CPU)
