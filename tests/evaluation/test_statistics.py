from __future__ import annotations

import math

import pytest
import torch

from dipguard.evaluation.statistics import psnr, wilson


@pytest.mark.parametrize("count", [1, 7, 32, 1000])
def test_wilson_bounds_solve_its_equation(count: int) -> None:
    # The bounds are the shares p whose distance to the seen share is 1.96 of their own standard errors.
    for correct in sorted({0, 1, count // 2, count}):
        share = correct / count
        for bound in wilson(correct, count):
            assert 0 <= bound <= 1
            if 0 < bound < 1:
                error = math.sqrt(bound * (1 - bound) / count)
                assert abs(share - bound) / error == pytest.approx(1.959963984540054, rel=1e-9)
            else:
                assert share == bound


@pytest.mark.parametrize(("correct", "count"), [(0, 0), (-1, 3), (4, 3), (0.5, 2)])
def test_impossible_counts_are_refused(correct: int, count: int) -> None:
    with pytest.raises((TypeError, ValueError), match="`co"):
        wilson(correct, count)


def test_psnr_of_each_image_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    clean = torch.rand(3, 3, 8, 8, generator=draw)
    noisy = (clean + 0.1 * torch.randn(3, 3, 8, 8, generator=draw)).clamp(0, 1)
    for value, one, other in zip(psnr(noisy, clean).tolist(), noisy, clean, strict=True):
        error = sum((float(a) - float(b)) ** 2 for a, b in zip(one.flatten(), other.flatten(), strict=True)) / 192
        assert value == pytest.approx(10 * math.log10(1 / error))
    assert psnr(clean, clean).tolist() == [math.inf] * 3
    with pytest.raises(ValueError, match="one shape"):
        psnr(clean, clean[:2])
