import hashlib
import pickle

import numpy as np
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


def test_parts_of_both_splits(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels, sums = np.random.default_rng(0).integers(256, size=(6, 3, 32, 32), dtype=np.uint8), {}
    files = {
        "test": {"data": pixels[:4].reshape(4, -1), "labels": [3, 1, 4, 5]},
        "train": {"data": pixels[4:].reshape(2, -1), "labels": [7, 8]},
        "meta": {"label_names": [*"abcdefghij"]},
    }
    for name, content in files.items():
        (folder / name).write_bytes(written := pickle.dumps(content))
        sums[name] = hashlib.md5(written).hexdigest()
    for split in ("test", "train"):
        monkeypatch.setattr(CIFAR10, f"{split}_list", [[split, sums[split]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"filename": "meta", "md5": sums["meta"]})
    part = load_data("cifar10", path=tmp_path, offset=1, limit=2, download=False)
    assert (part.indices.tolist(), part.labels.tolist(), part.classes[0]) == ([1, 2], [1, 4], "a")
    assert torch.equal((part.images * 255).round().byte(), torch.from_numpy(pixels[1:3]))
    assert load_data("cifar10", path=tmp_path, split="train", download=False).labels.tolist() == [7, 8]


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
