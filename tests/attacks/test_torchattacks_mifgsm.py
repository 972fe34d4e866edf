"""MIFGSM's NaN momentum: the library's fault is shown, and that ours does not have it."""

import pytest
import torch
import torchattacks

from dipguard.attacks import build_attack

from .conftest import Scaled, Shadowed, right

DARK = torch.full((4, 3, 32, 32), 0.1)


@pytest.mark.parametrize("factor", [1000.0, 1e5])
def test_a_sure_victims_images_are_moved_where_the_library_leaves_them(digits_cnn, digits, factor):
    part = digits.select(0, 8)
    sure = Scaled(digits_cnn, factor)
    sure_of = sure(part.images).argmax(1) == part.labels
    theirs = torchattacks.MIFGSM(sure)(part.images, part.labels)
    ours = build_attack("mifgsm", sure)(part.images, part.labels)
    assert torch.equal(theirs[sure_of], part.images[sure_of])  # 0/0, and nobody is told
    assert right(sure, ours, part.labels) == 0


def test_one_sure_image_among_others_does_not_change_theirs(digits_cnn, digits):
    part = digits.select(0, 4)
    ours = build_attack("mifgsm", digits_cnn)(part.images, part.labels)
    assert torch.equal(ours, torchattacks.MIFGSM(digits_cnn)(part.images, part.labels))
    mixed = torch.cat([part.images, DARK[:1]])
    labels = torch.cat([part.labels, Shadowed(digits_cnn)(DARK[:1]).argmax(1)])
    victim = Shadowed(digits_cnn)
    attacked = build_attack("mifgsm", victim)(mixed, labels)
    assert torch.equal(attacked[:4], torchattacks.MIFGSM(victim)(mixed, labels)[:4])


def test_images_on_a_plateau_are_moved_within_the_budget_and_reproducibly(digits_cnn):
    victim = Shadowed(digits_cnn)
    labels = victim(DARK).argmax(1)
    assert torch.equal(torchattacks.MIFGSM(victim)(DARK, labels), DARK)
    attack = build_attack("mifgsm", victim)
    attacked = attack(DARK, labels)
    assert (attacked - DARK).abs().amax(dim=(1, 2, 3)).tolist() == pytest.approx([8 / 255] * 4, abs=1e-6)
    assert torch.equal(attack(DARK, labels), attacked)
    assert not torch.equal(build_attack("mifgsm", victim, seed=1)(DARK, labels), attacked)


def test_decay_arrives(digits_cnn, digits):
    part = digits.select(0, 8)
    forgetful = build_attack("mifgsm", digits_cnn, decay=0)(part.images, part.labels)
    assert torch.equal(forgetful, torchattacks.MIFGSM(digits_cnn, decay=0.0)(part.images, part.labels))
    assert not torch.equal(forgetful, build_attack("mifgsm", digits_cnn)(part.images, part.labels))
