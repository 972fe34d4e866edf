"""A victim whose normalisations are folded into its convolutions, and victims that cannot be folded."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from dipguard.fit import DecideOptions, Decider, FitOptions, StitchOptions, fit_stack
from dipguard.fit.folded import folded


class Branching(nn.Module):
    """Torch.fx cannot trace a decision that depends on the image."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x if x.mean() > 0.5 else x + 0.1)


def with_statistics(victim: nn.Module) -> nn.Module:
    """Running statistics and weights as training leaves them: far from 0 and 1."""
    victim = copy.deepcopy(victim)
    draw = torch.Generator().manual_seed(0)
    for part in victim.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_mean, part.running_var, part.weight.data, part.bias.data):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
    return victim


def test_the_copy_has_no_normalisation_and_the_same_logits(images: Tensor, victim: nn.Module) -> None:
    victim = with_statistics(victim)
    before = copy.deepcopy(victim.state_dict())
    made = folded(victim, images)
    assert made is not victim
    assert not any(isinstance(part, nn.BatchNorm2d) for part in made.modules())
    torch.testing.assert_close(Decider(made)(images), Decider(victim)(images), rtol=1e-4, atol=1e-4)
    assert victim.training
    assert all(torch.equal(before[name], value) for name, value in victim.state_dict().items())


def test_a_victim_that_cannot_be_traced_is_asked_as_it_is(
    images: Tensor, victim: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    branching = Branching(victim)
    with caplog.at_level(logging.WARNING, logger="dipguard"):
        assert folded(branching, images) is branching
    assert "the victim cannot be folded, and is asked as it is: TraceError" in caplog.text


def test_a_fold_with_other_logits_is_not_used(
    images: Tensor, victim: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    class Noisy(nn.Module):
        """Never twice the same, so that nothing shows that the copy is right."""

        def __init__(self) -> None:
            super().__init__()
            self.classifier = victim

        def forward(self, x: Tensor) -> Tensor:
            logits = self.classifier(x)
            return logits + torch.rand_like(logits)

    noisy = Noisy()
    with caplog.at_level(logging.WARNING, logger="dipguard"):
        assert folded(noisy, images) is noisy
    assert "the folded victim's logits differ by" in caplog.text


@pytest.mark.parametrize("mode", ["inference_mode"])
def test_a_fit_may_ask_the_folded_victim(images: Tensor, victim: nn.Module, mode: str) -> None:
    victim = with_statistics(victim)
    with getattr(torch, mode)():
        traces = [
            fit_stack(
                images[:2],
                victim=victim,
                indices=range(2),
                fit=FitOptions(network="small", engine="torch"),
                decide=DecideOptions(T=24, decisions=12, **options),
                stitch=StitchOptions(K=2, tau=0.0, t0=0),
                device=torch.device("cpu"),
            ).traces
            for options in ({}, {"victim_speed": "folded"}, {"search": "bisection"}, {"victim_speed": "bfloat16"})
        ]
    assert [part[0].settings["victim_speed"] for part in traces] == ["as_is", "folded", "as_is", "bfloat16"]
    for plain, fast, bisected, half in zip(*traces, strict=True):
        assert half.scores.dtype == plain.scores.dtype
        assert not torch.equal(half.scores, plain.scores)
        assert float((half.scores - plain.scores).abs().max()) < 0.1 * float(plain.scores.abs().max())
        torch.testing.assert_close(fast.scores, plain.scores, rtol=1e-3, atol=1e-3)
        assert torch.equal(fast.decisions, plain.decisions)
        assert torch.equal(bisected.scores, plain.scores)
        assert torch.equal(bisected.crossing_at, plain.crossing_at)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"victim_speed": "fast"}, "`victim_speed` must be one of as_is, folded, bfloat16, got 'fast'"),
        ({"search": "newton"}, "`search` must be one of grid, bisection, got 'newton'"),
    ],
)
def test_unknown_names_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecideOptions(**options)
