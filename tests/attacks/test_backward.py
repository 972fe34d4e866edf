"""What replaces a defence's backward pass."""

import pytest
import torch
import torch.nn.functional as F

from dipguard.attacks.backward import BACKWARD, DEFAULT_FIT, fits_of, resized, straight_through
from dipguard.defenses import build_defense
from dipguard.fit import unrolled_fit

from .conftest import Median


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_approximations_keep_the_shape_and_have_a_gradient(digits, name, monkeypatch):
    monkeypatch.setattr("dipguard.attacks.backward.SHORT_T", 3)
    x = digits.images[:2].clone().requires_grad_()
    made = BACKWARD[name](x, torch.tensor([3, 4]), DEFAULT_FIT)
    assert made.shape == x.shape
    assert torch.autograd.grad(made.square().sum(), x)[0].isfinite().all()


def test_the_short_fit_has_the_defences_draws(digits):
    x = digits.images[:1]
    short = BACKWARD["short_dip"](x, torch.tensor([3]), DEFAULT_FIT)
    assert torch.equal(short, unrolled_fit(x, T=20, fit=DEFAULT_FIT, indices=[3]))
    assert not torch.equal(short, BACKWARD["short_dip"](x, torch.tensor([4]), DEFAULT_FIT))


def test_the_fits_are_the_defences_own(digits_cnn):
    mirror = build_defense("mirror", digits_cnn, networks=("small", "medium"), seed=3)
    assert fits_of(mirror) == mirror.dip_fits
    assert [fit.network for fit in mirror.dip_fits] == ["small", "medium"]
    paper = build_defense("paper", digits_cnn, network="small", lr=0.05)
    assert [(fit.network, fit.lr) for fit in fits_of(paper)] == [("small", 0.05)]
    assert fits_of(Median()) == fits_of(build_defense("jpeg", digits_cnn)) == (DEFAULT_FIT,)


@pytest.mark.parametrize("size", [8, 16])
def test_values_go_straight_through_and_gradients_come_straight_back(size):
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    purified, weights = torch.rand(2, 3, size, size), torch.rand(2, 3, size, size)
    made = straight_through(images, purified)
    assert torch.equal(made, purified)
    large = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    (expected,) = torch.autograd.grad((large * weights).sum(), images)
    (gradient,) = torch.autograd.grad((made * weights).sum(), images)
    assert torch.allclose(gradient, expected)
    assert (resized(images, like=purified) is images) == (size == 8)
