"""Algorithm 1, lines 4-19, as the callbacks do it, against the slow and literal form."""

import csv
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from torch import Tensor, nn

from dipguard.data import load_data
from dipguard.decision import DecisionTrace, quality, sampled_steps, stitch
from dipguard.fit import (
    BoundaryDetector,
    DecideOptions,
    DecisionLogger,
    FitOptions,
    StackedDIP,
    Stitcher,
    StitchOptions,
    fit_stack,
)
from dipguard.fit.options import trace_settings
from dipguard.victims import build_victim
from tests.fit.conftest import At, trainer

CPU = torch.device("cpu")
STITCH: dict[str, Any] = {"tau": 0.3, "t0": 10, "K": 5, "beta": 0.5}


def defend(images: Tensor, victim: nn.Module, *, K: int = 5, run: dict[str, Any] | None = None, **decide: Any) -> Any:
    decide = {"T": 40, "decisions": None, "every": 2, **decide}
    options = {"decide": DecideOptions(**decide), "stitch": StitchOptions(**{**STITCH, "K": K}), "device": CPU}
    fit = FitOptions(network="small", jitter=0.1, padding="zeros")
    return fit_stack(images, victim=victim, indices=range(len(images)), fit=fit, **options, **(run or {}))


def literal(trace: DecisionTrace, victim: nn.Module, *, tau: float, t0: int, K: int, beta: float) -> Tensor:
    """Lines 9-18 of Algorithm 1, one image and one number after the other."""
    X, x0, N = trace.last, trace.given, 10
    assert len(X) == len(trace.steps), "K_max is too small for all samples"
    victim = victim.eval()
    with torch.no_grad():
        Y = [int(victim(x[None]).argmax()) for x in X]
        X_db = []
        for i, t in enumerate(trace.steps.tolist()[:-1]):
            if t < t0:
                continue
            v = float(quality(X[i][None], x0[None]))
            if Y[i] != Y[i + 1] and v >= tau:
                errors = {}
                for n in range(N + 1):
                    f = victim((n / N * X[i] + (1 - n / N) * X[i + 1])[None])[0]
                    errors[n] = float((f[Y[i]] - f[Y[i + 1]]).abs())
                best = min(errors, key=lambda n: errors[n])
                X_db.append(best / N * X[i] + (1 - best / N) * X[i + 1])
        if not X_db:
            last = list(X)[-K:]
            return sum(last) / len(last)
        I_K = X_db[-K:]
        manifold = [x_db + beta * (x_db - x0) for x_db in I_K]
        return (sum(manifold) / len(manifold)).clamp(0, 1)


@pytest.fixture(scope="module")
def real(real_data: Path) -> tuple[Any, nn.Module]:
    images = load_data("arrays", path=real_data / "cifar10" / "tune.npz", limit=4).images
    victim = build_victim("cifar10_resnet20", weights=str(real_data / "weights" / "resnet20-12fca82f.th"))
    return defend(images, victim), victim


@pytest.mark.parametrize(
    ("tau", "t0", "K", "beta"),
    [
        (0.3, 10, 5, 0.5),
        pytest.param(0.0, 0, 25, 0.0, marks=pytest.mark.slow),
        pytest.param(0.2, 30, 2, 1.5, marks=pytest.mark.slow),
        pytest.param(1.0, 0, 7, 0.5, marks=pytest.mark.slow),
    ],
)
def test_equals_the_literal_algorithm_on_real_traces(real, tau, t0, K, beta) -> None:
    (done, victim), options = real, {"tau": tau, "t0": t0, "K": K, "beta": beta}
    made = [stitch(trace, **options) for trace in done.traces]
    for trace, rebuilt in zip(done.traces, made, strict=True):
        torch.testing.assert_close(rebuilt.image, literal(trace, victim, **options), rtol=0, atol=1e-4)
    assert ("crossings" in {rebuilt.reason for rebuilt in made}) == (tau < 1)


