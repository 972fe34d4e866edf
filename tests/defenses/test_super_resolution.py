"""SR: the wavelets against a literal form, IMDN against its weights, the whole against its authors'."""

import csv

import numpy as np
import pytest
import pywt
import torch
from PIL import Image
from skimage.color import rgb2ycbcr, ycbcr2rgb
from torch import Tensor

from dipguard.defenses import build_defense
from dipguard.defenses.super_resolution import IMDN, wavelet_denoise
from dipguard.victims import load_state_dict_strict


def literal_denoise(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """The description in the words of PyWavelets: BayesShrink soft thresholds of each sub-band of each channel."""
    channels = rgb2ycbcr(pixels)
    for c in range(3):
        low, high = channels[..., c].min(), channels[..., c].max()
        scaled = (channels[..., c] - low) / (high - low)
        levels = max(pywt.dwt_max_level(min(scaled.shape), "haar") - 3, 1)
        kept, *details = pywt.wavedec2(scaled, "haar", mode="symmetric", level=levels)
        shrunk = []
        for level in details:
            bands = []
            for band in level:
                spread = np.sqrt(max((band**2).mean() - sigma**2, np.finfo(float).eps))
                bands.append(np.sign(band) * np.maximum(np.abs(band) - sigma**2 / spread, 0))
            shrunk.append(tuple(bands))
        rebuilt = pywt.waverec2([kept, *shrunk], "haar", mode="symmetric")[: scaled.shape[0], : scaled.shape[1]]
        channels[..., c] = rebuilt * (high - low) + low
    return np.clip(ycbcr2rgb(channels), 0, 1)


def pixels_of(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("sigma", [0.01, 0.04, 0.2])
@pytest.mark.parametrize("size", [(32, 32), (17, 26)])
def test_wavelets_are_the_literal_form(images, sigma, size):
    for image in images[:3, :, : size[0], : size[1]]:
        given = pixels_of(image)
        denoised = wavelet_denoise(given, sigma=sigma)
        assert np.allclose(denoised, literal_denoise(given, sigma), atol=1e-10)
        assert not np.allclose(denoised, given, atol=1e-4)


def test_a_grey_image_of_one_value_stays(victim):
    given = np.full((16, 16, 3), 0.4)
    assert np.allclose(wavelet_denoise(given, sigma=0.1), given, atol=1e-12)
    grey = np.repeat(np.random.default_rng(0).random((16, 16, 1)), 3, axis=2)  # chroma of one value
    assert np.isfinite(wavelet_denoise(grey, sigma=0.1)).all()


def test_the_prepared_image_is_a_jpeg_file_of_the_denoised_one(victim, images, tmp_path):
    given = pixels_of(images[0])
    cut = (literal_denoise(given, 0.04) * 255).astype(np.uint8)
    Image.fromarray(cut).save(tmp_path / "denoised.jpg", quality=95, subsampling=2)
    expected = np.asarray(Image.open(tmp_path / "denoised.jpg")) / 255
    assert np.allclose(build_defense("sr", victim, sigma=0.04).prepare(given), expected, atol=1e-6)


def test_imdn_has_the_published_size():
    assert sum(p.numel() for p in IMDN().parameters()) == 694_404


def test_the_doubled_image_is_scaled_down_again(victim, images, tmp_path):
    torch.save(IMDN().state_dict(), tmp_path / "imdn.pt")
    doubled, small = (
        build_defense("sr", victim, weights=tmp_path / "imdn.pt", output=kind).purify(images[:1, :, :16, :18])
        for kind in ("doubled", "bicubic")
    )
    assert (doubled.shape[-2:], small.shape[-2:]) == ((32, 36), (16, 18))
    assert torch.allclose(doubled * 255, (doubled * 255).round(), atol=1e-4)
    levels = (doubled[0] * 255).round().byte().permute(1, 2, 0).numpy()
    pillow = np.asarray(Image.fromarray(levels).resize((18, 16), Image.Resampling.BICUBIC))
    assert np.abs(small[0].permute(1, 2, 0).numpy() * 255 - pillow).max() < 2


def read(path, size: int | None = None) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return pixels if size is None else pixels[:size, :size]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))


def test_denoising_makes_what_its_authors_made(real_data, victim):
    folder = real_data / "reference" / "sr"
    given = read(folder / "adversarial_images" / "img63.png") / 255
    expected = read(folder / "test" / "img63_wd.jpg")
    weak, usual = (build_defense("sr", victim, sigma=sigma).prepare(given) * 255 for sigma in (0.01, 0.04))
    assert 42.5 < psnr(usual, expected) < 43
    assert psnr(weak, expected) < 32


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_imdn_with_its_weights_beats_bicubic_by_the_measured_figure(real_data, count):
    network = load_state_dict_strict(IMDN(), real_data / "weights" / "IMDN_x2.pth").eval()
    with (real_data / "nips2017" / "images.csv").open(encoding="utf-8") as file:
        names = [row["ImageId"] for row in csv.DictReader(file)][:count]
    ours, bicubic = [], []
    for name in names:
        large = read(real_data / "nips2017" / "images" / f"{name}.png", 288)
        small = Image.fromarray(large).resize((144, 144), Image.Resampling.BICUBIC)
        with torch.no_grad():
            doubled = network(torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255).clamp(0, 1)
        ours.append(psnr((doubled[0].permute(1, 2, 0) * 255).round().numpy(), large))
        bicubic.append(psnr(np.asarray(small.resize((288, 288), Image.Resampling.BICUBIC)), large))
    assert np.mean(ours) > np.mean(bicubic) + 2
    if count == 20:
        assert np.mean(ours) == pytest.approx(31.68, abs=0.1)
        assert np.mean(bicubic) == pytest.approx(28.44, abs=0.1)


@pytest.mark.slow
def test_the_whole_chain_comes_near_its_authors_result(real_data, victim):
    folder = real_data / "reference" / "sr"
    given = torch.from_numpy(read(folder / "adversarial_images" / "img63.png").copy()).permute(2, 0, 1)[None] / 255
    expected = read(folder / "experiment" / "test" / "results-Demo" / "img63_wd_x2_SR.png")
    defense = build_defense("sr", victim, weights=real_data / "weights" / "IMDN_x2.pth", sigma=0.04, output="doubled")
    purified = defense.purify(given)[0].permute(1, 2, 0).numpy() * 255
    # Another network than theirs (EDSR), so near is all that can be asked.
    assert psnr(purified, expected) > 35.5
    small = Image.fromarray(read(folder / "test" / "img63_wd.jpg"))
    assert psnr(purified, expected) > psnr(np.asarray(small.resize((598, 598), Image.Resampling.BICUBIC)), expected)
