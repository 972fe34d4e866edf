"""train.py from end to end: real data, victim, attack and fit, only small."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from dipguard.cli.programs import train
from dipguard.data import load_data
from dipguard.decision import DecisionTrace
from dipguard.evaluation.plan import prepare
from dipguard.victims import build_victim
from tests.csv_files import read_csv
from tests.sweeps.tiny_sweep import environment
from tests.tiny_run import ROOT, TINY, compose_config, tiny_run, typed_config

MIRROR = (
    "defense=mirror", "defense.networks=[small,small,small]", "defense.T=20", "defense.t0=5", "defense.every=5",
    "data.limit=3", "attack.steps=2",
)  # fmt: skip
"""Overrides of a short run with the default defence; those of the paper's are left out."""


def tiny_mirror(folder: Path, *overrides: str) -> dict[str, Any]:
    kept = [override for override in TINY if not override.startswith(("defense", "data.limit"))]
    return train(compose_config(*kept, *MIRROR, *overrides), folder)


def rows(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "images.csv")


def traces(folder: Path) -> list[Path]:
    return sorted((folder / "traces").rglob("*.safetensors"))


def times(paths: list[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in paths}


def entries(folder: Path, layer: str) -> list[Path]:
    return sorted((folder / "store" / layer).rglob("*.npz"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run on one thread, which rounds as the subprocess below does."""
    folder = tmp_path_factory.mktemp("train") / "finished"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    metrics = tiny_run(folder)
    torch.set_num_threads(threads)
    return folder, metrics


def test_run_folder_holds_what_is_promised(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert set(metrics) == {
        "n", "accuracy", "ssim", "crossings_stitched", "images_without", "seconds", "images_per_second", "settings"
    }  # fmt: skip
    assert set(metrics["ssim"]) == {"given", "defended"}
    assert metrics["settings"]["defenses"]["paper"]["T"] == 40
    table = rows(folder)
    assert list(table[0]) == [
        "attack", "defense", "eps_255", "budget", "index", "label", "decision_clean", "decision_given",
        "decision_defended", "ssim_given", "ssim", "psnr", "used", "why",
    ]  # fmt: skip
    assert [row["index"] for row in table] == ["0", "1", "2", "3"]
    assert metrics["n"] == len(table) == 4
    with np.load(folder / "reconstructions.npz") as saved:
        assert (saved["images"].shape, saved["images"].dtype) == ((4, 3, 32, 32), np.dtype("float32"))
        assert saved["indices"].tolist() == [0, 1, 2, 3]
    assert [DecisionTrace.load(path).index for path in traces(folder)] == [0, 1, 2, 3]
    assert {path.name for path in (folder / "figures").iterdir()} == {"panel.png", "trace_000000.png"}
    assert OmegaConf.load(folder / "config.yaml").defense.tau == 0.2
    assert "figures/panel.png" in (folder / "report.md").read_text()


def test_metrics_are_those_of_the_table(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    table = rows(folder)
    for name, column in (("clean", "clean"), ("undefended", "given"), ("defended", "defended")):
        right = [row[f"decision_{column}"] == row["label"] for row in table]
        assert metrics["accuracy"][name] == sum(right) / len(right)
    assert metrics["crossings_stitched"] == sum(int(row["used"]) for row in table) / len(table)
    assert metrics["ssim"]["given"] == pytest.approx(np.mean([float(row["ssim_given"]) for row in table]), abs=1e-6)
    assert all((row["why"] == "crossings") == (int(row["used"]) > 0) for row in table)
    assert metrics["crossings_stitched"] > 0, "no crossing counted: this run shows nothing of the stitching"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=str)
def test_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]], number: int, code: int
) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), f"hydra.run.dir={folder}", *TINY]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 600
    while not entries(folder, "cells") and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(number)
    text = process.communicate()[0].decode()
    assert process.returncode == code, text
    assert "Traceback" not in text
    assert "finished work is kept" in text
    (first,) = entries(folder, "cells")  # the first chunk of two, or else the kill came too late
    assert [path.stem for path in traces(folder)][:2] == ["000000", "000001"], text
    before, made = times(traces(folder)[:2]), first.stat().st_mtime_ns

    torch.set_num_threads(1)
    metrics = tiny_run(folder)

    after = times(traces(folder))
    assert list(after) == [f"{i:06d}.safetensors" for i in range(4)]
    assert {name: after[name] for name in before} == before
    for mine, theirs in zip(traces(folder), traces(finished[0]), strict=True):
        assert DecisionTrace.load(mine).equals(DecisionTrace.load(theirs))
    assert (folder / "images.csv").read_bytes() == (finished[0] / "images.csv").read_bytes()
    with np.load(folder / "reconstructions.npz") as mine, np.load(finished[0] / "reconstructions.npz") as theirs:
        assert np.array_equal(mine["images"], theirs["images"])
    assert metrics["accuracy"] == finished[1]["accuracy"]
    assert made == first.stat().st_mtime_ns, "the chunk of the first session must be used"


@pytest.fixture
def copied(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """The finished run in a folder of its own; files keep their times."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


ONE = ("data.limit=1", "figures=0", "defense.T=20", "defense.decisions=10")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of one image."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, tiny_run(folder, *ONE)


@pytest.mark.parametrize("override", ["defense.tau=0.5", "attack=fgsm"])
def test_other_settings_in_the_same_folder_are_run_and_the_earlier_ones_are_kept(
    one: tuple[Path, dict[str, Any]], tmp_path: Path, override: str
) -> None:
    folder, metrics = Path(shutil.copytree(one[0], tmp_path / "run")), one[1]
    before = entries(folder, "cells")
    other = tiny_run(folder, *ONE, override)
    assert len(entries(folder, "cells")) == 2 * len(before)
    assert other["settings"] != metrics["settings"]
    assert other["settings"] == json.loads((folder / "metrics.json").read_text())["settings"]
    again = tiny_run(folder, *ONE)
    # The traces in the folder were the other run's, and are made again.
    timings = {name: again[name] for name in ("seconds", "images_per_second")}
    assert again == {**metrics, **timings}
    assert len(entries(folder, "cells")) == 2 * len(before)


def test_seed_and_weights_are_part_of_a_cells_key(tmp_path: Path) -> None:
    state = build_victim("digits_cnn").network.state_dict()
    state["10.bias"] = state["10.bias"] + 0.01
    torch.save(state, tmp_path / "other.pt")
    changes = ((), ("seed=1",), (f"victim.weights={tmp_path / 'other.pt'}",))
    keys = {prepare(typed_config(*TINY, *change), tmp_path).cells[0].key for change in changes}
    assert len(keys) == 3


def test_settings_that_no_result_depends_on_may_change(finished: tuple[Path, dict[str, Any]], copied: Path) -> None:
    made = entries(copied, "cells")
    again = tiny_run(copied, "chunk=7", "logger=csv", "keep_traces=false")
    assert again["accuracy"] == finished[1]["accuracy"]
    assert entries(copied, "cells") == made
    assert (copied / "figures" / "trace_000000.png").exists()


def test_no_attack_and_a_defence_without_a_fit(tmp_path: Path) -> None:
    kept = [override for override in TINY if not override.startswith("defense")]
    metrics = train(compose_config(*kept, "attack=none", "defense=jpeg", "data.limit=1"), tmp_path / "run")
    assert list(metrics["settings"]["attacks"]) == ["none"]
    assert metrics["settings"]["defense"]["name"] == "jpeg"
    assert metrics["ssim"]["given"] == pytest.approx(1)
    assert (tmp_path / "run" / "figures" / "panel.png").is_file()


def test_an_adaptive_attack_is_an_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dipguard.evaluation.runner._share_out", pytest.fail)  # there is nothing to share
    overrides = ("attack=bpda", "attack.steps=1", "data.limit=1", "figures=0", "defense.T=10", "defense.decisions=5")
    metrics = tiny_run(tmp_path / "run", *overrides, "processes=2")
    assert list(metrics["settings"]["attacks"]) == ["bpda"]
    (row,) = read_csv(tmp_path / "run" / "results.csv")
    assert int(row["purifications"]) > 0
    assert int(row["dip_steps"]) == 10 * int(row["purifications"])


def test_train_has_one_attack_and_one_defence(tmp_path: Path) -> None:
    with pytest.raises(CompactHydraException, match=r"train.py has one `defense`, and no `defenses`"):
        tiny_run(tmp_path / "run", "+defense@defenses.jpeg=jpeg")
    assert not (tmp_path / "run").exists()


def digits_file(path: Path, **changes: Any) -> Path:
    digits = load_data("digits", limit=3)
    images = (digits.images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    np.savez(path, **{"images": images, "labels": digits.labels.numpy(), **changes})
    return path


@pytest.mark.slow
def test_own_pictures(tmp_path: Path) -> None:
    from PIL import Image

    with np.load(digits_file(tmp_path / "own.npz")) as saved:
        pictures, labels = saved["images"], saved["labels"]
    lines = ["file,class"]
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        lines.append(f"{number},{label + 1}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    columns = ("data.image_column=file", "data.label_column=class", "data.label_base=1")
    csv_file = f"data.labels_csv={tmp_path / 'labels.csv'}"
    overrides = ("data=image_folder", f"data.path={tmp_path}", csv_file, *columns, "data.size=32", "data.limit=2")
    tiny_run(tmp_path / "run", *overrides, "figures=0")
    assert [row["label"] for row in rows(tmp_path / "run")] == [str(label) for label in labels[:2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0, 1, 12])}, "`labels` must be at least 0 and below 10, got labels from 0 to 12"),
        ({"images": np.full((3, 32, 32, 3), 0.5, dtype=np.float32)}, "must be uint8"),
        ({"images": np.zeros((3, 8, 8, 3), np.uint8)}, "`victim` cannot read images of 8x8 .* .give `data.size`"),
        ({"images": np.zeros((3, 48, 48, 3), np.uint8)}, "cannot read images of 48x48 pixels; it was made for 32x32"),
    ],
    ids=["label-12", "floats", "too-small", "too-large"],
)
def test_bad_data_file_is_refused_before_anything_runs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = digits_file(tmp_path / "own.npz", **changes)
    with pytest.raises(CompactHydraException, match=message):
        tiny_run(tmp_path / "run", "data=arrays", f"data.path={path}", "data.limit=null")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=arrays"], "`data.path` must name a .npz file"),
        (["data.limit=0"], "`data.limit` must be at least 1, got 0"),
        (["data.offset=599"], "`data.offset` must be below the number of images, 599, got 599"),
        (["victim.weights=nowhere.pt"], "nowhere.pt"),
        (["victim=cifar10_resnet50"], "weights"),
        (["+attack.number=1"], "`attack.number` is for attack suites, which evaluate.py runs"),
        (["attack.eps_255=300"], "`attack.eps_255` must be"),
        (["defense.tau=-0.1"], "`defense.tau` must be from 0 to 1"),
        (["defense.K_max=5"], "`defense.K_max` must be at least 15, got 5"),
        (["defense.network=imagenet"], "`images` must be at least"),
        (["trainer.accelerator=abacus"], "`trainer.accelerator` must be one of auto, cpu, gpu"),
    ],
)
def test_bad_setting_is_refused_before_anything_runs(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(CompactHydraException) as caught:
        tiny_run(tmp_path / "run", *overrides)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_real_images_and_weights(real_data: Path, tmp_path: Path) -> None:
    overrides = ("data=arrays", f"data.path={real_data / 'cifar10' / 'tune.npz'}", "data.limit=4", "figures=0")
    weights = f"victim.weights={real_data / 'weights' / 'resnet20-12fca82f.th'}"
    metrics = tiny_run(tmp_path / "run", *overrides, "victim=cifar10_resnet20", weights)
    assert metrics["accuracy"]["clean"] == 1.0
    assert metrics["accuracy"]["undefended"] == 0.0


@pytest.fixture(scope="module")
def finished_mirror(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mirror") / "run"
    return folder, tiny_mirror(folder, "logger=csv")


def test_figures_log_and_page_of_the_default_defence(finished_mirror: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished_mirror
    assert {path.name for path in (folder / "figures").iterdir()} == {"panel.png", "trace_000000.png"}
    assert "defence `mirror` (60 DIP steps an image)" in (folder / "report.md").read_text()
    lines = [line for line in read_csv(folder / "logs/csv/session_0/metrics.csv") if line["fit/quality"]]
    # Two chunks of three fits of 20 steps each; a window's mean stands at its last step.
    ends = [20 * fit + end for fit in range(6) for end in (9, 14, 19)]
    assert [int(line["step"]) for line in lines] == ends
    assert DecisionTrace.load(traces(folder)[0]).steps.tolist() == ends[:9]
