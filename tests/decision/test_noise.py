import math

import pytest
import torch

from dipguard.decision.noise import colour_noise


def slow(image):
    """Immerkaer's estimate of the noise in red - green and blue - green, pixel by pixel."""
    mask = [[1, -2, 1], [-2, 4, -2], [1, -2, 1]]
    _, height, width = image.shape
    total = 0.0
    for channel in (0, 2):
        for row in range(1, height - 1):
            for column in range(1, width - 1):
                value = 0.0
                for dy in range(3):
                    for dx in range(3):
                        pixel = image[:, row + dy - 1, column + dx - 1]
                        value += mask[dy][dx] * float(pixel[channel] - pixel[1])
                total += abs(value) / 6
    count = 2 * (height - 2) * (width - 2)
    return math.sqrt(math.pi / 2) * total / count / math.sqrt(2)


def test_equals_the_estimate_written_out():
    images = torch.rand(2, 3, 7, 6, generator=torch.Generator().manual_seed(0))
    assert colour_noise(images).tolist() == pytest.approx([slow(image) for image in images], abs=1e-6)


@pytest.mark.parametrize("std", [1, 4])
def test_finds_the_standard_deviation_of_independent_noise(std):
    draws = torch.Generator().manual_seed(1)
    ramp = torch.linspace(0.2, 0.8, 48).expand(3, 48, 48)
    texture = 0.1 * torch.rand(1, 48, 48, generator=draws)  # the same in all channels
    noisy = ramp + texture + std / 255 * torch.randn(3, 48, 48, generator=draws)
    assert 255 * float(colour_noise(noisy[None])) == pytest.approx(std, rel=0.05)
    assert (
        float(colour_noise((ramp + texture * torch.ones(3, 1, 1) + torch.tensor([0.1, 0, 0])[:, None, None])[None]))
        < 1e-6
    )


def test_of_a_grey_image_reads_its_grey_values():
    draws = torch.Generator().manual_seed(2)
    flat, noise = torch.full((1, 48, 48), 0.5), torch.randn(1, 48, 48, generator=draws)
    images = torch.stack([flat.expand(3, 48, 48), (flat + 8 / 255 * noise).expand(3, 48, 48)])
    clean, noisy = (255 * colour_noise(images)).tolist()
    assert clean == pytest.approx(0, abs=1e-6)
    assert noisy == pytest.approx(4, rel=0.1)  # half of it


def test_one_image_does_not_depend_on_the_others():
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    images[1] = images[1, :1]
    alone = torch.cat([colour_noise(image[None]) for image in images])
    assert torch.equal(colour_noise(images), alone)
