import pytest
import torch

from dipguard.cache import cache_folder
from dipguard.data import load_data


def test_missing_files_without_download_are_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(RuntimeError, match=rf"`path` is {tmp_path}.*Unpack https://\S+python.tar.gz in `path`"):
        load_data("cifar10", path=tmp_path, download=False)


def test_damaged_files_without_download_are_an_error(tmp_path):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name in ("test_batch", "batches.meta", *(f"data_batch_{n}" for n in range(1, 6))):
        (batches / name).write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match="missing or damaged"):
        load_data("cifar10", path=tmp_path, download=False)


def test_split_is_checked_first():
    with pytest.raises(ValueError, match=r"`split`.*test, train"):
        load_data("cifar10", split="validation")


@pytest.mark.slow
def test_the_download_holds_the_real_images(real_data, monkeypatch):
    monkeypatch.delenv("DIPGUARD_CACHE")
    try:
        loaded = load_data("cifar10", path=cache_folder("cifar10"), limit=400, download=False)
    except RuntimeError:
        pytest.skip("CIFAR-10 is not in the cache folder")
    known = load_data("arrays", path=real_data / "cifar10" / "tune.npz")
    assert torch.equal(loaded.images, known.images)
    assert torch.equal(loaded.labels, known.labels)
    assert loaded.classes[3] == "cat"
