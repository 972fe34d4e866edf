"""Images that leave the stack before the fit's end."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard.decision import DecisionTrace, stitch
from dipguard.engines.native_build import compiler
from dipguard.fit import (
    DecideOptions,
    FitOptions,
    FitProgress,
    Retirement,
    StackedDIP,
    StackResult,
    StitchOptions,
    progress_bar,
)
from dipguard.fit import fit_stack as fit_stack_

NATIVE = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
NATIVE_ROWS = [(3, 4), (2, 1), (6, 12)]
STITCH = {"tau": 0.2, "t0": 10, "K": 4}
T, SAMPLES = 81, 40


def fit(
    images: Tensor, victim: nn.Module, patience: int | None, *callbacks: pl.Callback, **options: Any
) -> StackResult:
    options = {"engine": "torch" if compiler() is None else "native"} | options
    stitching = {name: options.pop(name, value) for name, value in STITCH.items()}
    return fit_stack_(
        images,
        victim=victim,
        indices=range(40, 40 + len(images)),
        fit=FitOptions(network="small", jitter=0.1, **options),
        decide=DecideOptions(T=T, decisions=None, every=2, patience=patience, keep_samples=True),
        stitch=StitchOptions(**stitching),
        device=torch.device("cpu"),
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def to_the_end() -> dict[str, StackResult]:
    """The same fits without patience, by engine."""
    return {}


def samples_until_finished(trace: DecisionTrace, *, tau: float, t0: int, K: int, patience: int) -> int:
    """The rule as it is told, on the trace of a fit to the end."""
    y, v, t = trace.decisions.tolist(), trace.quality.double().tolist(), trace.steps.tolist()
    counted = [i for i in range(len(y) - 1) if y[i] != y[i + 1] and v[i] >= tau and t[i] >= t0]
    for newest in range(len(y)):
        seen = [i for i in counted if i + 1 <= newest]
        if len(seen) >= K and newest - (seen[-1] + 1) >= patience:
            return newest + 1
    return len(y)


@pytest.mark.parametrize(
    ("engine", "dtype", "patience", "K"),
    [
        pytest.param("torch", "float64", 3, 4, marks=pytest.mark.slow),
        *(pytest.param("native", "float32", *row, marks=NATIVE) for row in NATIVE_ROWS),
    ],
)
def test_finished_images_leave_and_the_others_go_on_unchanged(
    images: Tensor,
    undecided: nn.Module,
    engine: str,
    dtype: str,
    patience: int,
    K: int,
    to_the_end: dict[str, StackResult],
) -> None:
    options = {"engine": engine, "dtype": dtype, "K": K, "padding": "zeros"}
    if engine not in to_the_end:
        to_the_end[engine] = fit(images[:5], undecided, None, **options)
    whole, short = to_the_end[engine], fit(images[:5], undecided, patience, **options)
    expected = [samples_until_finished(t, **STITCH | {"K": K}, patience=patience) for t in whole.traces]
    assert [len(trace.steps) for trace in short.traces] == expected
    assert any(n < SAMPLES for n in expected), "no image finished: this shows nothing"
    assert [trace.index for trace in short.traces] == list(range(40, 45))
    for full, cut, n, rebuilt in zip(whole.traces, short.traces, expected, short.reconstructions, strict=True):
        assert full.samples is not None
        assert cut.samples is not None
        # Torch's convolutions may round by the stack's size; the native engine does not know it.
        torch.testing.assert_close(cut.samples, full.samples[:n], rtol=0, atol=1e-8 if engine == "torch" else 0)
        assert torch.equal(cut.given, full.given)
        assert torch.equal(cut.last, cut.samples[-cut.K_max :])
        torch.testing.assert_close(cut.loss, full.loss[:n], rtol=0, atol=1e-6)
        torch.testing.assert_close(cut.quality, full.quality[:n], rtol=0, atol=1e-5)
        torch.testing.assert_close(cut.scores, full.scores[:n], rtol=1e-4, atol=1e-4)
        assert torch.equal(cut.decisions, full.decisions[:n])
        assert torch.equal(rebuilt.image, stitch(cut, beta=0.5, **STITCH | {"K": K}).image)
        if n < SAMPLES:
            assert len(rebuilt.used) == K


def test_memory_layout_of_the_weights_survives(images: Tensor, undecided: nn.Module) -> None:
    """A fused Adam walks through weights, gradients and moments in the order of memory."""
    layouts: list[list[tuple[int, ...]]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: StackedDIP, *rest: Any) -> None:
            moments = trainer.optimizers[0].state
            for parameter in pl_module.engine.parameters():
                assert moments[parameter]["exp_avg"].stride() == parameter.stride()
                assert moments[parameter]["exp_avg"].shape == parameter.shape
            layouts.append([p.stride() for p in pl_module.engine.parameters()])

    fit(images[:5], undecided, 2, Watch(), K=1, engine="torch")
    assert all(layout == layouts[0] for layout in layouts)


def test_a_fit_ends_when_all_its_images_have(images: Tensor, undecided: nn.Module) -> None:
    steps: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            steps.append(batch_idx)

    with progress_bar(images=3, T=T, show=True) as bar:
        progress = FitProgress(bar, images=3)
        done = fit(images[3:6], undecided, 1, Watch(), progress, K=1, tau=0.0, t0=0)
        ends = [int(trace.steps[-1]) + 1 for trace in done.traces]
        assert steps[-1] + 1 == max(ends) < T
        assert bar.n == bar.total == sum(ends)
        progress.roll_back()
        assert (bar.n, bar.total) == (0, 3 * T)


def test_a_trace_says_when_its_fit_may_end(images: Tensor, undecided: nn.Module) -> None:
    patient = fit(images[:1], undecided, 5).traces[0].settings
    assert patient["patience"] == 5
    assert patient["retired_by"] == {**STITCH, "rule": "at_least", "t0_unit": "steps"}
    plain = fit(images[:1], undecided, None).traces[0].settings
    assert plain["patience"] is None
    assert "retired_by" not in plain


def test_patience_without_crossings_is_endless(images: Tensor) -> None:
    decided = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))
    nn.init.zeros_(decided[1].weight)
    assert [len(trace.steps) for trace in fit(images[:2], decided, 1, K=1, tau=0.0, t0=0).traces] == [SAMPLES, SAMPLES]


@NATIVE
def test_z_that_is_fitted_too_leaves_with_its_image(images: Tensor, undecided: nn.Module) -> None:
    options = {"optimise_z": True, "K": 2, "padding": "zeros"}
    whole, short = (fit(images[:5], undecided, patience, **options) for patience in (None, 2))
    lengths = [len(trace.steps) for trace in short.traces]
    assert 1 < len(set(lengths))
    for full, cut in zip(whole.traces, short.traces, strict=True):
        assert full.samples is not None
        assert cut.samples is not None
        assert torch.equal(cut.samples, full.samples[: len(cut.steps)])


def test_bad_patience_or_order_is_named(images: Tensor) -> None:
    with pytest.raises(ValueError, match="`patience` must be at least 1, got 0"):
        DecideOptions(patience=0)
    with pytest.raises(TypeError, match=r"`patience` must be an integer, got 1\.5"):
        Retirement(StitchOptions(), patience=1.5)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, callbacks=[Retirement(StitchOptions(), patience=1)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="DecisionLogger before"):
        trainer.fit(StackedDIP(images[:1], options=FitOptions(network="small")))
