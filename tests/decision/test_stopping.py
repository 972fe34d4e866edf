"""Stopping rules against slow transcriptions for one image, one number after the other."""

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from dipguard.decision.stopping import FixedStep, PeakOfSmoothedPSNR, Stopped, StopRule, tile_psnr

STEPS = 240


def literal_psnr(x: Tensor, given: Tensor, tile: int) -> float:
    """PSNR of an image of whole tiles, tile by tile, pixel by pixel."""
    found, made, wanted = [], x.tolist(), given.tolist()
    for top in range(0, x.shape[1] - tile + 1, tile):
        for left in range(0, x.shape[2] - tile + 1, tile):
            total = 0.0
            for c in range(3):
                for i in range(tile):
                    for j in range(tile):
                        total += (made[c][top + i][left + j] - wanted[c][top + i][left + j]) ** 2
            found.append(10 * math.log10(1 / (total / (3 * tile * tile))))
    return min(found)


def literal_peak(curve: list[float], smoothing: float) -> int:
    s, b = [curve[0]], [0.0]
    for t in range(1, len(curve)):
        trend = curve[1] - curve[0] if t == 1 else b[-1]
        s.append(smoothing * curve[t] + (1 - smoothing) * (s[-1] + trend))
        b.append(smoothing * (s[-1] - s[-2]) + (1 - smoothing) * trend)
    best = max(range(len(s)), key=lambda t: s[t])
    return best if best else len(s) - 1


def traces(side: int = 8, images: int = 5, steps: int = STEPS) -> tuple[list[Tensor], Tensor]:
    """Noisy walks towards given images, each at a pace of its own and with calm and wild stretches: x(t), x0."""
    draw = torch.Generator().manual_seed(5)
    given = torch.rand(images, 3, side, side, generator=draw, dtype=torch.float64)
    start = torch.rand(given.shape, generator=draw, dtype=torch.float64)
    pace = torch.linspace(10, 90, images, dtype=torch.float64).view(-1, 1, 1, 1)
    seen = []
    for t in range(steps):
        noise = torch.randn(given.shape, generator=draw, dtype=torch.float64)
        calm = 0.02 + 0.05 * (1 + torch.sin(t / pace + pace)) * (pace < 80)
        seen.append((given + (start - given) * torch.exp(-t / pace) + calm * noise).clamp(0, 1))
    return seen, given


def run(rule: StopRule, seen: Iterable[Tensor], given: Tensor) -> Stopped:
    for t, x in enumerate(seen):
        rule.update(t, x, given)
    return rule.result()


def check(found: Stopped, expected: list[int], seen: list[Tensor]) -> None:
    assert found.steps.tolist() == expected
    for b, t in enumerate(expected):
        assert torch.equal(found.images[b], seen[t][b])


@pytest.mark.parametrize(
    ("smoothing", "tile", "side", "steps"),
    [(0.002, 2, 2, 1500), (0.01, 4, 8, 240), (0.03, 8, 8, 240), (0.3, 4, 8, 240), (1.0, 4, 8, 240)],
)
def test_peak_of_smoothed_psnr_is_the_literal_recursion(smoothing: float, tile: int, side: int, steps: int) -> None:
    seen, given = traces(side=side, steps=steps)
    found = run(PeakOfSmoothedPSNR(smoothing=smoothing, tile=tile), seen, given)
    curves = [[literal_psnr(x[b], given[b], tile) for x in seen] for b in range(len(given))]
    expected = [literal_peak(curve, smoothing) for curve in curves]
    assert len(set(expected)) > 1
    check(found, expected, seen)


@pytest.mark.parametrize("step", [0, 1, 100, STEPS - 1])
def test_fixed_step_takes_that_step(step: int) -> None:
    seen, given = traces(images=2)
    rule = FixedStep(step)
    check(run(rule, seen, given), [step, step], seen)
    assert [rule.steps_needed(T) for T in (STEPS, 1)] == [min(STEPS, step + 1), 1]


