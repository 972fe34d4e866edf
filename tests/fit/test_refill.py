"""Images that take the places of those that leave the stack."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dipguard.engines.native_build import compiler
from dipguard.fit import DecideOptions, FitOptions, FitProgress, StackResult, StitchOptions, fit_stack, progress_bar
from dipguard.fit.cohort import Cohort, Waiting, row_ranges
from dipguard.fit.staggered_adam import StaggeredAdam

NATIVE = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
T = 61


class Sizes(pl.Callback):
    """How many images each step fits, in how many cohorts."""

    def __init__(self) -> None:
        self.images: list[int] = []
        self.cohorts: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.images.append(len(pl_module.indices))
        self.cohorts.append(len(pl_module.cohorts))


def fit(
    images: Tensor, victim: nn.Module, *callbacks: pl.Callback, first: int = 40, slots: int | None = None, **fit: Any
) -> StackResult:
    decide = {"every": 3, "patience": 2} | {name: fit.pop(name) for name in ("every", "patience") if name in fit}
    return fit_stack(
        images,
        victim=victim,
        indices=range(first, first + len(images)),
        fit=FitOptions(**{"network": "small", "jitter": 0.1, "padding": "zeros"} | fit),
        decide=DecideOptions(T=T, decisions=None, keep_samples=True, **decide),
        stitch=StitchOptions(tau=0.1, t0=6, K=2),
        device=torch.device("cpu"),
        callbacks=callbacks,
        slots=slots,
    )


@pytest.mark.parametrize(
    ("engine", "dtype", "more"),
    [
        pytest.param("torch", "float64", {}, marks=pytest.mark.slow),
        pytest.param("torch", "float64", {"optimise_z": True, "jitter": 0.0}, marks=pytest.mark.slow),
        pytest.param("native", "float32", {}, marks=NATIVE),
        pytest.param("native", "float32", {"optimise_z": True}, marks=[NATIVE, pytest.mark.slow]),
        pytest.param("native", "float32", {"every": 7}, marks=[NATIVE, pytest.mark.slow]),
    ],
)
def test_an_image_is_fitted_as_if_it_were_alone(
    images: Tensor, undecided: nn.Module, engine: str, dtype: str, more: dict[str, Any]
) -> None:
    options = {"engine": engine, "dtype": dtype, **more}
    sizes = Sizes()
    together = fit(images[:6], undecided, sizes, slots=3, **options)
    assert [trace.index for trace in together.traces] == list(range(40, 46))
    assert max(sizes.images) == 3
    assert max(sizes.cohorts) > 1, "nobody began beside others: this shows nothing"
    lengths = [len(trace.steps) for trace in together.traces]
    assert len(set(lengths)) > 1
    for b, (ours, rebuilt) in enumerate(zip(together.traces, together.reconstructions, strict=True)):
        alone = fit(images[b : b + 1], undecided, first=40 + b, **options)
        theirs = alone.traces[0]
        assert ours.steps.tolist() == theirs.steps.tolist()
        assert ours.crossing_at.tolist() == theirs.crossing_at.tolist()
        # Torch's convolutions round by the stack's size; the native engine does not know it.
        near = {"rtol": 0, "atol": 0 if engine == "native" else 1e-7}
        torch.testing.assert_close(ours.samples, theirs.samples, **near)
        torch.testing.assert_close(ours.given, theirs.given, rtol=0, atol=0)
        torch.testing.assert_close(ours.quality, theirs.quality, rtol=0, atol=1e-5)
        torch.testing.assert_close(rebuilt.image, alone.reconstructions[0].image, rtol=0, atol=1e-5)
        assert ours.settings == theirs.settings


def test_the_stack_stays_full_while_images_wait(images: Tensor, undecided: nn.Module) -> None:
    sizes = Sizes()
    with progress_bar(images=8, T=T, show=True) as bar:
        progress = FitProgress(bar, images=8, slots=3)
        done = fit(images, undecided, sizes, progress, slots=3, engine="torch")
        ends = [int(trace.steps[-1]) + 1 for trace in done.traces]
        # An image that is fitted to the end has one step behind its last sample.
        assert sum(ends) <= sum(sizes.images) == bar.n == bar.total <= sum(ends) + ends.count(T - 1)
        progress.roll_back()
        assert (bar.n, bar.total) == (0, 8 * T)
    waiting_until = max(i for i, (a, b) in enumerate(zip(sizes.cohorts, sizes.cohorts[1:], strict=False)) if b > a)
    assert set(sizes.images[: waiting_until + 1]) == {3}
    assert len(sizes.images) < T * 8 / 3


@pytest.mark.slow
def test_without_a_crossing_all_are_fitted_to_the_end(images: Tensor) -> None:
    decided = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))
    nn.init.zeros_(decided[1].weight)
    sizes = Sizes()
    done = fit(images[:5], decided, sizes, slots=2, engine="torch")
    assert sizes.images == [2] * (2 * T) + [1] * T
    assert [trace.steps.tolist() for trace in done.traces] == [list(range(2, T, 3))] * 5


@pytest.mark.parametrize("slots", [None, 8, 20])
def test_nobody_waits_where_there_are_places_for_all(images: Tensor, undecided: nn.Module, slots: int | None) -> None:
    sizes = Sizes()
    fit(images[:2], undecided, sizes, slots=slots, engine="torch")
    assert set(sizes.cohorts) == {1}
    assert max(sizes.images) == 2


def test_places_are_taken_an_eighth_at_a_time() -> None:
    waiting = Waiting(torch.rand(20, 3, 8, 8), tuple(range(20)), T=10, slots=16)
    assert [waiting.take(fitted) for fitted in (15, 14, 14, 3, 0)] == [
        slice(0, 0), slice(0, 2), slice(2, 4), slice(4, 17), slice(17, 20),
    ]  # fmt: skip
    assert waiting.left == 0
    assert row_ranges([Cohort(0, (0, 1), 1), Cohort(4, (2, 3, 4), 3)]) == [slice(0, 1), slice(1, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_counts_its_own_steps_of_adam(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    begun, left = [0, 0, 3, 3, 5], {1: 4}  # row -> first step; row -> first step without it
    starts = torch.randn(5, 16, 3, generator=draw, dtype=dtype)
    gradients = torch.randn(9, 5, 16, 3, generator=draw, dtype=dtype)
    stack = nn.Parameter(starts[:2].clone())
    ours = StaggeredAdam([stack], lr=0.05)
    rows = [0, 1]
    for t in range(9):
        new = [b for b in range(5) if begun[b] == t and t > 0]
        if new:
            stack.data = torch.cat([stack.data, starts[new]])
            ours.join(len(new))
            rows += new
        if t in left.values():
            stay = [i for i, b in enumerate(rows) if left.get(b) != t]
            stack.data = stack.data[stay]
            ours.keep(stay)
            rows = [rows[i] for i in stay]
        stack.grad = gradients[t, rows].clone()
        ours.step()
    for i, b in enumerate(rows):
        alone = nn.Parameter(starts[b : b + 1].clone())
        torchs = torch.optim.Adam([alone], lr=0.05, fused=True)
        for t in range(begun[b], 9):
            alone.grad = gradients[t, b : b + 1].clone()
            torchs.step()
        assert torch.equal(stack.data[i : i + 1], alone.data)
