"""The matrix of attacks and defences: real digits, real attacks, real defences, short fits."""

import logging
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dipguard.attacks import DefendedVictim, Snapshot, build_attack
from dipguard.attacks.static import NoAttack
from dipguard.config import RunConfig
from dipguard.data import load_data
from dipguard.decision import DecisionTrace
from dipguard.defenses import Defense
from dipguard.defenses.transforms import JPEG
from dipguard.evaluation.matrix import Matrix, join_batches
from dipguard.evaluation.metrics import psnr, similarity, wilson
from dipguard.evaluation.plan import prepare
from dipguard.evaluation.results import write_results
from dipguard.evaluation.runner import _share_out, run
from dipguard.store import Entry
from dipguard.store.keys import numerics
from tests.csv_files import read_csv
from tests.store.parts import list_entries
from tests.tiny_matrix import TINY, completed, tiny_matrix, typed_matrix, written

NOTHING = {"_target_": f"{__name__}.nothing"}
STATIC = ("clean", "fgsm_8", "pgd_8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return completed(tiny_matrix(tmp_path_factory.mktemp("matrix")))


def table(matrix: Matrix, name: str) -> list[dict[str, str]]:
    return read_csv(matrix.folder / name)


def figures(folder: Path) -> list[dict[str, str]]:
    """results.csv without times."""
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in read_csv(folder / "results.csv")]


def few(*defenses: str, attacks: tuple[str, ...] = ("pgd_8",)) -> list[str]:
    """Overrides of a matrix of these cells alone."""
    config = typed_matrix(*TINY)
    kept = [text for text in TINY if not text.startswith("defenses.") or text.split(".")[1] in defenses]
    leave = [f"~defenses.{label}" for label in config.defenses if label not in defenses]
    return [*kept, *leave, *(f"~attacks.{label}" for label in config.attacks if label not in attacks)]


def test_every_cell_is_there_and_agrees_with_its_defence_alone(finished: Matrix) -> None:
    assert set(finished.results) == {(a, d) for a in STATIC for d in finished.targets}
    assert set(finished.targets) == {"none", "jpeg", "median", "dip_fixed", "paper", "mirror"}
    for label, target in finished.targets.items():
        # Alone, and all images at once: chunks do not change a result.
        given = finished.attacked("pgd_8", label)
        alone = target.defense.purify(given, indices=finished.clean.indices)
        made = finished.reconstructions("pgd_8", label)
        tolerance = 1e-5 if label in ("none", "jpeg", "median") else 0.1
        np.testing.assert_allclose(made.numpy(), alone.numpy(), rtol=0, atol=tolerance)


def test_similarities_are_to_the_clean_images(finished: Matrix) -> None:
    clean = finished.clean.images
    for place, (result,) in finished.results.items():
        made = finished.reconstructions(*place)
        assert torch.equal(result.ssim_given, similarity(finished.attacked(*place), clean))
        assert torch.equal(result.ssim, similarity(made, clean))
        assert torch.equal(result.psnr, psnr(made, clean))


def test_images_from_the_middle_of_the_data_keep_their_draws(tmp_path: Path) -> None:
    noisy = "+defenses.noisy._target_=tests.evaluation.test_judge.Noisy"
    first, second = (
        completed(prepare(typed_matrix(*few("none"), noisy, "data.limit=2", f"data.offset={at}"), tmp_path))
        for at in (0, 2)
    )
    clean, attacked = second.clean, second.attacked("pgd_8", "noisy")
    attack = second.cell("pgd_8", "noisy").attack
    assert attack is not None
    assert torch.equal(attacked, attack(clean.images, clean.labels, indices=[2, 3]))
    made = second.targets["noisy"].defense.purify(attacked, indices=[2, 3])
    assert torch.equal(second.reconstructions("pgd_8", "noisy"), made)
    assert not torch.equal(attacked, first.attacked("pgd_8", "noisy"))


