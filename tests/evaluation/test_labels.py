"""Folders whose classes are not numbered as the victim numbers them, and labels that are off by one."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import nn

from dipguard.data import ImageSet, load_data
from dipguard.evaluation import plan
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.plan import prepare
from tests.tiny_matrix import TINY, typed_matrix


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_data("digits", limit=60)


def _saved(digits: ImageSet, folder: Path, name: Callable[[int], str], *, classes: tuple[int, ...]) -> list[int]:
    labels = []
    for number, (image, label) in enumerate(zip(digits.images, digits.labels.tolist(), strict=True)):
        if label in classes:
            file = folder / f"{name(label)}{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(file)
            labels.append(label)
    return labels


def _prepared(folder: Path, *overrides: str) -> Matrix:
    config = typed_matrix(*TINY)
    leave = [f"~attacks.{label}" for label in config.attacks if label != "clean"]
    leave += [f"~defenses.{label}" for label in config.defenses if label != "none"]
    kept = [text for text in TINY if not text.startswith(("data", "defenses."))]
    data = ("data=image_folder", f"data.path={folder}", "data.size=32", *overrides)
    return prepare(typed_matrix(*kept, *leave, *data), folder.parent / "run")


@pytest.mark.parametrize("prefix", ["", "00"])
def test_folders_are_named_by_the_victims_classes(digits: ImageSet, tmp_path: Path, prefix: str) -> None:
    labels = _saved(digits, tmp_path / "dig", lambda label: f"{prefix}{label}/", classes=(3, 7))
    matrix = _prepared(tmp_path / "dig")
    assert sorted(matrix.clean.labels.tolist()) == sorted(labels)
    (target,) = matrix.targets.values()
    assert (target.decisions_clean == matrix.clean.labels).float().mean() > 0.9


def test_folders_of_other_names_are_refused(digits: ImageSet, tmp_path: Path) -> None:
    _saved(digits, tmp_path / "dig", lambda label: f"digit {label}/", classes=(3, 7))
    with pytest.raises(ValueError, match=r"`data`: of the 2 classes of dig, .* several, of the name 'digit 3'"):
        _prepared(tmp_path / "dig")


@pytest.mark.parametrize("base", [0, 1])
def test_labels_that_count_from_one_are_noticed(digits: ImageSet, tmp_path: Path, base: int) -> None:
    labels = _saved(digits, tmp_path / "dig", lambda _: "", classes=tuple(range(9)))
    files = sorted((tmp_path / "dig").iterdir())
    lines = [f"{file.stem},{label + 1}" for file, label in zip(files, labels, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *lines]))
    options = (f"data.labels_csv={tmp_path / 'labels.csv'}", f"data.label_base={base}")
    if base == 0:
        with pytest.warns(UserWarning, match="if all labels were one lower: look at `data.label_base`"):
            _prepared(tmp_path / "dig", *options)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _prepared(tmp_path / "dig", *options)


def test_a_baseline_with_other_classes_is_refused(
    digits: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saved(digits, tmp_path / "dig", lambda label: f"{label}/", classes=(3, 7))
    _prepared(tmp_path / "dig", "victim@baseline=digits_cnn")
    build = plan.build_victim

    def turned(name: str, **options: Any) -> nn.Module:
        victim = build(name, **options)
        if options.get("seed") == 5:
            victim.classes = victim.classes[::-1]
        return victim

    monkeypatch.setattr(plan, "build_victim", turned)
    with pytest.raises(ValueError, match="`baseline` must have the classes of `victim` in the same order"):
        _prepared(tmp_path / "dig", "victim@baseline=digits_cnn", "baseline.seed=5")
