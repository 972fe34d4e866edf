"""Pictures side by side: the grid, and the panel with its amplified difference."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from dipguard.reporting import canvas
from dipguard.reporting.canvas import Picture, amplification, class_name, draw_grid, draw_panel, save_figure

HOSTILE = r"$\bad{$"


@pytest.mark.parametrize("count", [1, 3])
def test_grid_is_as_large_as_promised_and_not_blank(tmp_path: Path, count: int) -> None:
    rows = {f"image {i}": [Picture(torch.rand(3, 24, 24), "cat")] * 3 for i in range(count)}
    picture = matplotlib.image.imread(save_figure(draw_grid(["a", "b", "c"], rows), tmp_path / "a.png"))
    height, width = canvas.TOP + canvas.TALL * count, canvas.LEFT + canvas.WIDE * 3
    assert picture.shape[:2] == pytest.approx((height * canvas.DPI, width * canvas.DPI), abs=1)
    inked = (picture[..., :3] < 0.95).any(axis=2)
    assert all(part.mean() > 0.3 for part in np.array_split(inked, 3, axis=1))


def test_grid_shows_images_decisions_and_captions() -> None:
    images = torch.rand(2, 3, 24, 24)
    rows = {
        "image 40": [Picture(images[0], "cat", True, "SSIM 0.900"), Picture(images[1], "dog", False)],
        "image 41": [Picture(images[1], "dog"), Picture(images[0], "great white shark, Carcharodon carcharias")],
    }
    figure = draw_grid(["clean", "a head that is too long for its column"], rows)
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["clean", "a head that is too lo…"]
    assert [ax.get_title() for ax in figure.axes] == ["cat ✓", "dog ✗", "dog", "great white shark, Ca…"]
    assert [ax.get_xlabel() for ax in figure.axes] == ["SSIM 0.900", "", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes[::2]] == list(rows)
    assert np.asarray(figure.axes[1].images[0].get_array()) == pytest.approx(images[1].permute(1, 2, 0).numpy())


def test_names_that_look_like_formulas_are_drawn_as_they_are(tmp_path: Path) -> None:
    picture = Picture(torch.rand(3, 16, 16), HOSTILE, caption=HOSTILE)
    figure = draw_grid([HOSTILE], {HOSTILE: [picture]})
    figure.suptitle(HOSTILE)
    figure.axes[0].plot([0, 1], label=HOSTILE)
    figure.legend()
    figure.axes[0].set_xticks([0, 1], [HOSTILE, HOSTILE])
    assert save_figure(figure, tmp_path / "a.png").is_file()


@pytest.mark.parametrize(("size", "factor"), [(0.6, 1), (0.3, 1), (0.2, 2), (0.04, 10), (0.001, 50), (0.0, 50)])
def test_difference_is_amplified_as_far_as_it_fits(size: float, factor: int) -> None:
    assert amplification(torch.full((2, 3, 8, 8), -size)) == factor


@pytest.mark.parametrize("side", [16, 32])
def test_panel_shows_the_amplified_difference_also_to_a_reconstruction_of_another_size(side: int) -> None:
    given, rebuilt = torch.full((3, 16, 16), 0.5), torch.full((3, side, side), 0.46)
    pictures = (Picture(given, "a", True), Picture(given, "b", False), Picture(rebuilt, "a", True))
    figure = draw_panel({"one": pictures, "two": pictures})
    assert len(figure.axes) == 8
    shown = np.asarray(figure.axes[3].images[0].get_array())
    assert shown == pytest.approx(0.5 + 10 * 0.04, abs=1e-5)
    assert "difference × 10" in [text.get_text() for text in figure.axes[3].texts]


def test_classes_without_a_name_are_numbers() -> None:
    assert [class_name(number, ("cat", "dog")) for number in (1, 2, -1)] == ["dog", "2", "-1"]
