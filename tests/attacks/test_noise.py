import pytest
import torch

from dipguard.attacks import build_attack

from .conftest import right


def test_every_pixel_is_moved_by_eps_or_stopped_at_the_border(digits_cnn):
    images = torch.full((2, 3, 32, 32), 0.5)
    images[1] = 0.0
    noisy = build_attack("noise", digits_cnn, eps_255=8)(images, torch.tensor([0, 1]))
    change = noisy - images
    assert torch.allclose(change[0].abs(), torch.tensor(8 / 255))
    assert 0.45 < float((change[0] > 0).float().mean()) < 0.55
    assert change[1].unique().tolist() == [0.0, pytest.approx(8 / 255)]


def test_it_is_drawn_from_seed_and_index(digits_cnn, digits):
    part = digits.select(0, 2)
    first = build_attack("noise", digits_cnn)(part.images, part.labels)
    assert not torch.equal(build_attack("noise", digits_cnn, seed=1)(part.images, part.labels), first)
    moved = build_attack("noise", digits_cnn)(part.images, part.labels, indices=torch.tensor([3, 4]))
    assert not torch.equal(moved, first)


def test_it_harms_less_than_a_gradient_does(digits_cnn, digits):
    noisy, attacked = (build_attack(name, digits_cnn)(digits.images, digits.labels) for name in ("noise", "fgsm"))
    assert right(digits_cnn, noisy, digits.labels) >= 0.8 > 0.3 > right(digits_cnn, attacked, digits.labels)


@pytest.mark.parametrize("eps_255", [0, -1, 256])
def test_bad_sizes_are_refused(digits_cnn, eps_255):
    with pytest.raises(ValueError, match="`eps_255`"):
        build_attack("noise", digits_cnn, eps_255=eps_255)
