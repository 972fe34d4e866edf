"""Under another default dtype or device the same seed gives the same numbers: each draw and buffer names its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dipguard import MirrorGuard
from dipguard.decision.stopping import PeakOfSmoothedPSNR
from dipguard.engines.jitter_feed import JitterFeed
from dipguard.fit import (
    DecideOptions,
    FitOptions,
    StackedDIP,
    StitchOptions,
    WindowLogger,
    fit_stack,
    isolated_trainer,
    make_trainer,
    unrolled_fit,
)
from tests.fit.conftest import NATIVE, fit_rule

CPU = torch.device("cpu")


def in_both(work: Callable[[], list[Tensor]]) -> None:
    usual = work()
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, "meta")):  # put back after each test
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        for mine, other in zip(usual, work(), strict=True):
            assert (mine.dtype, mine.device) == (other.dtype, other.device)
            assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("engine", "z"),
    [
        ("torch", "gaussian"),
        pytest.param("native", "uniform", marks=NATIVE),
        pytest.param("torch", "uniform", marks=pytest.mark.slow),
    ],
)
def test_a_fit_and_what_the_callbacks_make_of_it(images: Tensor, undecided: nn.Module, engine: str, z: str) -> None:
    fit = FitOptions(network="small", engine=engine, jitter=0.05, z=z, optimise_z=z == "gaussian")

    def work() -> list[Tensor]:
        stitch, decide = StitchOptions(tau=0.0, t0=0, K=3, beta=0.5), DecideOptions(T=12, decisions=12)
        done = fit_stack(images[:1], victim=undecided, indices=[3], fit=fit, decide=decide, stitch=stitch, device=CPU)
        log = WindowLogger(undecided, warm_up=2, every=2, windows=2)
        with isolated_trainer(CPU):
            make_trainer(6, device=CPU, callbacks=[log]).fit(StackedDIP(images[:1], options=fit))
        rule = PeakOfSmoothedPSNR(smoothing=0.2)
        stopped = fit_rule(images[:1], rule=rule, T=8, indices=[0], fit=fit, device=CPU)
        seen = [log.samples, log.logits, log.mirrored_logits, log.errors, *stopped]
        return [*done.traces[0].tensors().values(), done.reconstructions[0].image, *seen]

    in_both(work)


def test_the_traces_of_our_own_defence(images: Tensor, undecided: nn.Module) -> None:
    guard = MirrorGuard(undecided, networks=["small"], T=4, t0=2, every=1, progress=False)
    in_both(lambda: list(guard.defend(images[:1]).traces[0].tensors().values()))


def test_a_differentiable_fit(images: Tensor) -> None:
    in_both(lambda: [unrolled_fit(images[:1], T=3, fit=FitOptions(network="small", jitter=0.05))])


def test_the_jitter_of_a_gpu() -> None:
    def work() -> list[Tensor]:
        feed = JitterFeed((2, 4, 4), indices=[1, 2], seed=0, std=0.5, device=CPU)
        seen = [feed.next(torch.zeros(2, 2, 4, 4, dtype=torch.float32, device=CPU)) for _ in range(10)]
        feed.close()
        return seen

    in_both(work)
