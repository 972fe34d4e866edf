"""train.py from end to end: real data, victim, attack and fit, only small."""

from __future__ import annotations

import csv
import json
import os
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

from dipguard.data import load_data
from dipguard.decision import DecisionTrace
from tests.tiny_run import ROOT, TINY, tiny_run


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), f"hydra.run.dir={folder}", *TINY, *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "images.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / "traces").iterdir())}


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
    assert set(metrics) == {"n", "accuracy", "ssim", "crossings", "seconds", "images_per_second", "settings"}
    assert set(metrics["accuracy"]) == {"clean", "undefended", "defended"}
    assert set(metrics["ssim"]) == {"given", "defended"}
    assert set(metrics["seconds"]) == {"attack", "start", "fit", "decide"}
    assert metrics["settings"]["defense"]["T"] == 40
    table = rows(folder)
    assert list(table[0]) == [
        "index",
        "label",
        "decision_clean",
        "decision_given",
        "decision_defended",
        "ssim_given",
        "ssim_defended",
        "crossings_used",
        "why",
    ]
    assert [row["index"] for row in table] == ["0", "1", "2", "3"]
    assert metrics["n"] == len(table) == 4
    with np.load(folder / "reconstructions.npz") as saved:
        assert (saved["images"].shape, saved["images"].dtype) == ((4, 3, 32, 32), np.dtype("float32"))
        assert saved["indices"].tolist() == [0, 1, 2, 3]
    assert [DecisionTrace.load(path).index for path in sorted((folder / "traces").iterdir())] == [0, 1, 2, 3]
    assert {path.name for path in (folder / "figures").iterdir()} == {"panel.png", "trace_000000.png"}
    assert OmegaConf.load(folder / "config.yaml").defense.tau == 0.2
    assert "figures/panel.png" in (folder / "report.md").read_text()


def test_metrics_are_those_of_the_table(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    table = rows(folder)
    for name, column in (("clean", "clean"), ("undefended", "given"), ("defended", "defended")):
        right = [row[f"decision_{column}"] == row["label"] for row in table]
        assert metrics["accuracy"][name] == sum(right) / len(right)
    assert metrics["crossings"] == sum(int(row["crossings_used"]) for row in table) / len(table)
    assert metrics["ssim"]["given"] == pytest.approx(np.mean([float(row["ssim_given"]) for row in table]), abs=1e-6)
    assert all((row["why"] == "crossings") == (int(row["crossings_used"]) > 0) for row in table)
    assert metrics["crossings"] > 0, "no crossing counted: this run shows nothing of the stitching"


def test_attack_fools_the_victim_within_its_bound(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    clean = load_data("digits", limit=4)
    with np.load(folder / "given.npz") as saved:
        change = np.abs(saved["images"] - clean.images.numpy()).max()
    assert change == pytest.approx(8 / 255, abs=1e-5)
    assert metrics["accuracy"]["undefended"] < metrics["accuracy"]["clean"]


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(folder), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    fits = folder / "fits.json"
    end = time.monotonic() + 120
    while not fits.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    text = process.communicate()[0].decode()
    assert fits.exists(), text
    done = json.loads(fits.read_text())
    assert sorted(done) == ["0", "1"], f"the kill came too late: {text}"
    before = written(folder)

    torch.set_num_threads(1)
    metrics = tiny_run(folder)

    after = written(folder)
    assert list(after) == [f"{i:06d}.safetensors" for i in range(4)]
    assert all(after[f"{i:06d}.safetensors"] == before[f"{i:06d}.safetensors"] for i in (0, 1))
    for name in after:
        assert DecisionTrace.load(folder / "traces" / name).equals(DecisionTrace.load(finished[0] / "traces" / name))
    assert (folder / "images.csv").read_bytes() == (finished[0] / "images.csv").read_bytes()
    with np.load(folder / "reconstructions.npz") as mine, np.load(finished[0] / "reconstructions.npz") as theirs:
        assert np.array_equal(mine["images"], theirs["images"])
    assert metrics["accuracy"] == finished[1]["accuracy"]
    first = sum(done[index]["fit"] for index in done)
    assert metrics["seconds"]["fit"] > first, "the seconds of the first session must count"


def test_finished_run_does_nothing_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    metrics = tiny_run(folder, "data.limit=2", "report.figures=0")
    traces, given = written(folder), (folder / "given.npz").stat().st_mtime_ns
    assert tiny_run(folder, "data.limit=2", "report.figures=0") == metrics
    assert (written(folder), (folder / "given.npz").stat().st_mtime_ns) == (traces, given)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_trace_is_fitted_again(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "run"
    overrides = ("data.limit=2", "fit.stack_size=1", "report.figures=0")
    tiny_run(folder, *overrides)
    path = folder / "traces" / "000001.safetensors"
    content = path.read_bytes()
    whole = DecisionTrace.load(path)
    # A new file, since `whole` is mapped from the old one.
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 0x40]) + content[-4:])
    before = written(folder)
    tiny_run(folder, *overrides)
    after = written(folder)
    assert after["000000.safetensors"] == before["000000.safetensors"]
    assert DecisionTrace.load(path).equals(whole)


