"""A defended classifier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dipguard import DIPGuard
from dipguard.defenses import build_defense
from dipguard.integrations.lightning import DefendedClassifier

from .conftest import TINY
from .projects import MEAN, STD, DigitsModule, digits


def normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def logits(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return module(images)


def test_a_defended_classifier_reads_purified_images(module: DigitsModule) -> None:
    images = digits(0, 6, noise=0.3)[0]
    median = build_defense("median", module)
    defended = DefendedClassifier(module, median).eval()
    assert not module.training
    expected = logits(module, median.purify(images))
    assert torch.equal(logits(defended, images), expected)
    assert not torch.allclose(expected, logits(module, images), atol=0.1)
    with_normalised_input = DefendedClassifier(module, median, mean=MEAN, std=STD)
    torch.testing.assert_close(
        logits(with_normalised_input, normalised(images)), logits(module, normalised(median.purify(images)))
    )
    assert [key.removeprefix("classifier.") for key in defended.state_dict()] == list(module.state_dict())
    assert {id(p) for p in DefendedClassifier(module, DIPGuard(module)).parameters()} == set(
        map(id, module.parameters())
    )


def test_a_guards_draws_come_from_the_image_or_from_indices(module: DigitsModule) -> None:
    images = digits(0, 3, noise=0.3)[0]
    guard = DIPGuard(module.eval(), **TINY)
    defended = DefendedClassifier(module, guard)
    together = logits(defended, images)
    torch.testing.assert_close(logits(defended, images[1:2]), together[1:2], rtol=0, atol=1e-4)
    by_position = logits(module, guard.purify(images))
    assert not torch.allclose(together, by_position, atol=1e-3)
    placed = DefendedClassifier(module, guard, draws="position")
    torch.testing.assert_close(logits(placed, images), by_position, rtol=0, atol=1e-4)
    with torch.inference_mode():
        handed = defended(images, indices=torch.arange(3))
    torch.testing.assert_close(handed, by_position, rtol=0, atol=1e-4)


def test_fine_tuning_on_purified_images_reaches_the_classifier(module: DigitsModule) -> None:
    images, labels = digits(0, 4)
    defended = DefendedClassifier(module, build_defense("median", module))
    nn.functional.cross_entropy(defended(images), labels).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_what_cannot_be_defended_is_named(module: DigitsModule) -> None:
    median = build_defense("median", module)
    with pytest.raises(TypeError, match="`defense` must have purify"):
        DefendedClassifier(module, module)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`classifier` must be a torch\.nn\.Module"):
        DefendedClassifier(lambda x: x, median)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`draws` must be one of content, position, got 'fixed'"):
        DefendedClassifier(module, median, draws="fixed")
    with pytest.raises(ValueError, match=r"`images` must lie in \[0, 1\], got values from"):
        DefendedClassifier(module, median)(torch.full((1, 3, 16, 16), 2.0))


def test_images_that_went_through_a_normalisation_are_clamped(module: DigitsModule) -> None:
    images = digits(0, 2)[0]
    defended = DefendedClassifier(module, build_defense("median", module)).eval()
    assert torch.equal(logits(defended, images - 3e-8), logits(defended, (images - 3e-8).clamp(0, 1)))
