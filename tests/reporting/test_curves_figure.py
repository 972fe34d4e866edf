from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from dipguard.reporting import curves_figure
from dipguard.reporting.canvas import DPI, line_style
from dipguard.reporting.curves_figure import HEIGHT, LEGEND_WIDTH, PANEL_WIDTH, draw_curves
from dipguard.reporting.results import read_results
from tests.reporting import stored_run
from tests.reporting.stored_run import point

ROWS = ("none", "jpeg", "paper")
BUDGETS = (1, 5, 15)
QUERIES = (200, 1000, 2500)


def correct(row: str, eps: float, budget: float) -> int:
    """Right of 16: fewer with a stronger attack, more with a better defence."""
    return max(0, 15 - int(eps * budget ** (1 / 2) / (1 + ROWS.index(row))))


BPDA = [point("bpda", r, eps, b, correct(r, eps, b)) for r in ROWS for eps in (8, 2, 4) for b in reversed(BUDGETS)]
HSJ = [point("hopskipjump", r, e, q, correct(r, e, q / 99)) for r in ROWS for q in QUERIES for e in (0, 4, 25)]


def points(tmp_path: Path, lines: list[dict[str, Any]]) -> pd.DataFrame:
    return read_results(stored_run.write_results(tmp_path, lines))


def draw(points: pd.DataFrame) -> Figure:
    return draw_curves(points, {row: line_style(i) for i, row in enumerate(points["defense"].unique())})


def write_curves(folder: Path) -> list[Path]:
    return curves_figure.write_curves(folder, read_results(folder / "results.csv"))


def panels(figure: Figure) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """x and y of each marked line, by panel and then by row."""
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    styles = [line.get_color() for line in figure.legends[0].get_lines()]
    row_of = dict(zip(styles, names, strict=True))
    return {
        ax.get_title(): {
            row_of[line.get_color()]: (list(line.get_xdata()), list(line.get_ydata()))
            for line in ax.get_lines()
            if line.get_marker() not in ("None", "")
        }
        for ax in figure.axes
    }


def test_bpda_has_a_panel_an_eps_over_the_iterations(tmp_path: Path) -> None:
    shown = panels(draw(points(tmp_path, BPDA)))
    assert list(shown) == [f"ε = {eps}/255" for eps in (2, 4, 8)]
    for eps in (2, 4, 8):
        for row in ROWS:
            accuracies = [100 * correct(row, eps, budget) / 16 for budget in BUDGETS]
            assert shown[f"ε = {eps}/255"][row] == (list(BUDGETS), pytest.approx(accuracies))


def test_hopskipjump_has_a_panel_a_query_budget_over_eps(tmp_path: Path) -> None:
    figure = draw(points(tmp_path, HSJ))
    shown = panels(figure)
    assert list(shown) == [f"{queries} queries an image" for queries in QUERIES]
    for queries in QUERIES:
        accuracies = [100 * correct("jpeg", eps, queries / 99) / 16 for eps in (0, 4, 25)]
        assert shown[f"{queries} queries an image"]["jpeg"] == ([0, 4, 25], pytest.approx(accuracies))
    assert {ax.get_xlabel() for ax in figure.axes} == {"ε in levels of 255"}


def test_bands_are_the_stored_intervals(tmp_path: Path) -> None:
    figure = draw(points(tmp_path, BPDA))
    (band, *_) = figure.axes[2].collections
    ends = [line for line in BPDA if line["defense"] == "none" and line["eps_255"] == 8]
    drawn = band.get_paths()[0].vertices
    assert drawn[:, 1].min() == pytest.approx(100 * min(line["low"] for line in ends))
    assert drawn[:, 1].max() == pytest.approx(100 * max(line["high"] for line in ends))
    assert len(figure.axes[2].collections) == len(ROWS)


@pytest.mark.parametrize(("last", "caption"), [(16, "n = 16 images"), (30, "n = 16 to 30 images")])
def test_caption_tells_how_many_images(tmp_path: Path, last: int, caption: str) -> None:
    figure = draw(points(tmp_path, [*BPDA[:-1], point("bpda", "paper", 4, 1, 3, n=last)]))
    text = figure.get_supxlabel()
    assert text.startswith(caption)
    assert "95 % Wilson" in text
    assert "cifar10_resnet56" in figure.get_suptitle()


def test_both_figures_are_drawn_as_large_as_promised(tmp_path: Path) -> None:
    points(tmp_path, [line for line in BPDA + HSJ if line["defense"] == "jpeg"])
    paths = write_curves(tmp_path)
    assert [path.name for path in paths] == ["figure4_bpda.png", "figure5_hopskipjump.png"]
    for path in paths:
        picture = matplotlib.image.imread(path)
        assert picture.shape[:2] == (round(HEIGHT * DPI), round((3 * PANEL_WIDTH + LEGEND_WIDTH) * DPI))
        inked = (picture[..., :3] < 0.95).any(axis=2)
        assert inked.mean() > 0.05
        thirds = np.array_split(inked, 3, axis=1)
        assert all(third.mean() > 0.05 for third in thirds)


def test_each_victim_has_a_picture_of_its_own(tmp_path: Path) -> None:
    points(tmp_path, BPDA[:3] + [line | {"victim": "other"} for line in BPDA[:3]])
    assert [path.name for path in write_curves(tmp_path)] == ["figure4_bpda.png", "figure4_bpda_2.png"]


def test_attacks_whose_points_coincide_have_pictures_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = [line for line in BPDA if line["eps_255"] == 8] + [point("bpda", row, 8, 30, 1) for row in ROWS]
    lines = [line | {"attack": f"bpda_{line['eps_255']}"} for line in BPDA]
    points(tmp_path, lines + [line | {"attack": "slow"} for line in slow])
    drawn: list[pd.DataFrame] = []
    monkeypatch.setattr(curves_figure, "draw_curves", lambda members, styles: drawn.append(members) or Figure())
    assert [path.name for path in write_curves(tmp_path)] == ["figure4_bpda.png", "figure4_bpda_2.png"]
    assert [set(members["attack"]) for members in drawn] == [{"bpda_2", "bpda_4", "bpda_8"}, {"slow"}]


def test_single_point_has_an_interval_that_is_seen(tmp_path: Path) -> None:
    figure = draw(points(tmp_path, [point("bpda", "jpeg", 8, 15, 4)]))
    (ax,) = figure.axes
    assert panels(figure) == {"ε = 8/255": {"jpeg": ([15], [25.0])}}
    assert ax.collections[0].get_linewidth() > 0


def test_rows_stay_apart_however_many_and_however_long(tmp_path: Path) -> None:
    names = [f"a_row_with_a_rather_long_name_{i}" for i in range(20)]
    figure = draw(points(tmp_path, [point("bpda", name, 8, b, 4) for name in names for b in (1, 2)]))
    texts = figure.legends[0].get_texts()
    assert [len(text.get_text()) for text in texts] == [20] * 20
    assert len({tuple(line_style(i).items()) for i in range(20)}) == 20


def test_nothing_is_drawn_without_points(tmp_path: Path) -> None:
    points(tmp_path, [])
    assert write_curves(tmp_path) == []
