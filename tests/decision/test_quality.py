import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from scipy.stats import norm

from dipguard.decision import quality
from dipguard.decision.quality import image_noise


def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of Wang et al. 2004 by its definition, one channel after the other."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(image: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(image, window, axis=0, mode="mirror"), window, axis=1, mode="mirror")

    c1, c2 = 0.01**2, 0.03**2
    values = []
    for a, b in zip(x, y, strict=True):
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        cov = blur(a * b) - mean_a * mean_b
        ssim = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        values.append(ssim)
    return float(np.mean(values))


@pytest.mark.parametrize(("height", "width"), [(6, 7), (32, 32), (24, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition_image_by_image(height: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.rand(4, 3, height, width, generator=generator, dtype=dtype)
    noise = torch.rand(4, 3, height, width, generator=generator, dtype=dtype)
    mixed = torch.lerp(given, noise, torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=dtype).view(-1, 1, 1, 1))
    values = quality(mixed, given)
    expected = [slow_ssim(a.double().numpy(), b.double().numpy()) for a, b in zip(mixed, given, strict=True)]
    assert values.tolist() == pytest.approx(expected, abs=2e-4 if dtype == torch.float32 else 1e-9)
    assert float(values[0]) == pytest.approx(1.0)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        quality(torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="at least 6x6 pixels for SSIM"):
        quality(torch.rand(1, 3, 5, 9), torch.rand(1, 3, 5, 9))


MASK = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])


def slow_noise(image: torch.Tensor) -> float:
    """The estimates, pixel by pixel: the mean of the colour differences, and a quarter of the brightness's quartile."""
    red, green, blue = image.double().numpy()

    def filtered(plane: np.ndarray) -> list[float]:
        height, width = plane.shape
        corners = [(row, column) for row in range(height - 2) for column in range(width - 2)]
        return [abs(float((MASK * plane[row : row + 3, column : column + 3]).sum())) / 6 for row, column in corners]

    colour = math.sqrt(math.pi / 2) * float(np.mean(filtered(red - green) + filtered(blue - green))) / math.sqrt(2)
    return max(colour, float(np.quantile(filtered((red + green + blue) / 3), 0.25)) / norm.ppf(0.625) / 4)


def test_noise_equals_the_estimates_written_out_image_by_image() -> None:
    images = torch.rand(3, 3, 7, 6, generator=torch.Generator().manual_seed(0))
    images[1] = images[1, :1]
    images[2] = images[2, :1] + 0.01 * images[2]
    found = image_noise(images)
    assert found.tolist() == pytest.approx([slow_noise(image) for image in images], abs=1e-6)
    assert torch.equal(found, torch.cat([image_noise(image[None]) for image in images]))


@pytest.mark.parametrize("std", [1, 4])
def test_finds_the_standard_deviation_of_independent_noise(std: float) -> None:
    draws = torch.Generator().manual_seed(1)
    ramp = torch.linspace(0.2, 0.8, 48).expand(3, 48, 48)
    texture = torch.zeros(1, 48, 48)  # the same in all channels, on part of the image
    texture[:, :30] = 0.1 * torch.rand(30, 48, generator=draws)
    noisy = ramp + texture + std / 255 * torch.randn(3, 48, 48, generator=draws)
    assert 255 * float(image_noise(noisy[None])) == pytest.approx(std, rel=0.05)
    tinted = ramp + texture + torch.tensor([0.1, 0, 0])[:, None, None]
    assert 255 * float(image_noise(tinted[None])) < 0.1


def test_noise_that_the_channels_share_is_read_from_the_brightness() -> None:
    draws = torch.Generator().manual_seed(2)
    flat, noise = torch.tensor([0.3, 0.5, 0.6])[:, None, None], torch.randn(1, 48, 48, generator=draws)
    images = torch.stack([flat.expand(3, 48, 48), flat + 12 / 255 * noise])
    clean, noisy = (255 * image_noise(images)).tolist()
    assert clean == pytest.approx(0, abs=1e-6)
    assert noisy == pytest.approx(3, rel=0.1)  # a quarter of it
