"""train.py with our own defence, which is its default, from end to end."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import CompactHydraException

import train
from dipguard.data import load_data
from dipguard.decision import DecisionTrace
from dipguard.defenses import build_defense
from dipguard.evaluation.metrics import decide
from dipguard.victims import build_victim
from tests.tiny_run import compose_config

SHORT = (
    "data.limit=3",
    "attack.options.steps=2",
    "defense.T=20",
    "defense.t0=5",
    "defense.every=5",
    "fit.stack_size=2",
    "report.figures=1",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
)


def run(folder: Path, *overrides: str) -> dict:
    return train.run(compose_config(*SHORT, *overrides), folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("own") / "run"
    return folder, run(folder)


def test_it_gives_what_the_row_gives(finished: tuple[Path, dict]) -> None:
    folder, metrics = finished
    victim = build_victim("digits_cnn", seed=0)
    with np.load(folder / "given.npz") as saved:
        given = torch.from_numpy(saved["images"])
    row = build_defense("dipguard", victim, T=20, t0=5, every=5, mirror=False, stack_size=2, progress=False)
    purified = row.purify(given, indices=torch.arange(3))
    with np.load(folder / "reconstructions.npz") as saved:
        (name,) = [name for name in saved.files if saved[name].shape == (3, 3, 32, 32)]
        assert np.array_equal(saved[name], purified.numpy())
    labels = load_data("digits", limit=3).labels
    assert metrics["accuracy"]["defended"] == float((decide(victim, purified) == labels).double().mean())
    assert metrics["settings"]["guard"]["name"] == "dipguard"
    assert metrics["settings"]["guard"]["mirror"] is False  # the digits say so
    with (folder / "images.csv").open(newline="") as file:
        assert {line["why"] for line in csv.DictReader(file)} <= {"evidence", "no_reader"}


def test_its_figures_log_and_page_are_there(finished: tuple[Path, dict]) -> None:
    folder, _ = finished
    assert {path.name for path in (folder / "figures").iterdir()} == {"panel.png", "trace_000000.png"}
    assert "2 networks, T = 20 each" in (folder / "report.md").read_text()
    with next((folder / "logs" / "csv").glob("*/metrics.csv")).open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["fit/quality"]]
    # Two stacks of two fits of 20 steps each; a window's mean stands at its last step.
    assert [int(line["step"]) for line in lines] == [9, 14, 19, 29, 34, 39, 49, 54, 59, 69, 74, 79]
    trace = DecisionTrace.load(folder / "traces" / "000000.safetensors")
    assert trace.steps.tolist() == [9, 14, 19, 29, 34, 39]


def test_a_continued_run_fits_only_what_is_missing(tmp_path: Path) -> None:
    whole = run(tmp_path / "run")
    traces = sorted((tmp_path / "run" / "traces").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in traces}
    traces[2].unlink()
    again = run(tmp_path / "run")
    after = {path.name: path.stat().st_mtime_ns for path in traces}
    assert [name for name in before if before[name] != after[name]] == ["000002.safetensors"]
    assert (again["accuracy"], again["ssim"]) == (whole["accuracy"], whole["ssim"])


def test_images_too_small_for_its_networks_are_refused_at_the_door(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, images=np.zeros((3, 8, 8, 3), dtype=np.uint8), labels=np.zeros(3, dtype=np.int64))
    with pytest.raises(CompactHydraException, match="at least 9x9 pixels"):
        run(tmp_path / "run", "data=arrays", f"data.path={path}")
    assert not (tmp_path / "run").exists()
