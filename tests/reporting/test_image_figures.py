"""The comparison of reconstructions (Figure 9)."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from dipguard.data import load_data
from dipguard.decision import quality
from dipguard.defenses import build_defense
from dipguard.reporting.canvas import DPI, save_figure
from dipguard.reporting.image_figures import LEFT, SIDE, TOP, Scene, draw_comparison

CLASSES = ("cat", "dog", "great white shark, Carcharodon carcharias")
N = 5


@pytest.fixture
def clean() -> Tensor:
    """Smooth colour images."""
    return F.interpolate(torch.rand(N, 3, 5, 5), size=(24, 24), mode="bilinear")


@pytest.fixture
def scenes(clean: Tensor) -> list[tuple[str, Scene]]:
    """One attack by noise, undefended and blurred."""
    attacked = (clean + 0.1 * torch.randn_like(clean).sign()).clamp(0, 1)
    blurred = F.avg_pool2d(attacked, 3, stride=1, padding=1, count_include_pad=False)
    decisions = torch.arange(N) % 3
    return [
        ("clean", Scene(clean, torch.full((N,), 2))),
        ("attacked: PGD 8", Scene(attacked, decisions, quality(attacked, clean))),
        ("blur", Scene(blurred, decisions, quality(blurred, clean))),
    ]


def words(figure: Figure) -> tuple[list[str], list[str], list[str], list[str]]:
    """Heads, decisions, SSIM and names of the rows."""
    heads = [text.get_text() for ax in figure.axes for text in ax.texts]
    return (
        heads,
        [ax.get_title() for ax in figure.axes],
        [ax.get_xlabel() for ax in figure.axes],
        [label for ax in figure.axes if (label := ax.get_ylabel())],
    )


@pytest.mark.parametrize("count", [1, 4])
def test_picture_is_as_large_as_promised_and_not_blank(
    scenes: list[tuple[str, Scene]], tmp_path: Path, count: int
) -> None:
    path = save_figure(draw_comparison(scenes, count=count, classes=CLASSES), tmp_path / "a.png")
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (int((TOP + SIDE * count) * DPI), int((LEFT + SIDE * 3) * DPI))
    inked = (picture[..., :3] < 0.95).any(axis=2)
    assert all(part.mean() > 0.3 for part in np.array_split(inked, 3, axis=1))


def test_images_decisions_and_ssim_are_those_given(scenes: list[tuple[str, Scene]]) -> None:
    labels, indices = torch.tensor([0, 0, 2, 0, 0]), torch.arange(N) + 40
    figure = draw_comparison(scenes, count=2, classes=CLASSES, labels=labels, indices=indices)
    heads, decisions, ssim, names = words(figure)
    assert heads == ["clean", "attacked: PGD 8", "blur"]
    assert names == ["image 40", "image 41"]
    wrong = "great white shark, Ca… ✗"
    assert decisions == [wrong, "cat ✓", "cat ✓", wrong, "dog ✗", "dog ✗"]
    pairs = [[scene.ssim[i] for _, scene in scenes[1:] if scene.ssim is not None] for i in range(2)]
    assert ssim == [text for pair in pairs for text in ("", *(f"SSIM {value:.3f}" for value in pair))]
    shown = np.asarray(figure.axes[5].images[0].get_array())
    assert shown == pytest.approx(scenes[2][1].images[1].permute(1, 2, 0).numpy(), abs=1e-6)


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


def test_real_images_and_defences(real_data: Path, tmp_path: Path) -> None:
    data = load_data("arrays", path=real_data / "cifar10" / "tune.npz", limit=2)
    scenes = [("clean", Scene(data.images))]
    for name in ("none", "jpeg", "median"):
        images = build_defense(name, torch.nn.Flatten()).purify(data.images, indices=data.indices)
        scenes.append((name, Scene(images, ssim=quality(images, data.images))))
    figure = draw_comparison(scenes, count=2, classes=data.classes, labels=data.labels)
    picture = matplotlib.image.imread(save_figure(figure, tmp_path / "a.png"))
    assert picture.shape[:2] == (int((TOP + SIDE * 2) * DPI), int((LEFT + SIDE * 4) * DPI))
    assert 0.5 < float(scenes[2][1].ssim.mean()) < 1