@pytest.mark.parametrize("name", ["images", "labels", "test_index"])
def test_the_keys_hold_the_data(tmp_path: Path, name: str) -> None:
    digits, keys = load_data("digits", limit=3), []
    pixels = (digits.images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    arrays = {"images": pixels, "labels": digits.labels.numpy(), "test_index": np.arange(3)}
    data = ("data=arrays", f"data.path={tmp_path / 'own.npz'}", "data.limit=null")
    for step in (1, -1):
        np.savez(tmp_path / "own.npz", **{**arrays, name: arrays[name][::step].copy()})
        (cell,) = prepare(typed_matrix(*few("jpeg"), *data), tmp_path / "run").cells
        keys.append((cell.attack_key, cell.key))
    assert set(keys[0]).isdisjoint(keys[1])


class Larger(Defense):
    """Returns the image at twice its size."""

    name = "larger"

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return 2 * height, 2 * width

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        return image.repeat_interleave(2, 1).repeat_interleave(2, 2)


def test_larger_results_are_compared_at_the_clean_size(tmp_path: Path) -> None:
    config = typed_matrix(*few("none", attacks=("clean",)), f"+defenses.larger._target_={__name__}.Larger")
    victim = {"_target_": f"{__name__}.outer", "net": {"_target_": f"{__name__}.inner", "width": 48}}
    (result,) = completed(prepare(replace(config, victim=victim), tmp_path)).results["clean", "larger"]
    assert result.ssim.tolist() == pytest.approx([1.0] * 5)


def test_results_are_those_of_the_images(finished: Matrix) -> None:
    results, images = table(finished, "results.csv"), table(finished, "images.csv")
    assert len(results) == 18
    assert len(images) == 18 * 5
    for row in results:
        mine = [r for r in images if (r["attack"], r["defense"]) == (row["attack"], row["defense"])]
        assert [int(r["index"]) for r in mine] == finished.clean.indices.tolist()
        correct = sum(r["decision_defended"] == r["label"] for r in mine)
        assert (int(row["n"]), int(row["correct"])) == (5, correct)
        assert float(row["accuracy"]) == correct / 5
        low, high = wilson(correct, 5)
        assert (float(row["low"]), float(row["high"])) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
        assert float(row["ssim"]) == pytest.approx(np.mean([float(r["ssim"]) for r in mine]), abs=1e-5)
        assert row["status"] == "done"
        (result,) = finished.results[row["attack"], row["defense"]]
        spent = sum(result.seconds.get(part, 0) for part in ("start", "fit", "decide", "purify"))
        assert float(row["seconds_per_image"]) == pytest.approx(spent / 5, abs=1e-6)
        assert result.decisions.tolist() == [int(r["decision_defended"]) for r in mine]
        assert result.decisions_given.tolist() == [int(r["decision_given"]) for r in mine]
        assert row["eps_255"] == ("" if row["attack"] == "clean" else "8.0")
        if row["defense"] == "none":
            assert all(r["decision_given"] == r["decision_defended"] for r in mine)
            assert row["psnr"] == "" if row["attack"] == "clean" else float(row["psnr"]) > 0
    undefended = {row["attack"]: float(row["accuracy"]) for row in results if row["defense"] == "none"}
    assert undefended["pgd_8"] < undefended["clean"]


def test_traces_of_the_first_images_are_kept(finished: Matrix) -> None:
    indices = finished.clean.indices.tolist()
    for label in finished.targets:
        files = [finished.traces_path("pgd_8", label, index).is_file() for index in indices]
        assert files == ([True, True, False, False, False] if label in ("paper", "mirror") else [False] * 5)
    trace = DecisionTrace.load(finished.traces_path("pgd_8", "paper", indices[1]))
    assert torch.equal(trace.given, finished.attacked("pgd_8", "paper")[1])
    rebuilt = finished.targets["paper"].defense.rebuild(trace)
    assert torch.equal(rebuilt.image, finished.reconstructions("pgd_8", "paper")[1])
    (result,) = finished.results["pgd_8", "paper"]
    assert (result.reasons[1], int(result.used[1])) == (rebuilt.reason, len(rebuilt.used))


def test_what_is_finished_is_not_run_again(finished: Matrix) -> None:
    before = written(finished)
    texts = {name: (finished.folder / name).read_bytes() for name in ("results.csv", "images.csv")}
    for name in texts:
        (finished.folder / name).unlink()
    again = completed(prepare(finished.config, finished.folder))
    assert written(again) == before
    assert {name: (finished.folder / name).read_bytes() for name in texts} == texts
    assert again.store.counts["attacks_found"] == again.store.counts["attacked"] == 0  # not even read


def test_a_changed_setting_runs_that_attack_alone(finished: Matrix, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    changed = prepare(typed_matrix(*TINY, "attacks.pgd_8.steps=3"), tmp_path / "run")
    before = written(changed)
    completed(changed)
    new = {info.header["what"] for info in list_entries(changed.store.path) if info.path not in before}
    assert {what.split(":")[0].split(",")[0].split(" x ")[0] for what in new} == {"pgd_8"}


def test_a_changed_setting_runs_that_defence_alone(finished: Matrix) -> None:
    before = written(finished)
    changed = prepare(typed_matrix(*TINY, "defenses.jpeg.quality=40"), finished.folder)
    changed.load()
    assert [place for place in changed.results if not changed.results[place][0].done] == [
        (attack, "jpeg") for attack in STATIC
    ]
    assert run(changed) == []
    new = {info.header["what"] for info in list_entries(changed.store.path) if info.path not in before}
    assert {what.split(":")[0].split(",")[0] for what in new} == {f"{attack} x jpeg" for attack in STATIC}


def test_the_tables_of_an_unfinished_run_are_made_from_what_is_stored(finished: Matrix) -> None:
    more = prepare(typed_matrix(*TINY, "+defense@defenses.bits=bit_depth"), finished.folder)
    before = written(more)
    write_results(more)
    status = {row["defense"]: row["status"] for row in table(more, "results.csv")}
    assert status.pop("bits") == "not run yet"
    assert set(status.values()) == {"done"}
    assert written(more) == before
    write_results(finished)


class Killed(BaseException):
    """A process that is killed between two chunks."""


def killed_after(matrix: Matrix, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Matrix.chunk

    def chunk(self: Matrix, *args: object, **more: object) -> object:
        nonlocal chunks
        chunks -= 1
        if chunks < 0:
            raise Killed
        return made(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Matrix, "chunk", chunk)
        with pytest.raises(Killed):
            run(matrix)


def test_a_killed_run_goes_on_with_other_chunks(
    tmp_path: Path, finished: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(prepare(typed_matrix(*few("jpeg")), tmp_path), 1, monkeypatch)
    for chunk in (2, 4):
        matrix = completed(prepare(typed_matrix(*few("jpeg"), f"chunk={chunk}"), tmp_path))
        assert torch.equal(matrix.reconstructions("pgd_8", "jpeg"), finished.reconstructions("pgd_8", "jpeg"))


def test_the_keys_hold_the_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = typed_matrix(*few("jpeg"))
    (old,) = prepare(settings, tmp_path).cells
    for name in numerics():
        with monkeypatch.context() as patch:
            patch.setattr("dipguard.evaluation.plan.numerics", lambda name=name: {**numerics(), name: "other"})
            (new,) = prepare(settings, tmp_path).cells
        assert old.attack_key != new.attack_key
        assert old.key != new.key


@pytest.mark.parametrize("layer", ["attacks", "cells"])
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, layer: str, finished: Matrix, caplog: pytest.LogCaptureFixture
) -> None:
    settings = typed_matrix(*few("jpeg"))
    run(prepare(settings, tmp_path))
    results = figures(tmp_path)
    for info in list_entries(tmp_path / "store", layers=[layer]):
        info.path.write_bytes(info.path.read_bytes()[:-9] + b"123456789")
    again = prepare(settings, tmp_path)
    with caplog.at_level(logging.WARNING, logger="dipguard.store"):
        assert run(again) == []
        made = again.reconstructions("pgd_8", "jpeg")
    # Attacked images are only read where a cell is missing.
    assert ("is damaged" in caplog.text) == (layer == "cells")
    assert torch.equal(made, finished.reconstructions("pgd_8", "jpeg"))
    assert figures(tmp_path) == results


@pytest.fixture(scope="module")
def kept_traces(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return completed(prepare(typed_matrix(*few("paper"), "keep_traces=true"), tmp_path_factory.mktemp("traces")))


@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_damaged_trace_is_restored_from_the_store(tmp_path: Path, kept_traces: Matrix, damage: str) -> None:
    settings = kept_traces.config
    shutil.copytree(kept_traces.folder, tmp_path, dirs_exist_ok=True)
    matrix = prepare(settings, tmp_path)
    index = int(matrix.clean.indices[4])
    path = matrix.traces_path("pgd_8", "paper", index)
    trace, whole = DecisionTrace.load(path), path.read_bytes()
    path.unlink()  # `trace` is mapped from it
    if damage != "missing":
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole[:-1] + b"x")
    others = {other: other.stat().st_mtime_ns for other in path.parent.iterdir() if other != path}
    before = written(matrix)
    again = completed(prepare(settings, tmp_path))
    assert DecisionTrace.load(path).equals(trace)
    assert {other: other.stat().st_mtime_ns for other in others} == others
    changed = {p for p, made in written(again).items() if before.get(p) != made}
    whats = {info.header["what"] for info in list_entries(again.store.path) if info.path in changed}
    assert whats == {"pgd_8 x paper: 5 images"}, "nothing is purified again"


@pytest.mark.parametrize("name", ["adaptive_pgd", "pgd"])
def test_an_attack_goes_on_with_the_batch_where_it_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = f"{{name: {name}, steps: 3, batch_size: 2}}"
    settings = typed_matrix(*few("jpeg", attacks=()), f"+attacks.own={attack}")
    seen: list[list[int]] = []

    def made(*, fails_after: int | None = None) -> Matrix:
        matrix = prepare(settings, tmp_path)
        (cell,) = matrix.cells
        assert cell.attack is not None
        original = cell.attack.snapshot_batch

        def batch(images: Tensor, labels: Tensor, indices: Tensor) -> dict[Snapshot, Tensor]:
            if len(seen) == fails_after:
                raise KeyboardInterrupt
            seen.append(indices.tolist())
            return original(images, labels, indices)

        monkeypatch.setattr(cell.attack, "snapshot_batch", batch)
        return matrix

    with pytest.raises(KeyboardInterrupt):
        run(made(fails_after=2))
    matrix = completed(made())
    assert seen == [[0, 1], [2, 3], [4]]
    assert len(list_entries(matrix.store.path, layers=["attacks"])) == 1

    target = matrix.targets["jpeg"]
    attacked = target.victim if name == "pgd" else DefendedVictim(target.victim, target.bare)
    whole = build_attack(name, attacked, steps=3, batch_size=2)
    images = whole(matrix.clean.images, matrix.clean.labels, indices=matrix.clean.indices)
    assert torch.equal(matrix.attacked("own", "jpeg"), images)
    (result,) = matrix.results["own", "jpeg"]
    assert (result.spent, result.flat) == (whole.spent, whole.flat)
    assert list(result.history) == pytest.approx(whole.history)
    assert list(result.last_history) == pytest.approx(whole.last_history)


def test_batches_that_ended_early_keep_their_last_share() -> None:
    def batch(images: int, history: list[float], gradients: int, flat: float) -> Entry:
        zeros = {name: np.zeros((1, images, *shape)) for name, shape in {"images": (3, 8, 8), "decisions": ()}.items()}
        spent = {"purifications": 2 * gradients, "gradients": gradients}
        about = {"history": history, "last_history": history, "flat": flat, "spent": spent, "seconds": {"attack": 0.5}}
        return Entry(zeros, about)

    whole = join_batches([batch(4, [0.75, 0.5, 0.25], 30, 0.1), batch(1, [0.0], 10, 0.5)])
    assert whole.arrays["images"].shape == (1, 5, 3, 8, 8)
    assert whole.header["history"] == [0.6, 0.4, 0.2]
    assert whole.header["spent"] == {"purifications": 80, "gradients": 40}
    assert whole.header["flat"] == pytest.approx(0.2)
    assert whole.header["seconds"] == {"attack": 1.0}
    assert join_batches([batch(4, [0.5], 0, 0.0), batch(1, [0.0], 0, 0.0)]).header["flat"] == 0, "none were counted"


def test_traces_of_other_settings_in_their_place_are_none(tmp_path: Path) -> None:
    settings = (*few("paper"), "keep_traces=true")
    first = completed(prepare(typed_matrix(*settings), tmp_path))
    assert [i for i, _ in first.traces(first.cell("pgd_8", "paper"))] == list(range(len(first.clean)))
    other = [text for text in settings if text != "keep_traces=true"]
    second = completed(prepare(typed_matrix(*other, "attacks.pgd_8.eps_255=4"), tmp_path))
    assert [i for i, _ in second.traces(second.cell("pgd_8", "paper"))] == [0, 1]
    left = [i for i, _ in first.traces(first.cell("pgd_8", "paper"))]
    assert left == list(range(2, len(first.clean))), "the second run has written over the first two"


def test_more_figures_get_their_traces(tmp_path: Path) -> None:
    settings = [text for text in few("paper") if text != "figures=2"]
    for count in (0, 4):
        completed(prepare(typed_matrix(*settings, f"figures={count}"), tmp_path))
        assert len(list(tmp_path.glob("traces/pgd_8/paper/*"))) == count


@pytest.mark.parametrize("more", [["figures=5"], ["figures=2", "keep_traces=true"]])
def test_a_rebuild_fits_nothing_for_more_traces(tmp_path: Path, finished: Matrix, more: list[str]) -> None:
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    settings = [text for text in TINY if text != "figures=2"]
    matrix = prepare(typed_matrix(*settings, *more, "rebuild=true"), tmp_path)
    before = written(matrix)
    assert torch.equal(matrix.reconstructions("pgd_8", "paper"), finished.reconstructions("pgd_8", "paper"))
    assert written(matrix) == before


def test_a_rebuild_never_runs_what_the_store_has_lost(tmp_path: Path, finished: Matrix) -> None:
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    for info in list_entries(tmp_path / "store"):
        if "chunk" not in info.header:  # all but the finished cells
            info.path.unlink()
    matrix = prepare(typed_matrix(*TINY, "rebuild=true"), tmp_path)
    matrix.load()
    assert all(matrix.results[cell.place][0].done for cell in finished.cells if cell.why is None)
    for images in (matrix.attacked, matrix.reconstructions):
        with pytest.raises(RuntimeError, match="`rebuild` runs nothing, but the store has no images of pgd_8 x paper"):
            images("pgd_8", "paper")


@pytest.mark.slow
def test_a_new_folder_gets_its_traces_from_a_shared_store(tmp_path: Path) -> None:
    shared = f"store={tmp_path / 'store'}"
    cut = ("data.limit=2", "chunk=2", shared)
    first = prepare(typed_matrix(*few("mirror"), *cut), tmp_path / "first")
    run(first)
    second = prepare(typed_matrix(*few("mirror"), *cut), tmp_path / "second")
    before = written(second)
    assert run(second) == []
    changed = [info for info in list_entries(second.store.path) if before.get(info.path) != info.header["made"]]
    assert [info.header["what"] for info in changed] == ["pgd_8 x mirror: 2 images"], "nothing is purified again"
    for index in first.clean.indices.tolist()[:2]:
        ours, theirs = (DecisionTrace.load(m.traces_path("pgd_8", "mirror", index)) for m in (first, second))
        assert ours.equals(theirs)


@pytest.mark.parametrize("name", ["dipdefend", "mirror", "paper"])
def test_only_a_fit_below_its_default_length_is_called_cut(tmp_path: Path, name: str) -> None:
    whole, given, short = (
        prepare(typed_matrix("data.limit=1", f"defense={name}", *options), tmp_path / str(number))
        for number, options in enumerate([[], ["defense.T=5000"], ["defense.T=100"]])
    )
    assert {cell.cut for cell in [*whole.cells, *given.cells]} == {""}
    assert short.cell("clean", name).cut.startswith("T 100 of ")


def test_a_length_that_changes_nothing_cuts_nothing(tmp_path: Path) -> None:
    given = typed_matrix("data.limit=1", "defense=dip_fixed", "defense.T=600")
    assert {cell.cut for cell in prepare(given, tmp_path).cells} == {""}


def test_images_that_are_too_small_for_ssim_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "tiny.npz", images=np.zeros((1, 5, 5, 3), np.uint8), labels=np.zeros(1, np.int64))
    with pytest.raises(ValueError, match=r"`data` must have images of at least 6 pixels a side .* got 5x5"):
        prepare(typed_matrix("data=arrays", f"data.path={tmp_path / 'tiny.npz'}"), tmp_path)


@pytest.mark.slow
def test_keeping_traces_later_purifies_again(tmp_path: Path) -> None:
    cut = ("data.limit=3", "chunk=3", "figures=1")
    run(prepare(typed_matrix(*few("paper"), *cut), tmp_path))
    completed(prepare(typed_matrix(*few("paper"), *cut, "keep_traces=true"), tmp_path))
    assert len(list((tmp_path / "traces/pgd_8/paper").iterdir())) == 3


def test_what_is_made_again_stays_until_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defend(images: torch.Tensor, **more: object) -> None:
        raise RuntimeError("stopped")

    cut = ("data.limit=3", "chunk=3", "figures=1")
    run(prepare(typed_matrix(*few("paper"), *cut), tmp_path))
    for more in ["keep_traces=true"], []:
        matrix = prepare(typed_matrix(*few("paper"), *cut, *more), tmp_path)
        monkeypatch.setattr(matrix.targets["paper"].defense, "defend", defend)
        with pytest.raises(RuntimeError, match="stopped") if more else nullcontext():
            assert run(matrix) == []  # what was there before is there still


def test_a_failing_cell_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = typed_matrix(*few("jpeg", "median", attacks=("clean", "pgd_8")))
    matrix = prepare(settings, tmp_path)

    def defend(images: torch.Tensor, **more: object) -> None:
        raise RuntimeError("the card fell off the bus,\nas cards do")

    monkeypatch.setattr(matrix.targets["jpeg"].defense, "defend", defend)
    failed = run(matrix)
    assert failed == [
        f"{attack} x jpeg: RuntimeError: the card fell off the bus, as cards do" for attack in ("clean", "pgd_8")
    ]
    status = {(row["attack"], row["defense"]): row["status"] for row in table(matrix, "results.csv")}
    assert status["pgd_8", "jpeg"] == "failed: RuntimeError: the card fell off the bus, as cards do"
    assert status["pgd_8", "median"] == "done"
    later = completed(prepare(settings, tmp_path))
    assert {row["status"] for row in table(later, "results.csv")} == {"done"}


def test_a_failing_attack_does_not_stop_the_others_of_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = prepare(typed_matrix(*few("none", "jpeg"), "processes=2"), tmp_path)
    for cell in matrix.cells:
        assert cell.attack is not None
        monkeypatch.setattr(cell.attack, "attack_batch", lambda *batch: 1 / 0)
    assert run(matrix) == [f"pgd_8 x {label}: ZeroDivisionError: division by zero" for label in ("none", "jpeg")]


def test_a_matrix_of_one_cell_raises_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = prepare(typed_matrix(*few("jpeg")), tmp_path)

    def defend(images: torch.Tensor, **more: object) -> None:
        raise MemoryError("too much")

    monkeypatch.setattr(matrix.targets["jpeg"].defense, "defend", defend)
    with pytest.raises(MemoryError, match="too much"):
        run(matrix)


@pytest.mark.slow
def test_two_processes_share_the_chunks_also_inside_a_slurm_job(
    tmp_path: Path, finished: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = {"JOB_ID": "1", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "localhost"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    matrix = prepare(typed_matrix(*few("none", "paper"), "processes=2"), tmp_path)
    write_results(matrix)
    _share_out(matrix, matrix.cells)
    whats = {info.header["what"] for info in list_entries(matrix.store.path, layers=["cells"])}
    assert whats == {
        f"pgd_8 x {label}, images {images}" for label in ("none", "paper") for images in ("0 to 2", "3 to 4")
    }
    assert run(matrix) == []
    for label in ("none", "paper"):
        made, whole = (m.reconstructions("pgd_8", label).numpy() for m in (matrix, finished))
        np.testing.assert_allclose(made, whole, rtol=0, atol=1e-5 if label == "none" else 0.1)


@pytest.mark.slow
def test_a_surrogate_guides_the_defence_and_the_victim_decides(tmp_path: Path, finished: Matrix) -> None:
    settings = (*few("jpeg", "paper"), "victim@surrogate=digits_cnn", "surrogate.seed=5")
    matrix = prepare(typed_matrix(*settings), tmp_path)
    asked, victim = matrix.targets["paper"].defense.victim, matrix.targets["paper"].victim
    assert asked is not victim
    assert any(not torch.equal(a, b) for a, b in zip(asked.parameters(), victim.parameters(), strict=True))
    same, other = (m.cell("pgd_8", "paper") for m in (matrix, finished))
    assert same.attack_key == other.attack_key
    assert same.key != other.key
    write_results(matrix)
    assert {row["surrogate"] for row in table(matrix, "results.csv")} == {"digits_cnn"}
    assert {row["surrogate"] for row in table(finished, "results.csv")} == {""}


def test_callbacks_and_trainer_options_reach_the_fits(tmp_path: Path) -> None:
    more = (
        "+callbacks.timer._target_=pytorch_lightning.callbacks.Timer",
        "+trainer.profiler=simple",
        "+callbacks.kept._target_=pytorch_lightning.callbacks.ModelCheckpoint",
        f"store={tmp_path / 'shared'}",
        "data.limit=2",
    )
    matrix = prepare(typed_matrix(*few("paper", "jpeg"), *more), tmp_path / "run")
    plain = prepare(typed_matrix(*few("paper", "jpeg"), *more[3:]), tmp_path / "run")
    assert matrix.targets["paper"].defense.trainer == {"profiler": "simple"}
    # Callbacks may change a fit: it is neither taken from a shared store nor stored there.
    assert (matrix.targets["paper"].defense.store, plain.targets["paper"].defense.store) == (None, plain.store)
    assert matrix.cell("pgd_8", "paper").key != plain.cell("pgd_8", "paper").key
    seen = []

    def defend(images: torch.Tensor, *, callbacks: list[object], **rest: object) -> object:
        seen.append([type(callback).__name__ for callback in callbacks])
        return defense.__class__.defend(defense, images, callbacks=callbacks, **rest)

    defense = matrix.targets["paper"].defense
    object.__setattr__(defense, "defend", defend)
    assert run(matrix) == []
    assert seen == [["FitProgress", "Timer", "ModelCheckpoint"]]
    assert len(list((tmp_path / "run" / "checkpoints" / "pgd_8" / "paper" / "0-0-0").glob("*.ckpt"))) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attacks.pgd_8.eps_255=300", "`attacks.pgd_8.eps_255` must be"),
        ("attacks.pgd_8.eps_255=null", "`attacks.pgd_8.eps_255` must be a number, got None"),
        ("+attack@attacks.x=adaptive_pgd attacks.x.eot_iter=many", "`attacks.x.eot_iter` must be an integer"),
        ("+attack@attacks.x=hopskipjump attacks.x.radii_255=5 +attacks.x.only=[jpeg]", "`attacks.x.radii_255` must be"),
        ("+attacks.pgd_8.limit=0", "`attacks.pgd_8.limit` must be at least 1"),
        ("+attacks.pgd_8.only=[nobody]", "`attacks.pgd_8.only` must be one of none, jpeg"),
        ("+attacks.pgd_8.check=weak", "`attacks.pgd_8.check` must be one of control, large_eps"),
        ("+attack@attacks.worst_case=pgd", "`attacks` must not name one 'worst_case'"),
        ("defenses.comdefend.weights=nowhere.pt", "`defenses.comdefend.weights` must name an existing weights file"),
        ("trainer.accelerator=gpu", "`trainer.accelerator` must be auto or cpu on a machine without a GPU"),
        ("+trainer.profiler=nosuch", "`trainer` holds what a fit cannot have: .*`profiler`"),
        ("+callbacks.x._target_=pytorch_lightning.callbacks.Nosuch", "`callbacks.x` cannot be made: .*Nosuch"),
        ("+callbacks.x={_target_:pytorch_lightning.callbacks.Timer,durations:3}", "(?s)`callbacks.x` .*durations"),
        ("+callbacks.x._target_=torch.nn.Identity", "`callbacks.x._target_` must be a callback of Lightning"),
        (
            "+attack@attacks.bpda=bpda +callbacks.timer._target_=pytorch_lightning.callbacks.Timer",
            "`callbacks` do not reach the fits that `attacks.bpda` attacks",
        ),
        ("store_T=[30]", r"`store_T` needs a `store`, the folder .* got store_T=\[30\]"),
        ("store_samples=true", "`store_samples` needs a `store`"),
        ("+attacks.pgd_8.intermediate=last", "`attacks.pgd_8.intermediate` is for adaptive attacks, got it for 'pgd'"),
        ("victim.seed=a", "`victim.seed` must be an integer, got 'a'"),
        ("victim.seed=-1", "`victim.seed` must be at least 0, got -1"),
        ("victim@baseline=cifar_cnn_a", "`baseline.weights`"),
    ],
)
def test_bad_settings_are_named_before_anything_runs(tmp_path: Path, override: str, message: str) -> None:
    if "gpu" in override and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    extra = ["+defense@defenses.comdefend=comdefend"] if "comdefend" in override else []
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        tiny_matrix(tmp_path / "run", *extra, *override.split(" "))
    assert not (tmp_path / "run").exists()


def nothing(*args: Any, **options: Any) -> None:
    """What makes neither data nor victim, defence or attack."""


def inner(width: int) -> nn.Module:
    return nn.Linear(width, 10)


def outer(net: nn.Module) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), net)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"data": NOTHING}, "`data` must make a dipguard.data.base.ImageSet, got a NoneType"),
        ({"victim": NOTHING}, "`victim` must make a torch.nn.modules.module.Module, got a NoneType"),
        ({"defenses": {"x": NOTHING}}, "`defenses.x` must make a dipguard.defenses.base.Defense, got a NoneType"),
        ({"attacks": {"x": NOTHING}}, "`attacks.x` must be a subclass of dipguard.attacks.Attack, got .*nothing"),
    ],
)
def test_what_makes_something_else_is_named(tmp_path: Path, override: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        prepare(replace(typed_matrix(*few("jpeg")), **override), tmp_path)


def test_an_option_may_be_made_by_a_path_of_its_own(tmp_path: Path) -> None:
    net = {"_target_": f"{__name__}.inner", "width": 48}
    settings = replace(typed_matrix(*few("jpeg")), victim={"_target_": f"{__name__}.outer", "net": net})
    assert prepare(settings, tmp_path).targets["jpeg"].victim[-1].in_features == 48


def test_a_callback_that_was_edited_makes_other_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    keys = set()
    for order in (1, 22):  # of other lengths: Python looks at a file's size and second
        code = f"from pytorch_lightning import Callback\n\n\nclass Own(Callback):\n    order = {order}\n"
        (tmp_path / "own_callback.py").write_text(code)
        sys.modules.pop("own_callback", None)
        matrix = tiny_matrix(tmp_path / "run", "+callbacks.own._target_=own_callback.Own")
        keys |= {cell.key for cell in matrix.cells if cell.place == ("clean", "none")}
    del sys.modules["own_callback"]
    assert len(keys) == 2


@pytest.mark.parametrize("options", [(), ("+callbacks.timer._target_=pytorch_lightning.callbacks.Timer",)])
def test_options_of_stored_fits_are_told_where_none_is_stored(tmp_path: Path, options: tuple[str, ...]) -> None:
    defense = "paper" if options else "mirror"
    settings = typed_matrix(*few(defense), *options, f"store={tmp_path / 'store'}", "store_T=[30]")
    with pytest.warns(UserWarning, match=r"`store_T`=\[30\] changes nothing: only fits of `paper` without `callbacks`"):
        prepare(settings, tmp_path / "run")


def test_the_trainer_is_checked_where_nothing_is_fitted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`trainer` holds what a fit cannot have: .*99"):
        prepare(typed_matrix(*few("jpeg"), "+trainer.precision=99"), tmp_path)


@pytest.mark.parametrize("label", ["", "a/b", "..", ".x", "a b", "-x"])
def test_labels_that_cannot_be_folders_are_refused(tmp_path: Path, label: str) -> None:
    settings: RunConfig = typed_matrix(*TINY)
    with pytest.raises(ValueError, match="`defenses` must be named by letters"):
        prepare(replace(settings, defenses={label: {"name": "none"}}), tmp_path)
    with pytest.raises(ValueError, match="`defenses` must name at least one, got none"):
        prepare(replace(settings, defenses={}), tmp_path)


def test_a_defence_without_its_weights_says_so_and_has_no_figure(tmp_path: Path) -> None:
    overrides = (*few("none", attacks=("clean",)), "+defense@defenses.comdefend=comdefend")
    matrix = completed(prepare(typed_matrix(*overrides), tmp_path))
    (row,) = [row for row in table(matrix, "results.csv") if row["defense"] == "comdefend"]
    assert "weights not supplied" in row["status"]
    assert row["accuracy"] == row["ssim"] == row["correct"] == ""


class Inverted(JPEG):
    """Another defence, which has inherited the name of JPEG."""

    def purify_image(self, image: Tensor, index: int) -> Tensor:
        return 1 - image


class Darkened(NoAttack):
    """Another attack, which has inherited the name ``none``."""

    @property
    def eps(self) -> float:
        return 0.5

    def attack_batch(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        return images / 2


def test_what_has_inherited_a_name_is_not_taken_for_its_base(tmp_path: Path) -> None:
    own = (f"+defenses.inverted._target_={__name__}.Inverted", f"+attacks.darkened._target_={__name__}.Darkened")
    matrix = completed(prepare(typed_matrix(*few("jpeg", attacks=("clean",)), *own), tmp_path))
    assert torch.equal(matrix.reconstructions("clean", "inverted"), 1 - matrix.clean.images)
    assert torch.equal(matrix.attacked("darkened", "jpeg"), matrix.clean.images / 2)


def test_an_attack_by_its_import_path_is_known_for_what_it_is(tmp_path: Path) -> None:
    path = "dipguard.attacks.hopskipjump.HopSkipJump"
    matrix = prepare(typed_matrix(*few("jpeg"), f"+attacks.mine={{_target_: {path}, budgets: [20]}}"), tmp_path)
    cell = matrix.cell("mine", "jpeg")
    assert cell.adaptive
    assert not cell.white_box


def test_a_defence_by_its_import_path_is_given_its_options(tmp_path: Path) -> None:
    mine = "+defenses.mine={name: mine, _target_: dipguard.defenses.transforms.JPEG, quality: 30}"
    matrix = prepare(typed_matrix(*few("none", attacks=("clean",)), mine), tmp_path)
    assert matrix.targets["mine"].defense.quality == 30
    assert matrix.cell("clean", "mine").cut == ""