RULES: dict[str, Callable[[], StopRule]] = {
    "peak": lambda: PeakOfSmoothedPSNR(smoothing=0.03, tile=4),
    "fixed": lambda: FixedStep(7),
}
EVERY = pytest.mark.parametrize("name", RULES)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_does_not_depend_on_its_neighbours(name: str, dtype: torch.dtype) -> None:
    seen, given = traces()
    seen, given = [x.to(dtype) for x in seen], given.to(dtype)
    together = run(RULES[name](), seen, given)
    for rows in ([2], [4, 2, 0]):
        alone = run(RULES[name](), [x[rows] for x in seen], given[rows])
        assert alone.images.dtype == dtype
        assert torch.equal(alone.steps, together.steps[rows])
        assert torch.equal(alone.images, together.images[rows])


@EVERY
def test_it_keeps_copies_and_works_in_inference_mode(name: str) -> None:
    seen, given = traces(images=2)
    expected = run(RULES[name](), seen, given)
    rule, buffer = RULES[name](), torch.empty_like(given)
    for t, x in enumerate(seen):
        buffer.copy_(x)  # as an engine that writes each step's images to the same place
        if t % 2:
            rule.update(t, buffer, given)
        else:
            with torch.inference_mode():
                rule.update(t, buffer, given)
    found = rule.result()
    assert torch.equal(found.steps, expected.steps)
    assert torch.equal(found.images, expected.images)
    assert not found.images.is_inference()


@EVERY
def test_a_step_left_out_or_repeated_is_refused(name: str) -> None:
    seen, given = traces(images=2, steps=2)
    rule = RULES[name]()
    with pytest.raises(RuntimeError, match=r"chose none of the 0 steps"):
        rule.result()
    with pytest.raises(ValueError, match="`t` must be 0, the next step of this rule's one fit, got 3"):
        rule.update(3, seen[0], given)
    rule.update(0, seen[0], given)
    with pytest.raises(ValueError, match="`t` must be 1"):
        rule.update(0, seen[0], given)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (70, 100), (20, 70), (31, 31), (32, 32)])
def test_tiles_leave_the_remainder_out_and_a_short_side_is_one_tile(height: int, width: int) -> None:
    draw = torch.Generator().manual_seed(1)
    given, x = torch.rand(2, 2, 3, height, width, generator=draw)
    found = tile_psnr(x, given)
    rows, columns = (range(side // min(32, side)) for side in (height, width))
    for b in range(2):
        parts = [
            (x - given)[b, :, min(32, height) * i :][:, : min(32, height), min(32, width) * j :][..., : min(32, width)]
            for i in rows
            for j in columns
        ]
        expected = min(-10 * math.log10(float(part.double().square().mean())) for part in parts)
        assert float(found[b]) == pytest.approx(expected, abs=1e-5)
    if height == 70:
        x[..., 64:, :] = 5.0
        x[..., 96:] = 5.0
        assert torch.equal(tile_psnr(x, given), found)


def test_psnr_of_equal_images_is_finite() -> None:
    assert tile_psnr(torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)).tolist() == [200.0]


def test_where_the_curve_never_rises_the_newest_is_taken() -> None:
    given = torch.zeros(2, 3, 8, 8)
    # The first image gets worse at step 1, and stays so; the second gets better, then worse.
    levels = [(0.1, 0.5), (0.2, 0.1), (0.3, 0.4), (0.3, 0.9)]
    seen = [torch.stack([torch.full((3, 8, 8), level) for level in pair]) for pair in levels]
    check(run(PeakOfSmoothedPSNR(smoothing=0.9), seen, given), [3, 1], seen)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PeakOfSmoothedPSNR(smoothing=1.5), ValueError, "`smoothing` must be from 0 to 1, got 1.5"),
        (lambda: PeakOfSmoothedPSNR(tile=0), ValueError, "`tile` must be at least 1, got 0"),
        (lambda: FixedStep(-1), ValueError, "`step` must be at least 0, got -1"),
        (lambda: FixedStep(1.0), TypeError, "`step` must be an integer"),  # type: ignore[arg-type]
    ],
)
def test_bad_options_are_named(make: Callable[[], StopRule], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
