import copy

import pytest
import torch
import torchattacks
from torch import nn

from dipguard.attacks import build_attack

from .conftest import right


def test_it_fools_the_digits_victim(digits_cnn, digits):
    attacked = build_attack("cw", digits_cnn)(digits.images, digits.labels)
    assert right(digits_cnn, attacked, digits.labels) <= 0.15


class _Shifted(nn.Module):
    """The same decisions and margins, other logits."""

    def __init__(self, victim, shift):
        super().__init__()
        self.victim, self.shift = victim, shift

    def forward(self, images):
        return self.victim(images) + self.shift


@pytest.mark.parametrize("shift", [-64.0, 64.0])
def test_it_depends_on_margins_alone_where_the_library_needs_positive_logits(digits_cnn, digits, shift):
    part = digits.select(0, 16)
    # In float64 a shift costs no digits, so that only the objective can make a difference.
    victim, images = copy.deepcopy(digits_cnn).double(), part.images.double()
    expected = build_attack("cw", victim)(images, part.labels)
    shifted = build_attack("cw", _Shifted(victim, shift))(images, part.labels)
    assert torch.allclose(shifted, expected, atol=1e-6)
    assert right(victim, shifted, part.labels) <= 0.2


def test_the_librarys_own_fails_on_negative_logits(digits_cnn, digits):
    part = digits.select(0, 16)
    victim = _Shifted(copy.deepcopy(digits_cnn), -64.0)
    theirs = torchattacks.CW(victim)(part.images, part.labels)
    ours = build_attack("cw", victim)(part.images, part.labels)
    assert right(victim, theirs, part.labels) > 0.5
    assert right(victim, ours, part.labels) <= 0.2


def test_batch_mates_matter_so_the_batch_size_is_kept_and_1_sets_images_free(digits_cnn, digits):
    part = digits.select(0, 8)
    together, singly = (build_attack("cw", digits_cnn, lr=0.03, batch_size=size) for size in (8, 1))
    # Far beyond what rounding does to a batch of another size: the library stops all images at the same step.
    theirs, ours = together(part.images, part.labels), singly(part.images, part.labels)
    assert int(((theirs - ours).abs().amax(dim=(1, 2, 3)) > 0.01).sum()) >= 4
    assert torch.equal(singly(part.images[3:4], part.labels[3:4]), ours[3:4])
    assert (together.settings["batch_size"], singly.settings["batch_size"]) == (8, 1)


def test_pixels_at_the_limits_never_move(digits_cnn, digits):
    part = digits.select(0, 8)
    assert (part.images == 0).any()
    attacked = build_attack("cw", digits_cnn)(part.images, part.labels)
    at_limit = (part.images == 0) | (part.images == 1)
    assert torch.equal(attacked[at_limit], part.images[at_limit])
    assert not torch.equal(attacked, part.images)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps_255": 8}, TypeError, "'cw' takes no option 'eps_255'.*c, kappa, steps, lr"),
        ({"c": 0}, ValueError, "`c` must be above 0"),
        ({"lr": -1}, ValueError, "`lr`"),
        ({"kappa": -1}, ValueError, "`kappa`"),
        ({"steps": 1.5}, TypeError, "`steps`"),
    ],
)
def test_bad_options_are_refused(digits_cnn, options, error, message):
    with pytest.raises(error, match=message):
        build_attack("cw", digits_cnn, **options)


@pytest.mark.slow
def test_on_the_deepest_real_victim(deepest):
    victim, data = deepest
    assert right(victim, build_attack("cw", victim)(data.images, data.labels), data.labels) <= 0.02
