"""Eq. 6-7 on traces made by hand; real traces stand in tests/fit."""

from dataclasses import replace

import pytest
import torch

from dipguard.decision import DecisionTrace, on_manifold, select, stitch, stitch_images


def a_trace() -> DecisionTrace:
    """Of twelve samples, with six crossings."""
    draw = torch.rand  # each test starts from seed 0
    return DecisionTrace(
        index=3, given=draw(3, 4, 4), given_scores=draw(10), steps=torch.arange(12) * 5 + 4, scores=draw(12, 10),
        quality=torch.linspace(0.1, 0.95, 12), loss=draw(12), crossing_at=torch.arange(6) * 2, alpha=draw(6),
        on_boundary=draw(6, 3, 4, 4), last=draw(5, 3, 4, 4), settings={"K_max": 5, "network": "small"},
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("K", [1, 3, 5])
@pytest.mark.parametrize("divide_by", ["found", "K"])
@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_equals_eq_6_and_7_written_out(beta: float, K: int, divide_by: str, tau: float) -> None:
    trace = a_trace()
    rebuilt = stitch(trace, tau=tau, t0=0, K=K, beta=beta, divide_by=divide_by)
    index_set = [m for m, i in enumerate(trace.crossing_at.tolist()) if float(trace.quality[i]) >= tau][-K:]
    total = torch.zeros(3, 4, 4, dtype=torch.float64)
    for m in index_set:
        x_db = trace.on_boundary[m].double()
        total += x_db + beta * (x_db - trace.given.double())
    expected = (total / (len(index_set) if divide_by == "found" else K)).clamp(0, 1)
    assert rebuilt.used.tolist() == index_set
    assert rebuilt.reason == "crossings"
    torch.testing.assert_close(rebuilt.image.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("K", [1, 4, 5])
@pytest.mark.parametrize("divide_by", ["found", "K"])
def test_without_a_crossing_the_mean_of_the_last_K_and_beta_0(K: int, divide_by: str) -> None:
    trace = a_trace()
    rebuilt = stitch(trace, tau=0.99, t0=0, K=K, beta=0.5, divide_by=divide_by)
    assert rebuilt.reason == "no_crossing"
    assert len(rebuilt.used) == 0
    torch.testing.assert_close(rebuilt.image, trace.last[-K:].mean(dim=0))


def test_t0_cuts_the_early_crossings_off() -> None:
    trace = a_trace()
    assert select(trace, tau=0, t0=0, K=5).tolist() == [1, 2, 3, 4, 5]
    assert select(trace, tau=0, t0=34, K=5).tolist() == [3, 4, 5]
    assert select(trace, tau=0, t0=34, K=5, rule="above").tolist() == [4, 5]
    assert select(trace, tau=0, t0=7, K=5, t0_unit="samples").tolist() == [4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"K": 0}, "`K` must be from 1 to 5, got 0"),
        ({"K": 6}, "`K` must be from 1 to 5, got 6"),
        ({"beta": -0.1}, "`beta` must be finite and at least 0, got -0.1"),
        ({"beta": float("inf")}, "`beta` must be finite and at least 0, got inf"),
        ({"tau": -0.1}, "`tau` must be from 0 to 1, got -0.1"),
        ({"t0_unit": "epochs"}, "`t0_unit` must be one of steps, samples, got 'epochs'"),
        ({"divide_by": "N"}, "`divide_by` must be one of found, K, got 'N'"),
    ],
)
@pytest.mark.parametrize("t0", [0, 10_000], ids=["crossings", "none"])
def test_bad_settings_are_named(arguments: dict, message: str, t0: int) -> None:
    with pytest.raises(ValueError, match=message):
        stitch(a_trace(), **{"tau": 0.0, "t0": t0, "K": 2, "beta": 0.5, **arguments})


def test_a_trace_of_mirrorguard_is_refused() -> None:
    with pytest.raises(ValueError, match="`trace` must be of a fit of DIPGuard, got one of MirrorGuard"):
        stitch(replace(a_trace(), mirrored_logits=torch.zeros(12, 10)), tau=0.0, t0=0, K=2, beta=0.5)


def test_stitch_images_refuses_none_and_too_many() -> None:
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"`images` must hold from 1 to K=2 images, got {count}"):
            stitch_images(torch.rand(count, 3, 4, 4), K=2)
    with pytest.raises(ValueError, match="`beta`"):
        on_manifold(torch.rand(1, 3, 4, 4), torch.rand(3, 4, 4), beta=-1)