@pytest.fixture(scope="module")
def three(images: Tensor, victim: nn.Module) -> Any:
    return defend(images[:3], victim)


def test_equals_the_literal_algorithm(three: Any, victim: nn.Module) -> None:
    assert sum(len(trace.crossing_at) for trace in three.traces) > 0
    other = {"tau": 0.0, "t0": 0, "K": 25, "beta": 0.1}
    for trace, rebuilt in zip(three.traces, three.reconstructions, strict=True):
        for image, options in ((rebuilt.image, STITCH), (stitch(trace, **other).image, other)):
            torch.testing.assert_close(image, literal(trace, victim, **options), rtol=0, atol=1e-5)


def test_a_trace_says_what_the_samples_say(three: Any, images: Tensor, victim: nn.Module) -> None:
    victim.eval()
    for b, trace in enumerate(three.traces):
        with torch.no_grad():
            torch.testing.assert_close(trace.scores, victim(trace.last), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(trace.given_scores, victim(images[b : b + 1])[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(trace.quality, quality(trace.last, trace.given.expand_as(trace.last)))
        torch.testing.assert_close(trace.loss, (trace.last - trace.given).square().flatten(1).mean(1))
        assert trace.steps.tolist() == list(sampled_steps(40, every=2))
        assert torch.equal(trace.given, images[b])


def test_a_replay_of_what_little_was_kept_is_the_direct_result(images, victim, three, tmp_path) -> None:
    stored = [
        DecisionTrace.load(trace.save(tmp_path / f"{trace.index}.safetensors"))
        for trace in defend(images[:3], victim, K_max=3, K=1).traces
    ]
    assert all(torch.equal(trace.last, whole.last[-3:]) for trace, whole in zip(stored, three.traces, strict=True))
    for tau, t0, K, beta in [(0.0, 20, 3, 0.0), (0.35, 0, 1, 0.5), (0.6, 30, 2, 1.0)]:
        for trace, whole in zip(stored, three.traces, strict=True):
            replayed, expected = (stitch(one, tau=tau, t0=t0, K=K, beta=beta) for one in (trace, whole))
            assert (replayed.reason, len(replayed.used)) == (expected.reason, len(expected.used))
            assert torch.equal(replayed.image, expected.image)


def test_what_is_kept_does_not_grow_with_T(images: Tensor, victim: nn.Module) -> None:
    kept = {}
    for T in (12, 40):
        traces = defend(images[:2], victim, T=T, K_max=3, K=3).traces
        kept[T] = [len(trace.last) for trace in traces]
        for trace in traces:
            # Crossings that later ones of higher quality have overtaken K_max times are forgotten.
            quality_at = trace.quality[trace.crossing_at].tolist()
            assert all(sum(w >= v for w in quality_at[m + 1 :]) < 3 for m, v in enumerate(quality_at))
    assert kept[12] == kept[40] == [3, 3]


def test_the_victim_is_left_as_it_was(images: Tensor, victim: nn.Module) -> None:
    victim.train()
    victim[1].eval()
    victim[0].weight.requires_grad_(False)
    modes = [part.training for part in victim.modules()]
    state = {name: value.clone() for name, value in victim.state_dict().items()}
    defend(images[:1], victim, T=10)
    assert [part.training for part in victim.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in victim.state_dict().items())
    assert [p.requires_grad for p in victim.parameters()] == [False] + [True] * 7
    assert all(p.grad is None for p in victim.parameters())


def logged(images: Tensor, victim: nn.Module, folder: Path, *callbacks: pl.Callback, **decide: Any) -> Any:
    """What a fit gave, the rows that it logged, and how many images the victim saw, call by call."""
    logger = pl.loggers.CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    done, calls = None, []
    hook = victim.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    with hook, suppress(KeyboardInterrupt):
        done = defend(images, victim, run={"logger": logger, "first_step": 100, "callbacks": callbacks}, **decide)
    logger.save()
    lines = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return done, [{column: float(value) for column, value in line.items()} for line in lines], calls


def test_samples_that_wait_for_a_good_batch_come_out_the_same(images, undecided, tmp_path) -> None:
    options: dict[str, Any] = {"every": 1, "K_max": 40}
    monitor = pl.Callback()  # depends on the latest decisions, as EarlyStopping or ModelCheckpoint may
    monitor.monitor = "fit/crossings"
    (tmp_path / "once").mkdir()
    ours, rows, calls = logged(images[:2], undecided, tmp_path, **options)
    wanted, their_rows, their_calls = logged(images[:2], undecided, tmp_path / "once", monitor, **options)
    # The given images, 40 steps of 2 images, and then crossings.
    assert calls[:3] == [2, 64, 16]
    assert their_calls[:41] == [2] * 41
    assert [row["step"] for row in rows] == [row["step"] for row in their_rows] == list(range(100, 140))
    assert rows[-1]["fit/crossings"] > 0
    for row, their in zip(rows, their_rows, strict=True):
        assert row == pytest.approx(their, abs=1e-6)
    names = ("steps", "decisions", "crossing_at", "quality", "loss", "last", "alpha", "on_boundary")
    for mine, theirs in zip(ours.traces, wanted.traces, strict=True):
        assert len(mine.crossing_at) > 0
        torch.testing.assert_close(mine.scores, theirs.scores, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in names)
    for mine, theirs in zip(ours.reconstructions, wanted.reconstructions, strict=True):
        assert torch.equal(mine.image, theirs.image)


def test_what_waited_is_logged_after_an_interrupt(images: Tensor, victim: nn.Module, tmp_path: Path) -> None:
    def interrupt(trainer: pl.Trainer) -> None:
        raise KeyboardInterrupt

    done, rows, calls = logged(images[:1], victim, tmp_path, At(11, interrupt), T=20)  # every second step
    assert done is None
    assert [row["step"] for row in rows] == [101, 103, 105, 107, 109, 111]
    assert calls == [1, 6]


def test_wrong_order_or_module_is_named(images: Tensor, victim: nn.Module) -> None:
    order = "DecisionLogger before BoundaryDetector, and both before Stitcher, got no"
    logger, detector = DecisionLogger(victim, decisions=4, K_max=2), BoundaryDetector(victim)
    stitcher, demanding = (Stitcher(**{**STITCH, "K": K}) for K in (2, 15))
    for callbacks, error, message in (
        ([detector, logger], RuntimeError, f"{order} DecisionLogger there"),
        ([stitcher], RuntimeError, f"{order} DecisionLogger there"),
        ([logger, stitcher, detector], RuntimeError, f"{order} BoundaryDetector there"),
        ([logger, detector, demanding], ValueError, "`K` must be from 1 to 2, got 15"),
    ):
        with pytest.raises(error, match=message):
            trainer(4, *callbacks).fit(StackedDIP(images[:1], options=FitOptions(network="small")))
    with pytest.raises(TypeError, match="works on a StackedDIP, got BoringModel"):
        trainer(4, logger).fit(BoringModel())


def test_traces_hold_all_options(images: Tensor, victim: nn.Module) -> None:
    fit, decide = FitOptions(network="small"), DecideOptions(T=6, N=3, K_max=4)
    stitch = StitchOptions(tau=0.25, t0=1, K=4, beta=0.0, rule="above", t0_unit="samples", divide_by="K")
    done = fit_stack(images[:1], victim=victim, indices=[0], fit=fit, decide=decide, stitch=stitch, device=CPU)
    settings = done.traces[0].settings
    assert settings == trace_settings(fit, decide, stitch)
    assert {"network": "small", "T": 6, "N": 3, "K_max": 4, "tau": 0.25}.items() <= settings.items()
    assert done.traces[0].steps.tolist() == list(range(6)), "200 decisions are more than 6 steps"
