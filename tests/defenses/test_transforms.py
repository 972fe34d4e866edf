"""The fixed transforms against slow and obvious forms, or against another library."""

from functools import partial

import numpy as np
import pytest
import skimage.restoration
import torch
from PIL import Image
from torch import Tensor

from dipguard.attacks import build_attack
from dipguard.data import load_data
from dipguard.defenses import build_defense
from dipguard.victims import build_victim


def slow_median(image: Tensor, size: int) -> Tensor:
    """Sort each window; beyond the border the image is mirrored, its edge pixels included."""
    before, after = size // 2, size - 1 - size // 2
    result = torch.empty_like(image)
    for c, channel in enumerate(image.numpy()):
        padded = np.pad(channel, (before, after), mode="symmetric")
        for i in range(channel.shape[0]):
            for j in range(channel.shape[1]):
                result[c, i, j] = float(np.sort(padded[i : i + size, j : j + size].ravel())[size * size // 2])
    return result


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_median_sorts_each_window(victim, images, size):
    given = images[:2, :, :9, :12]
    purified = build_defense("median", victim, size=size).purify(given)
    for image, result in zip(given, purified, strict=True):
        assert torch.equal(result, slow_median(image, size))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_bit_depth_takes_the_nearest_level(victim, images, bits):
    purified = build_defense("bit_depth", victim, bits=bits).purify(images)
    levels = torch.arange(2**bits, dtype=torch.float64) / (2**bits - 1)
    nearest = levels[(images.double()[..., None] - levels).abs().argmin(dim=-1)]
    # On the border between two levels either is nearest.
    between = (images.double()[..., None] - levels).abs().topk(2, largest=False).values.diff().squeeze(-1) < 1e-6
    assert torch.allclose(purified.double()[~between], nearest[~between], atol=1e-7)
    assert (between.float().mean() < 0.05) or bits == 8
    assert len(purified.unique()) <= 2**bits
    assert {0.0, 1.0} >= set(build_defense("bit_depth", victim, bits=1).purify(images).unique().tolist())


def slow_total_variation(image: Tensor, weight: float) -> Tensor:
    """Chambolle's dual problem by projected gradient, in float64."""
    given = image.double()

    def gradient(u: Tensor) -> Tensor:
        down = torch.zeros_like(u)
        right = torch.zeros_like(u)
        down[:, :-1] = u[:, 1:] - u[:, :-1]
        right[:, :, :-1] = u[:, :, 1:] - u[:, :, :-1]
        return torch.stack((down, right))

    def minus_divergence(p: Tensor) -> Tensor:
        u = torch.zeros_like(p[0])
        u[:, 1:] += p[0][:, :-1]
        u[:, :-1] -= p[0][:, :-1]
        u[:, :, 1:] += p[1][:, :, :-1]
        u[:, :, :-1] -= p[1][:, :, :-1]
        return u

    p = torch.zeros(2, *given.shape, dtype=torch.float64)
    for _ in range(2000):
        p = p + gradient(given - weight * minus_divergence(p)) / (8 * weight)
        p = p / p.norm(dim=0).clamp(min=1)
    return given - weight * minus_divergence(p)


def test_total_variation_tends_to_the_minimum_of_each_channel(victim, images, monkeypatch):
    given, defense = images[:1, :, :16, :16], build_defense("total_variation", victim, weight=0.1)
    expected = slow_total_variation(given[0], 0.1)
    short = defense.purify(given)[0]
    patient = partial(skimage.restoration.denoise_tv_chambolle, eps=0, max_num_iter=2000)
    monkeypatch.setattr("skimage.restoration.denoise_tv_chambolle", patient)
    long = defense.purify(given)[0]
    assert (long - expected).abs().max() < 3e-3
    assert (given[0] - expected).abs().max() > 0.05
    assert (long - expected).abs().mean() < (short - expected).abs().mean() < (given[0] - expected).abs().mean()


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_jpeg_is_what_a_file_gives_back(victim, images, tmp_path, quality):
    given = images[:2]
    purified = build_defense("jpeg", victim, quality=quality).purify(given)
    for image, result in zip(given, purified, strict=True):
        levels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(tmp_path / "image.jpg", quality=quality, subsampling=2)
        expected = torch.from_numpy(np.array(Image.open(tmp_path / "image.jpg"))).permute(2, 0, 1)
        assert torch.equal((result * 255).round().to(torch.uint8), expected)
    assert torch.equal((purified * 255).round() / 255, purified)


@pytest.mark.parametrize("name", ["jpeg", "median", "total_variation", "bit_depth"])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (33, 16)])
def test_any_size_is_taken(victim, name, size):
    given = torch.rand(1, 3, *size)
    assert build_defense(name, victim).purify(given).shape == given.shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most_lost", "least_won"),
    [("jpeg", 6, 5), ("median", 8, 5), ("total_variation", 8, 6), ("bit_depth", 8, 0)],
)
def test_on_real_images_some_decisions_come_back(real_data, name, most_lost, least_won):
    victim = build_victim("cifar10_resnet56", weights=real_data / "weights" / "resnet56-4bfd9763.th")
    data = load_data("arrays", path=real_data / "cifar10" / "tune.npz", limit=32)
    attacked = build_attack("pgd", victim, eps_255=8)(data.images, data.labels)

    def right(images):
        with torch.no_grad():
            return int((victim(images).argmax(1) == data.labels).sum())

    defense = build_defense(name, victim)
    assert right(defense.purify(data.images)) >= right(data.images) - most_lost
    assert right(defense.purify(attacked)) >= right(attacked) + least_won
