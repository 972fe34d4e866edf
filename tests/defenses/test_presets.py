"""Defences with presets choose one by the size of the victim's input."""

import pytest
import torch
from torch import nn

from dipguard.defenses import build_defense

pytestmark = pytest.mark.parametrize("name", ["dipdefend", "mirror"])


@pytest.mark.parametrize(
    ("size", "options", "preset"),
    [
        (None, {}, "cifar10"),
        ((64, 64), {}, "cifar10"),
        (224, {}, "cifar10"),  # whatever another library's attribute means
        ((96, 64), {}, "imagenet"),
        ((224, 224), {"preset": "cifar10"}, "cifar10"),
        (None, {"preset": "imagenet"}, "imagenet"),
    ],
)
def test_the_preset_follows_the_victims_size(name, size, options, preset):
    network = nn.Flatten()
    network.size = size
    assert build_defense(name, network, **options).settings["preset"] == preset


def test_photographs_for_a_victim_of_unknown_size_are_refused(name, small_victim):
    with pytest.raises(ValueError, match="`preset` must be given for images of 96x128 pixels"):
        build_defense(name, small_victim).purify(torch.rand(1, 3, 96, 128))
    assert build_defense(name, small_victim, preset="cifar10").output_size(96, 128) == (96, 128)


def test_small_images_for_a_victim_of_photographs_are_refused(name, small_victim):
    small_victim.size = (224, 224)
    try:
        with pytest.raises(ValueError, match=r"`preset` must be given for images of 64x64 pixels.*'cifar10' for small"):
            build_defense(name, small_victim).purify(torch.rand(1, 3, 64, 64))
        assert build_defense(name, small_victim, preset="imagenet").output_size(64, 64) == (64, 64)
    finally:
        del small_victim.size
