import math

import pytest
import torch
from torch import nn

from dipguard.data import load_data
from dipguard.decision import quality
from dipguard.evaluation.metrics import BATCH, decide, psnr, similarity, wilson
from dipguard.victims import build_victim


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


def test_bounds_of_several_looks_are_wider() -> None:
    # Ten looks: each bound is missed in half a percent of all cases, and 2.807 is the normal distribution's 99.75 %.
    low, high = wilson(8, 16, looks=10)
    assert (0.5 - low) / math.sqrt(low * (1 - low) / 16) == pytest.approx(2.807033768343811)
    assert high == pytest.approx(1 - low)


def test_similarity_is_that_of_each_image_alone() -> None:
    clean = load_data("digits", limit=BATCH + 3, size=16).images
    noisy = (clean + 0.2 * torch.randn_like(clean)).clamp(0, 1)
    values = similarity(noisy, clean)
    alone = [float(quality(a[None], b[None])) for a, b in zip(noisy, clean, strict=True)]
    assert values.tolist() == pytest.approx(alone, abs=1e-6)
    assert 0 < float(values.min()) < float(values.max()) < 1
    assert similarity(clean, clean).tolist() == pytest.approx([1.0] * len(clean))


def test_psnr_of_each_image_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    clean = torch.rand(BATCH + 3, 3, 8, 8, generator=draw)
    noisy = (clean + 0.1 * torch.randn(clean.shape, generator=draw)).clamp(0, 1)
    values = psnr(noisy, clean).tolist()
    assert len(values) == len(clean)
    for i in (0, 1, BATCH - 1, BATCH, BATCH + 2):
        pairs = zip(noisy[i].flatten(), clean[i].flatten(), strict=True)
        error = sum((float(a) - float(b)) ** 2 for a, b in pairs) / 192
        assert values[i] == pytest.approx(10 * math.log10(1 / error))
    assert psnr(clean, clean).tolist() == [math.inf] * len(clean)


def test_decisions_do_not_depend_on_batches() -> None:
    victim: nn.Module = build_victim("digits_cnn", progress=False)
    digits = load_data("digits", limit=BATCH + 5)
    together = decide(victim, digits.images)
    assert torch.equal(together, torch.cat([decide(victim, image[None]) for image in digits.images]))
    assert (together == digits.labels).double().mean() > 0.9