def test_damaged_attack_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = ("data.limit=1", "report.figures=0")
    tiny_run(folder, *overrides)
    path, traces = folder / "given.npz", written(folder)
    with np.load(path) as saved:
        images = saved["images"]
    path.write_bytes(path.read_bytes()[:1000])
    tiny_run(folder, *overrides)
    with np.load(path) as saved:
        assert np.array_equal(saved["images"], images)
    assert written(folder) == traces, "the attack is seeded: the traces still belong to its images"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("defense.tau=0.5", "defense.tau: 0.2 there, 0.5 now"),
        ("seed=1", "seed: 0 there, 1 now"),
        ("attack=fgsm", "attack.name: pgd there, fgsm now"),
        ("data.offset=1", "data.content"),
        ("victim.options.seed=1", "victim.content"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    finished: tuple[Path, dict[str, Any]], override: str, named: str
) -> None:
    before = written(finished[0])
    with pytest.raises(CompactHydraException, match="holds a run with other settings") as caught:
        tiny_run(finished[0], override)
    assert named in str(caught.value)
    assert written(finished[0]) == before


def test_settings_that_no_result_depends_on_may_change(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    metrics = tiny_run(folder, "data.limit=1", "report.figures=0")
    again = tiny_run(folder, "data.limit=1", "report.figures=1", "fit.stack_size=7", "logger=csv")
    assert again["accuracy"] == metrics["accuracy"]
    assert (folder / "figures" / "trace_000000.png").exists()


@pytest.mark.parametrize("attack", ["none", "fgsm", "cw"])
def test_other_attacks(tmp_path: Path, attack: str) -> None:
    metrics = tiny_run(tmp_path / "run", f"attack={attack}", "data.limit=2", "report.figures=0")
    assert metrics["settings"]["attack"]["settings"]["name"] == attack
    assert (metrics["ssim"]["given"] == pytest.approx(1)) == (attack == "none")


def digits_file(path: Path, **changes: Any) -> Path:
    digits = load_data("digits", limit=3)
    images = (digits.images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    np.savez(path, **{"images": images, "labels": digits.labels.numpy(), **changes})
    return path


def test_own_arrays(tmp_path: Path) -> None:
    path = digits_file(tmp_path / "own.npz")
    metrics = tiny_run(tmp_path / "run", "data=arrays", f"data.path={path}", "data.limit=2", "report.figures=0")
    assert metrics["n"] == 2


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
    tiny_run(tmp_path / "run", *overrides, "report.figures=0")
    assert [row["label"] for row in rows(tmp_path / "run")] == [str(label) for label in labels[:2]]


BAD_FILES: dict[str, dict[str, Any]] = {
    "labels": {"labels": np.array([0, 1, 12])},
    "range": {"images": np.full((3, 32, 32, 3), 0.5, dtype=np.float32)},
    "rank": {"images": np.zeros((3, 32, 32), dtype=np.uint8)},
    "small": {"images": np.zeros((3, 8, 8, 3), dtype=np.uint8)},
    "size": {"images": np.zeros((3, 48, 48, 3), dtype=np.uint8)},
    "empty": {"images": np.zeros((0, 32, 32, 3), dtype=np.uint8), "labels": np.zeros(0, dtype=np.int64)},
}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("labels", "`labels` must be at least 0 and below 10, got labels from 0 to 12"),
        ("range", "must be uint8"),
        ("rank", r"must have shape \[N, H, W, 3\]"),
        ("small", "`images` must be at least 9x9 pixels"),
        ("size", "`victim` digits_cnn cannot read images of 48x48 pixels"),
        ("empty", "with N >= 1"),
    ],
)
def test_bad_data_file_is_refused_before_anything_runs(tmp_path: Path, case: str, message: str) -> None:
    path = digits_file(tmp_path / "own.npz", **BAD_FILES[case])
    with pytest.raises(CompactHydraException, match=message):
        tiny_run(tmp_path / "run", "data=arrays", f"data.path={path}", "data.limit=null")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=arrays"], "`data.path` must name a .npz file"),
        (["data=arrays", "data.path=nowhere.npz"], "`data.path` must name an existing .npz file, got nowhere.npz"),
        (["data=image_folder"], "`data.path` must name a folder"),
        (["data=image_folder", "data.path=nowhere"], "`data.path` must name an existing folder"),
        (["data.path=x"], "`data.path` must be empty for the data set 'digits'"),
        (["data.offset=599"], "`data.offset` must be below the number of images, 599, got 599"),
        (["data.labels_csv=x.csv"], "takes no option 'labels_csv'"),
        (["victim.weights=nowhere.pt"], "nowhere.pt"),
        (["victim=cifar10_resnet50"], "weights"),
        (["attack.options.steps=0"], "`attack.options.steps` must be at least 1"),
        (["attack=cw", "attack.eps_255=8"], "takes no option 'eps_255'"),
        (["defense.K=0"], "`defense.K` must be at least 1"),
        (["defense.T=10"], "`defense.T` must be at least `defense.decisions`"),
        (["network=imagenet"], "`images` must be at least"),
    ],
)
def test_bad_setting_is_refused_before_anything_runs(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(CompactHydraException) as caught:
        tiny_run(tmp_path / "run", *overrides)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"no weights")
    with pytest.raises(CompactHydraException, match=r"weights\.pt"):
        tiny_run(tmp_path / "run", f"victim.weights={weights}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_where_there_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompactHydraException, match=r"`trainer.accelerator` must be auto or cpu"):
        tiny_run(tmp_path / "run", "trainer.accelerator=gpu")


@pytest.mark.slow
def test_command_line_refuses_in_one_line_and_says_what_is_allowed(tmp_path: Path) -> None:
    for override, message in (("defense.tau=2", "`defense.tau` must be from 0 to 1, got 2.0"), ("fit.z=x", "uniform")):
        done = subprocess.run(
            command(tmp_path / "run", override), env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_real_images_and_weights(real_data: Path, tmp_path: Path) -> None:
    overrides = ("data=arrays", f"data.path={real_data / 'cifar10' / 'tune.npz'}", "data.limit=4", "report.figures=0")
    weights = f"victim.weights={real_data / 'weights' / 'resnet20-12fca82f.th'}"
    metrics = tiny_run(tmp_path / "run", *overrides, "victim=cifar10_resnet20", weights)
    assert metrics["accuracy"]["clean"] == 1.0
    assert metrics["accuracy"]["undefended"] == 0.0
