import re

import pytest
import torch

from dipguard.data import ImageSet
from dipguard.data.base import resize, shift_warning


@pytest.fixture
def five() -> ImageSet:
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.tensor([0, 1, 2, 0, 1]), torch.arange(100, 105), ("a", "b", "c"), "five")


@pytest.mark.parametrize(
    ("offset", "limit", "expected"),
    [(0, None, [100, 101, 102, 103, 104]), (1, 2, [101, 102]), (4, 9, [104]), (3, None, [103, 104])],
)
def test_select_keeps_each_images_index_and_label(five, offset, limit, expected):
    part = five.select(offset, limit)
    assert part.indices.tolist() == expected
    rows = [index - 100 for index in expected]
    assert torch.equal(part.images, five.images[rows])
    assert torch.equal(part.labels, five.labels[rows])
    assert (part.classes, part.name) == (five.classes, five.name)


def test_selecting_twice_keeps_the_first_index(five):
    assert five.select(1).select(2, 1).indices.tolist() == [103]


@pytest.mark.parametrize(
    ("offset", "limit", "error", "name"),
    [
        (5, None, ValueError, "offset"),
        (-1, None, ValueError, "offset"),
        (0, 0, ValueError, "limit"),
        (0, -3, ValueError, "limit"),
        (1.5, None, TypeError, "offset"),
        (0, "2", TypeError, "limit"),
    ],
)
def test_select_refuses(five, offset, limit, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        five.select(offset, limit)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(5, 3, 4, 4, dtype=torch.uint8)}, TypeError, "`images`.*255"),
        ({"images": torch.full((5, 3, 4, 4), 1.5)}, ValueError, "`images`.*\\[0, 1\\]"),
        ({"images": torch.full((5, 3, 4, 4), float("nan"))}, ValueError, "`images`.*NaN"),
        ({"images": torch.zeros(5, 1, 4, 4)}, ValueError, "`images`.*3 channels"),
        ({"images": torch.zeros(0, 3, 4, 4)}, ValueError, "`images`.*at least one"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, ValueError, "`labels`.*\\(5,\\)"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0])}, ValueError, "`labels`.*below 3"),
        ({"labels": torch.tensor([0, 1, -2, 2, 0])}, ValueError, "`labels`.*at least 0"),
        ({"labels": torch.zeros(5)}, TypeError, "`labels`.*integer"),
        ({"indices": torch.tensor([1, 2, 3, 4, 1])}, ValueError, "`indices`.*different"),
        ({"indices": torch.tensor([1, 2, 3, 4, -1])}, ValueError, "`indices`"),
    ],
)
def test_image_set_refuses(five, change, error, message):
    fields = {"images": five.images, "labels": five.labels, "indices": five.indices, "classes": five.classes}
    with pytest.raises(error, match=message):
        ImageSet(**{**fields, **change})


def test_image_set_holds_float32_and_int64(five):
    made = ImageSet(five.images.double(), five.labels.int(), five.indices.short())
    assert (made.images.dtype, made.labels.dtype, made.indices.dtype) == (torch.float32, torch.int64, torch.int64)


@pytest.mark.parametrize("size", [2, 3, 4, 9])
def test_resize_keeps_range_and_a_constant_picture(size):
    flat = torch.full((1, 3, 4, 4), 0.25)
    checkers = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(2, 2).expand(1, 3, 4, 4)
    assert torch.allclose(resize(flat, size), torch.full((1, 3, size, size), 0.25))
    assert 0 <= resize(checkers, size).min() <= resize(checkers, size).max() <= 1


def test_halving_averages_because_it_is_antialiased():
    row = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]).expand(1, 3, 8, 8)
    assert (resize(row, 4)[..., 1:-1, 1:-1] - 0.5).abs().max() < 0.13


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-4, ValueError), (3.0, TypeError)])
def test_resize_refuses(size, error):
    with pytest.raises(error, match="`size`"):
        resize(torch.zeros(1, 3, 4, 4), size)


VICTIM = ("tench", "hen", "great_white shark", "crane", "crane")


def _set(*classes):
    labels = torch.arange(len(classes))
    return ImageSet(torch.rand(len(classes), 3, 4, 4), labels, labels, classes, "folder")


@pytest.mark.parametrize(
    ("classes", "names", "outputs", "expected"),
    [
        (("3", "7"), tuple("0123456789"), 10, [3, 7]),
        (("03", "7"), (), 10, [3, 7]),
        (("9", "7"), ("a", "b"), 10, [9, 7]),
        (("Great-White Shark", "hen"), VICTIM, 5, [2, 1]),
        (("2", "4"), VICTIM, 5, [2, 4]),
        (("a", "b", "c"), (), 3, [0, 1, 2]),
    ],
)
def test_classes_get_the_labels_of_the_victims_classes_of_that_name_or_number(classes, names, outputs, expected):
    found = _set(*classes).labelled_for(names, outputs=outputs)
    assert found.labels.tolist() == expected
    assert found.classes in ((), names, classes)


@pytest.mark.parametrize(
    ("classes", "names", "outputs", "message"),
    [
        (("cat", "dog"), (), 10, "of the 2 classes of folder, the victim .10 classes. has none.*'cat', 'dog'"),
        (("cat", "hen"), VICTIM, 5, "'cat'"),
        (("crane", "hen"), VICTIM, 5, "or several, of the name 'crane'"),
        (("1", "10"), tuple("abcdefghij"), 10, "'1', '10'.*numbers from 0 on"),
        (("hen", "cat"), ("tench", "hen"), 2, "'cat'"),
    ],
)
def test_classes_that_are_not_the_victims_are_refused(classes, names, outputs, message):
    with pytest.raises(ValueError, match=f"`data`: .*{message}"):
        _set(*classes).labelled_for(names, outputs=outputs)


def test_other_names_of_as_many_classes_are_a_warning():
    given = _set("cat", "dog")
    with pytest.warns(UserWarning, match="no class 'cat', 'dog': the 2 classes of folder are taken for its own"):
        assert given.labelled_for(("tench", "hen"), outputs=2) is given


def test_labels_without_classes_stay():
    given = ImageSet(torch.rand(2, 3, 4, 4), torch.tensor([4, 1]), torch.arange(2))
    assert given.labelled_for(VICTIM, outputs=5) is given


@pytest.mark.parametrize("shift", [-1, 1])
def test_labels_that_are_off_by_one_are_a_warning(shift):
    decisions = torch.arange(20) % 8 + 1
    text = shift_warning(decisions - shift, decisions, outputs=10)
    assert re.search(rf"right on 0 of 20 .*would be on 20 .*one {'lower' if shift < 0 else 'higher'}", text)
    assert shift_warning(decisions, decisions, outputs=10) is None
    assert shift_warning(torch.arange(20).flip(0) % 10, decisions, outputs=10) is None
    assert shift_warning(decisions[:1] - shift, decisions[:1], outputs=10) is None
