from dataclasses import replace

import pytest
import torch
from torch import nn

from dipguard.decision import DecisionTrace
from dipguard.decision.class_scores import (
    SHIFTS,
    average_target_samples,
    class_scores,
    mirrored,
    stitch_mirrored,
)


@pytest.mark.parametrize("shift", [(0, 0), *SHIFTS, (3, -1), (-6, 7)])
def test_a_mirrored_copy_is_the_same_picture_read_backwards(shift):
    images = torch.rand(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))
    got = mirrored(images, shift=shift)
    dy, dx = shift

    def reflected(position, side):  # the pixel that a reflecting border shows at a position outside
        return -position if position < 0 else 2 * (side - 1) - position if position >= side else position

    for row in range(9):
        for column in range(8):
            source_row, source_column = reflected(row - dy, 9), 7 - reflected(column - dx, 8)
            assert torch.equal(got[:, :, row, column], images[:, :, source_row, source_column])


@pytest.mark.parametrize("shift", [(9, 0), (0, -8)])
def test_a_shift_as_large_as_the_image_is_refused(shift):
    with pytest.raises(ValueError, match="`shift`"):
        mirrored(torch.rand(1, 3, 9, 8), shift=shift)


def test_class_scores_are_mean_probabilities():
    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(2))
    got = class_scores(logits)
    for b in range(3):
        for c in range(4):
            slow = sum(float(torch.exp(logits[s, b, c]) / torch.exp(logits[s, b]).sum()) for s in range(5)) / 5
            assert float(got[b, c]) == pytest.approx(slow, abs=1e-6)
    own = torch.tensor([2, 0, 3])
    less = class_scores(logits, own=own, own_class_weight=0.25)
    for b in range(3):
        for c in range(4):
            assert float(less[b, c]) == pytest.approx(float(got[b, c]) * (0.25 if c == own[b] else 1), abs=1e-6)
    with pytest.raises(ValueError, match="`own_class_weight`"):
        class_scores(logits, own=own, own_class_weight=1.5)
    with pytest.raises(ValueError, match="at least one reading"):
        class_scores(logits[:0])


class Brightness(nn.Module):
    """Class 1 where the mean is at least one half, else class 0."""

    def forward(self, images):
        mean = images.flatten(1).mean(dim=1)
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def grey(*levels):
    return torch.stack([torch.full((3, 4, 4), level) for level in levels])


@pytest.mark.parametrize(
    ("levels", "target", "level", "used", "beta"),
    [
        ((0.6, 0.8, 0.2), 1, 0.7, 2, 0.0),  # the mean of the two that are read as 1
        ((0.6, 0.8, 0.2), 0, 0.2, 1, 0.0),
        # None is read as 1: the mean, 0.44, is pushed away from x0 = 0.2 until it is at least a half.
        ((0.44, 0.44), 1, 0.512, 0, 0.3),
        ((0.21, 0.21), 1, 0.21, 0, 0.0),  # no step is long enough
    ],
)
def test_samples_of_the_target_are_averaged_and_pushed_if_they_must_be(levels, target, level, used, beta):
    samples = grey(*levels)
    victim = Brightness()
    made = average_target_samples(
        samples, victim(samples).argmax(1), grey(0.2)[0], target=target, classify=victim, betas=[0.1, 0.2, 0.3, 0.4]
    )
    assert (made.used, made.beta) == (used, beta)
    assert torch.allclose(made.image, grey(level)[0])


def test_a_pushed_image_stays_in_range():
    samples = grey(0.98)
    made = average_target_samples(
        samples, torch.tensor([0]), grey(0.0)[0], target=1, classify=lambda x: Brightness()(x - 0.49), betas=[0.5]
    )
    assert made.beta == 0.5
    assert float(made.image.max()) == 1.0


def test_bad_arguments_of_the_average_are_refused():
    with pytest.raises(ValueError, match="`samples`"):
        average_target_samples(torch.empty(0, 3, 4, 4), torch.empty(0), grey(0.1)[0], target=0,
                       classify=Brightness(), betas=[])  # fmt: skip
    with pytest.raises(ValueError, match="`betas`"):
        average_target_samples(
            grey(0.1), torch.tensor([0]), grey(0.1)[0], target=0, classify=Brightness(), betas=[-0.1]
        )


def test_a_trace_is_stitched_by_the_scores_of_its_mirrored_copies():
    victim, samples = Brightness(), grey(0.6, 0.8, 0.2)
    generator = torch.Generator().manual_seed(0)
    trace = DecisionTrace(
        index=0, given=grey(0.4)[0], given_scores=victim(grey(0.4))[0], steps=torch.arange(3), scores=victim(samples),
        quality=torch.ones(3), loss=torch.ones(3), crossing_at=torch.zeros(0, dtype=torch.int64), alpha=torch.zeros(0),
        on_boundary=torch.zeros(0, 3, 4, 4), last=samples[-1:], samples=samples,
        mirrored_logits=torch.rand(3, 2, generator=generator) + torch.tensor([0.0, 2.0]),
    )  # fmt: skip
    made = stitch_mirrored(trace, own_class_weight=1.0, classify=victim, betas=[0.1])
    assert (made.reason, made.used.tolist()) == ("class_scores", [0, 1])
    assert torch.allclose(made.image, grey(0.7)[0])
    dark = replace(trace, scores=victim(grey(0.1, 0.2, 0.3)))
    assert stitch_mirrored(dark, own_class_weight=1.0, classify=victim, betas=[]).reason == "no_sample_of_class"
    with pytest.raises(ValueError, match="`trace` must hold its `samples` and `mirrored_logits`"):
        stitch_mirrored(replace(trace, samples=None), own_class_weight=1.0, classify=victim, betas=[])
