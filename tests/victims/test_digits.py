import os
import warnings

import pytest
import torch
from safetensors.torch import load_file

from dipguard.cache import cache_folder
from dipguard.victims import build_victim


def _right(victim, images, labels):
    with torch.no_grad():
        return float((victim(images).argmax(1) == labels).float().mean())


def test_it_knows_digits_that_it_was_not_trained_on(digits_cnn, digits):
    assert _right(digits_cnn, digits.images, digits.labels) >= 0.97


def test_it_is_sturdy_against_noise_that_is_no_attack(digits_cnn, digits):
    noise = 0.1 * torch.randn(digits.images.shape, generator=torch.Generator().manual_seed(0))
    assert _right(digits_cnn, (digits.images + noise).clamp(0, 1), digits.labels) >= 0.93


def test_the_second_time_or_by_its_path_it_comes_from_the_cache_bit_for_bit(digits_cnn, digits):
    path = cache_folder("victims", "digits_cnn-1.safetensors")
    written = path.stat().st_mtime_ns
    for weights in (None, path):
        again = build_victim("digits_cnn", weights=weights, progress=False)
        with torch.no_grad():
            assert torch.equal(again(digits.images[:9]), digits_cnn(digits.images[:9]))
    assert path.stat().st_mtime_ns == written
    assert [name for name in os.listdir(path.parent) if name.startswith(".")] == []


@pytest.mark.parametrize("epochs", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_a_damaged_cache_is_trained_again_alike_with_a_warning(digits_cnn, tmp_path, monkeypatch, epochs):
    original = load_file(cache_folder("victims", "digits_cnn-1.safetensors"))
    monkeypatch.setattr("dipguard.victims.digits._EPOCHS", epochs)
    monkeypatch.setenv("DIPGUARD_CACHE", str(tmp_path))
    path = cache_folder("victims", "digits_cnn-1.safetensors")
    path.parent.mkdir()
    path.write_bytes(b"damaged")
    torch.manual_seed(123)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="damaged and is trained again"), torch.inference_mode():
        victim = build_victim("digits_cnn", progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and not p.is_inference() for p in victim.parameters())
    trained = load_file(path)
    assert trained.keys() == original.keys()
    for key, value in original.items() if epochs == 12 else ():
        assert torch.allclose(trained[key].float(), value.float(), atol=1e-4), key


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DIPGUARD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("dipguard.victims.digits._EPOCHS", 1)
    with pytest.warns(UserWarning, match="could not be kept.*DIPGUARD_CACHE"):
        build_victim("digits_cnn", progress=True)
    assert "training digits_cnn" in capsys.readouterr().err


def test_a_good_cache_is_silent(digits_cnn, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_victim("digits_cnn")
    assert capsys.readouterr() == ("", "")
