import numpy as np
import pytest
import torch

from dipguard.data import load_data

PICTURES = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
LABELS = np.array([3, 1, 0, 2, 9, 1])


def _write(folder, **arrays):
    path = folder / "pictures.npz"
    np.savez_compressed(path, **arrays)
    return path


def test_pixels_become_fractions_with_channels_first(tmp_path):
    path = _write(tmp_path, images=PICTURES, labels=LABELS)
    loaded = load_data("arrays", path=path)
    assert loaded.images.shape == (6, 3, 5, 4)
    assert np.array_equal((loaded.images * 255).round().byte().permute(0, 2, 3, 1).numpy(), PICTURES)
    assert loaded.labels.tolist() == LABELS.tolist()
    assert loaded.indices.tolist() == list(range(6))
    assert loaded.name == "pictures"


def test_a_part_has_the_indices_that_test_index_gives(tmp_path):
    path = _write(tmp_path, images=PICTURES, labels=LABELS, test_index=np.arange(400, 406))
    part = load_data("arrays", path=str(path), offset=2, limit=2, size=8)
    assert part.indices.tolist() == [402, 403]
    assert part.labels.tolist() == [0, 2]
    assert part.images.shape == (2, 3, 8, 8)


def test_real_cifar10_images(real_data):
    report = load_data("arrays", path=real_data / "cifar10" / "report.npz", offset=10, limit=20)
    assert report.images.shape == (20, 3, 32, 32)
    assert report.indices.tolist() == list(range(410, 430))
    assert 0.3 < report.images.mean() < 0.6
    assert report.labels.max() <= 9


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"images": PICTURES}, ValueError, "no array 'labels'"),
        ({"labels": LABELS, "pictures": PICTURES}, ValueError, "no array 'images'.*'pictures'"),
        ({"images": PICTURES / 255, "labels": LABELS}, TypeError, "`images`.*uint8.*float64"),
        ({"images": PICTURES[..., 0], "labels": LABELS}, ValueError, "`images`.*\\[N, H, W, 3\\].*\\(6, 5, 4\\)"),
        ({"images": PICTURES.transpose(0, 3, 1, 2), "labels": LABELS}, ValueError, "`images`.*\\(6, 3, 5, 4\\)"),
        ({"images": PICTURES[:0], "labels": LABELS[:0]}, ValueError, "`images`.*N >= 1"),
        ({"images": PICTURES, "labels": LABELS[:5]}, ValueError, "`labels`.*\\(6,\\).*\\(5,\\)"),
        ({"images": PICTURES, "labels": LABELS - 1}, ValueError, "`labels`.*at least 0.*-1"),
        ({"images": PICTURES, "labels": LABELS * 0.5}, TypeError, "`labels`.*integers"),
        ({"images": PICTURES, "labels": LABELS, "test_index": LABELS}, ValueError, "`indices`.*different"),
        ({"images": PICTURES, "labels": LABELS, "test_index": LABELS[:2]}, ValueError, "`test_index`"),
        ({"images": PICTURES.astype(object), "labels": LABELS}, ValueError, "plain arrays: Object arrays"),
        ({"images": PICTURES, "labels": LABELS.astype(object)}, ValueError, "plain arrays: Object arrays"),
    ],
)
def test_arrays_refuse(tmp_path, arrays, error, message):
    with pytest.raises(error, match=message):
        load_data("arrays", path=_write(tmp_path, **arrays))


def test_arrays_that_are_stored_by_columns_are_read_alike(tmp_path):
    path = _write(tmp_path, images=np.asfortranarray(PICTURES), labels=LABELS)
    loaded = load_data("arrays", path=path, offset=1, limit=2)
    assert np.array_equal((loaded.images * 255).round().byte().permute(0, 2, 3, 1).numpy(), PICTURES[1:3])


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[: len(content) // 2],
        lambda content: content[: int(0.95 * len(content))],
        lambda content: bytes(b ^ 0xFF if i == len(content) // 3 else b for i, b in enumerate(content)),
    ],
    ids=["empty", "10 bytes", "half", "95 %", "a flipped byte in the pictures"],
)
def test_a_damaged_file_is_an_error_with_its_name(tmp_path, damaged):
    path = _write(tmp_path, images=PICTURES, labels=LABELS)
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(ValueError, match=r"pictures.npz is not a readable"):
        load_data("arrays", path=path)


def test_a_single_array_is_an_error(tmp_path):
    np.save(tmp_path / "one.npy", PICTURES)
    with pytest.raises(ValueError, match="not a readable"):
        load_data("arrays", path=tmp_path / "one.npy")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": None}, ValueError, "`path`"),
        ({"path": "nowhere.npz"}, FileNotFoundError, "`path`.*nowhere.npz"),
        ({"offset": 6}, ValueError, "`offset`"),
        ({"limit": 0}, ValueError, "`limit`"),
    ],
)
def test_arrays_need_a_file_and_a_part_of_it(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        load_data("arrays", **{"path": _write(tmp_path, images=PICTURES, labels=LABELS), **options})


def test_arrays_do_not_touch_the_global_rng(tmp_path):
    before = torch.get_rng_state()
    load_data("arrays", path=_write(tmp_path, images=PICTURES, labels=LABELS))
    assert torch.equal(torch.get_rng_state(), before)
