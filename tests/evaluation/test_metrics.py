from __future__ import annotations

import pytest
import torch
from torch import nn

from dipguard.data import load_data
from dipguard.decision import quality
from dipguard.evaluation.metrics import BATCH, accuracy, decide, similarity
from dipguard.victims import build_victim


def test_accuracy_is_the_share_of_right_decisions() -> None:
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75


@pytest.mark.parametrize(("decisions", "labels"), [([1, 2], [1]), ([], []), ([[1]], [[1]])])
def test_accuracy_of_nothing_comparable_is_refused(decisions: list[int], labels: list[int]) -> None:
    with pytest.raises(ValueError, match="must be of one shape"):
        accuracy(torch.tensor(decisions), torch.tensor(labels))


def test_similarity_is_that_of_each_image_alone() -> None:
    clean = load_data("digits", limit=BATCH + 3, size=16).images
    noisy = (clean + 0.2 * torch.randn_like(clean)).clamp(0, 1)
    values = similarity(noisy, clean)
    alone = [float(quality(a[None], b[None])) for a, b in zip(noisy, clean, strict=True)]
    assert values.tolist() == pytest.approx(alone, abs=1e-6)
    assert 0 < float(values.min()) < float(values.max()) < 1
    assert similarity(clean, clean).tolist() == pytest.approx([1.0] * len(clean))


def test_similarity_of_different_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        similarity(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))


def test_decisions_do_not_depend_on_batches() -> None:
    victim: nn.Module = build_victim("digits_cnn", progress=False)
    digits = load_data("digits", limit=BATCH + 5)
    together = decide(victim, digits.images)
    assert torch.equal(together, torch.cat([decide(victim, image[None]) for image in digits.images]))
    assert accuracy(together, digits.labels) > 0.9
