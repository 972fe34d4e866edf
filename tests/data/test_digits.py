import pytest
import torch

from dipguard.data import load_data
from dipguard.data.digits import digits_split


def test_evaluation_digits_are_small_colour_images_of_all_classes():
    digits = load_data("digits")
    assert digits.images.shape == (599, 3, 32, 32)
    assert digits.images.min() == 0
    assert digits.images.max() <= 1
    assert digits.classes == tuple("0123456789")
    assert digits.labels.bincount().min() >= 50
    assert torch.equal(digits.images[:, 0], digits.images[:, 2])


def test_enlarging_is_bilinear():
    small, _ = digits_split(evaluation=True, size=8)
    large, _ = digits_split(evaluation=True, size=32)
    # Bilinear x4 without aligned corners: output pixel 1 + 4k + j lies at input coordinate k + (2j - 1) / 8.
    row = 0.375 * small[:, :, 3, 3] + 0.625 * small[:, :, 3, 4]
    below = 0.375 * small[:, :, 4, 3] + 0.625 * small[:, :, 4, 4]
    assert torch.allclose(large[:, :, 16, 16], 0.375 * row + 0.625 * below, atol=1e-6)


def test_the_victims_training_digits_and_the_evaluation_digits_do_not_overlap():
    train, train_labels = digits_split(evaluation=False, size=8)
    test, test_labels = digits_split(evaluation=True, size=8)
    assert len(train) + len(test) == 1797
    assert len(train_labels) + len(test_labels) == 1797
    assert torch.cdist(test.flatten(1).double(), train.flatten(1).double()).min() > 0


def test_the_split_depends_on_no_seed():
    first = load_data("digits", limit=20)
    torch.manual_seed(99)
    second = load_data("digits", limit=20)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)


def test_loading_a_part_keeps_each_images_index():
    whole, part = load_data("digits"), load_data("digits", offset=7, limit=3)
    assert part.indices.tolist() == [7, 8, 9]
    assert torch.equal(part.images, whole.images[7:10])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "digits.npz"}, ValueError, "`path`.*built in"),
        ({"offset": 599}, ValueError, "`offset`.*599"),
        ({"limit": 0}, ValueError, "`limit`"),
        ({"size": 0}, ValueError, "`size`"),
    ],
)
def test_digits_refuse(options, error, message):
    with pytest.raises(error, match=message):
        load_data("digits", **options)
