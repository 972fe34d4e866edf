from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dipguard.reporting.comparison_figure import (
    LEFT,
    SIDE,
    TOP,
    Scene,
    draw_comparison,
    stored_scenes,
    write_comparison,
)
from matplotlib.figure import Figure
from torch import Tensor

from dipguard.data import load_data
from dipguard.decision import quality
from dipguard.defenses import build_defense
from dipguard.files import write_npz
from dipguard.reporting.canvas import DPI

CLASSES = ("cat", "dog", "great white shark, Carcharodon carcharias")
N = 5


@pytest.fixture
def clean() -> Tensor:
    """Smooth colour images."""
    return F.interpolate(torch.rand(N, 3, 5, 5), size=(24, 24), mode="bilinear")


def blurred(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


def store(path: Path, given: Tensor, **arrays: Any) -> Path:
    """Write a file of a run; an array that is None is left out."""
    values = {"images": given.numpy(), "decisions": np.arange(len(given)) % 3, **arrays}
    return write_npz(path, **{name: value for name, value in values.items() if value is not None})


@pytest.fixture
def folder(tmp_path: Path, clean: Tensor) -> Path:
    """A run: one column attacked by noise, undefended and blurred."""
    attacked = (clean + 0.1 * torch.randn_like(clean).sign()).clamp(0, 1)
    store(tmp_path / "attacks" / "pgd_8.npz", attacked)
    for row, images in (("none", attacked), ("blur", blurred(attacked))):
        rows = {"ssim": quality(images, clean).numpy(), "psnr": np.zeros(N), "indices": np.arange(N) + 40}
        store(tmp_path / "cells" / "pgd_8" / f"{row}.npz", images, **rows)
    return tmp_path


def words(figure: Figure) -> tuple[list[str], list[str], list[str], list[str]]:
    """Heads, decisions, SSIM and names of the rows."""
    heads = [text.get_text() for ax in figure.axes for text in ax.texts]
    return (
        heads,
        [ax.get_title() for ax in figure.axes],
        [ax.get_xlabel() for ax in figure.axes],
        [label for ax in figure.axes if (label := ax.get_ylabel())],
    )


@pytest.mark.parametrize(("count", "drawn"), [(1, 1), (4, 4), (9, N)])
def test_picture_is_as_large_as_promised_and_not_blank(folder: Path, clean: Tensor, count: int, drawn: int) -> None:
    path = write_comparison(folder, column="pgd_8", rows=["none", "blur"], clean=clean, classes=CLASSES, count=count)
    assert path == folder / "figure9_pgd_8.png"
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (int((TOP + SIDE * drawn) * DPI), int((LEFT + SIDE * 4) * DPI))
    inked = (picture[..., :3] < 0.95).any(axis=2)
    assert all(part.mean() > 0.3 for part in np.array_split(inked, 4, axis=1))


@pytest.mark.parametrize("clean_column", [False, True])
def test_images_decisions_and_ssim_are_those_stored(folder: Path, clean: Tensor, clean_column: bool) -> None:
    if clean_column:
        store(folder / "attacks" / "clean.npz", clean, decisions=np.full(N, 2))
    labels = torch.tensor([0, 0, 2, 0, 0])
    scenes, indices = stored_scenes(folder, column="pgd_8", rows=["blur"], clean=clean, labels=labels)
    figure = draw_comparison(scenes, count=2, classes=CLASSES, labels=labels, indices=indices)
    heads, decisions, ssim, names = words(figure)
    assert heads == ["clean", "attacked: PGD 8", "blur"]
    assert names == ["image 40", "image 41"]
    clean_decision = "great white shark, Ca… ✗" if clean_column else "cat ✓"
    assert decisions == [clean_decision, "cat ✓", "cat ✓", clean_decision, "dog ✗", "dog ✗"]
    with np.load(folder / "cells/pgd_8/blur.npz") as blur, np.load(folder / "cells/pgd_8/none.npz") as none:
        pairs = [(none["ssim"][i], blur["ssim"][i]) for i in range(2)]
        assert ssim == [text for pair in pairs for text in ("", *(f"SSIM {value:.3f}" for value in pair))]
        shown = np.asarray(figure.axes[5].images[0].get_array())
        assert shown == pytest.approx(blur["images"][1].transpose(1, 2, 0), abs=1e-6)


def test_ssim_stored_with_the_attack_goes_first(folder: Path, clean: Tensor) -> None:
    store(folder / "attacks" / "pgd_8.npz", clean, ssim=np.full(N, 0.25))
    scenes, _ = stored_scenes(folder, column="pgd_8", rows=["blur"], clean=clean)
    attacked = dict(scenes)["attacked: PGD 8"]
    assert attacked.ssim is not None
    assert attacked.ssim.tolist() == [0.25] * N
    assert torch.equal(attacked.images, clean)


def test_what_is_not_stored_is_left_out(clean: Tensor) -> None:
    ssim = torch.tensor([0.5, float("nan")])
    doubled = F.interpolate(clean, scale_factor=2)
    scenes = [("clean", Scene(clean)), ("clean", Scene(doubled, torch.tensor([2, 7]), ssim))]
    heads, decisions, ssim_shown, names = words(draw_comparison(scenes, count=2, classes=CLASSES))
    assert heads == ["clean", "clean"]
    assert decisions == ["", "great white shark, Ca…", "", "7"]
    assert ssim_shown == ["", "SSIM 0.500", "", ""]
    assert names == ["image 0", "image 1"]


def test_classes_without_names_are_numbers(clean: Tensor) -> None:
    figure = draw_comparison([("a", Scene(clean, torch.arange(N)))], count=2)
    assert words(figure)[1] == ["0", "1"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"column": "fgsm_8"}, FileNotFoundError, "`column` 'fgsm_8' has no stored result"),
        ({"rows": ["blur", "nrp"]}, FileNotFoundError, "row 'nrp' of column 'pgd_8' has no stored result"),
        ({"rows": []}, ValueError, "`rows` must name at least one"),
        ({"count": 0}, ValueError, "`count` must be at least 1"),
        ({"clean": torch.rand(3, 3, 24, 24)}, ValueError, "must hold 3 images, as many as `clean`"),
        ({"clean": torch.rand(N, 24, 24)}, ValueError, "`clean` must have 4 dimensions"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, "`labels` must have shape"),
    ],
)
def test_bad_arguments_are_named(
    folder: Path, clean: Tensor, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"column": "pgd_8", "rows": ["blur"], "clean": clean, "classes": CLASSES}
    with pytest.raises(error, match=message):
        write_comparison(folder, **(arguments | changes))
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"decisions": None}, "must hold `decisions`, it holds images"),
        ({"decisions": np.arange(2)}, "must hold 5 decisions"),
        ({"decisions": np.int64(1)}, "must hold 5 decisions"),
        ({"decisions": np.array(["a"] * N)}, "damaged"),
        ({"images": np.zeros((N, 3, 24, 24), dtype=np.uint8)}, "must be floats"),
        ({"images": np.full((N, 3, 24, 24), 7.0)}, r"must lie in \[0, 1\]"),
    ],
)
def test_files_of_another_kind_are_refused(folder: Path, clean: Tensor, arrays: dict[str, Any], message: str) -> None:
    store(folder / "cells" / "pgd_8" / "blur.npz", clean, **arrays)
    with pytest.raises((TypeError, ValueError), match=message):
        write_comparison(folder, column="pgd_8", rows=["blur"], clean=clean, classes=CLASSES)


def test_cut_file_is_damaged(folder: Path, clean: Tensor) -> None:
    path = folder / "attacks" / "pgd_8.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        write_comparison(folder, column="pgd_8", rows=["blur"], clean=clean, classes=CLASSES)


def test_real_images_and_defences(real_data: Path, tmp_path: Path) -> None:
    data = load_data("arrays", path=real_data / "cifar10" / "tune.npz", limit=2)
    rows = {}
    for row in ("none", "jpeg", "median"):
        images = build_defense(row, torch.nn.Flatten()).purify(data.images, indices=data.indices)
        rows[row] = quality(images, data.images)
        store(tmp_path / "cells" / "clean" / f"{row}.npz", images, ssim=rows[row].numpy())
    store(tmp_path / "attacks" / "clean.npz", data.images)
    path = write_comparison(
        tmp_path, column="clean", rows=list(rows), clean=data.images, classes=data.classes, labels=data.labels
    )
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (int((TOP + SIDE * 2) * DPI), int((LEFT + SIDE * 4) * DPI))
    assert 0.5 < float(rows["jpeg"].mean()) < 1
