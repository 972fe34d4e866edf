from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from dipguard.decision import quality


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


def test_an_image_does_not_depend_on_its_batch() -> None:
    given = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 0.5, 1]).view(
        3, 1, 1, 1
    )
    x = (given + 0.02).clamp(0, 1)
    together = quality(x, given)
    alone = torch.cat([quality(x[b : b + 1], given[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        quality(torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="at least 6x6 pixels for SSIM"):
        quality(torch.rand(1, 3, 5, 9), torch.rand(1, 3, 5, 9))
