"""The ladder from end to end: real digits, real attacks, real rows; short."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from dipguard.attacks import ATTACKS, DEFENSE_AWARE
from dipguard.config_matrix import RungConfig
from dipguard.evaluation.ladder import estimate_ladder, run_ladder, write_ladder
from dipguard.evaluation.ladder_plan import BLACK_BOX, fitting_options, is_white_box, plan_ladder, targets_of
from dipguard.evaluation.ladder_results import load_cells, worst_case
from dipguard.evaluation.matrix import Matrix, prepare_matrix
from dipguard.evaluation.statistics import wilson
from dipguard.victims import build_victim
from tests.tiny_ladder import ladder_overrides, run_tiny_ladder, tiny_ladder
from tests.tiny_matrix import compose_matrix, typed_matrix

FAST = ("transfer", "identity", "identity_eot", "last_iterate", "short_dip", "hopskipjump", "noise", "large_eps")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that name another classifier: the digits' own, its weights moved a little."""
    state = build_victim("digits_cnn", progress=False).network.state_dict()
    draws = torch.Generator().manual_seed(0)
    moved = {name: w * (1 + 0.1 * torch.randn(w.shape, generator=draws)) for name, w in state.items() if w.ndim > 1}
    path = tmp_path_factory.mktemp("baseline") / "moved.pt"
    torch.save({**state, **moved}, path)
    return "+victim@baseline=digits_cnn", f"baseline.weights={path}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, baseline: tuple[str, ...]) -> Matrix:
    """Feed-forward rows and a second victim as baseline."""
    matrix = tiny_ladder(tmp_path_factory.mktemp("ladder"), *baseline, rungs=FAST, dip=False)
    assert run_ladder(matrix) == []
    return matrix


def lines(matrix: Matrix) -> dict[tuple[str, str], dict[str, str]]:
    with (matrix.folder.path / "ladder.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len({(line["rung"], line["row"]) for line in read}) == len(read)
    return {(line["rung"], line["row"]): line for line in read}


def stored(matrix: Matrix) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (matrix.folder.path / "ladder").rglob("*.npz")}


def test_every_cell_is_done_or_says_why_not(finished: Matrix) -> None:
    made = lines(finished)
    assert {row for _, row in made} == {"none", "jpeg", "baseline"}
    assert {rung for rung, _ in made} == {"clean", *FAST, "worst_case"}
    skipped = {"identity_eot": "deterministic", "last_iterate": "no such readout", "short_dip": "no DIP"}
    for (rung, _), line in made.items():
        assert line["status"] == skipped.get(rung, "done")
        figures = [line[name] for name in ("n", "correct", "accuracy", "low", "high")]
        assert all(figures) if line["status"] == "done" else not any(figures)


def test_figures_are_those_of_the_attacked_images_behind_the_defence(finished: Matrix) -> None:
    made, labels = lines(finished), finished.clean.labels
    for rung in ("transfer", "identity", "hopskipjump", "noise", "large_eps"):
        with np.load(finished.folder.path / "ladder" / rung / "jpeg.npz") as saved:
            attacked = torch.from_numpy(saved["attacked"])
            right = saved["right"]
        assert attacked.dtype == torch.float32
        with torch.no_grad():
            read = finished.victim(finished.rows["jpeg"].purify(attacked, indices=finished.clean.indices)).argmax(1)
        assert right.tolist() == (read == labels).tolist()
        eps = 64 if rung == "large_eps" else 24
        assert float((attacked - finished.clean.images).abs().max()) <= eps / 255 + 1e-6
        line = made[rung, "jpeg"]
        assert (int(line["n"]), int(line["correct"])) == (4, int(right.sum()))
        low, high = wilson(int(right.sum()), 4)
        assert (float(line["low"]), float(line["high"])) == pytest.approx((low, high), abs=1e-6)


def test_worst_case_is_each_images_worst(finished: Matrix) -> None:
    made = lines(finished)
    for row in ("none", "jpeg", "baseline"):
        right = []
        for image in range(4):
            verdicts = []
            for rung in ("clean", "transfer", "identity", "hopskipjump"):  # neither the control nor the large eps
                with np.load(finished.folder.path / "ladder" / rung / f"{row}.npz") as saved:
                    verdicts.append(bool(saved["right"][image]))
            right.append(all(verdicts))
        assert int(made["worst_case", row]["correct"]) == sum(right)
        assert made["worst_case", row]["note"] == "over 3 rungs"


def test_a_rung_of_fewer_images_speaks_for_those_alone(tmp_path: Path) -> None:
    matrix = tiny_ladder(tmp_path, "ladder.identity.limit=2", rungs=("transfer", "identity"), dip=False)
    run_ladder(matrix)
    cells = [cell for cell in load_cells(matrix, plan_ladder(matrix)) if cell.planned.target.label == "none"]
    rights = {cell.planned.rung: cell.right for cell in cells}
    assert (len(rights["transfer"]), len(rights["identity"])) == (4, 2)
    expected = [bool(rights["transfer"][i]) and (i >= 2 or bool(rights["identity"][i])) for i in range(4)]
    assert worst_case(cells, 4).tolist() == expected
    assert worst_case([], 4) is None
    misread = np.array([True, True, False, True])
    assert worst_case(cells, 4, misread).tolist() == [e and bool(c) for e, c in zip(expected, misread, strict=True)]


def test_costs_are_told_before_and_counted_after(finished: Matrix) -> None:
    costs, made = estimate_ladder(finished), lines(finished)
    assert set(costs) == {f"{rung} x {row}" for (rung, row), line in made.items() if line["eps_255"]} - {
        f"{rung} x {row}" for (rung, row), line in made.items() if line["status"] != "done" or rung == "worst_case"
    }
    for rung in ("identity", "hopskipjump"):
        line = made[rung, "jpeg"]
        assert 0 < int(line["victim_queries"]) <= costs[f"{rung} x jpeg"].victim_queries
        assert int(line["dip_steps"]) == 0
    assert int(made["transfer", "jpeg"]["purifications"]) == 0


def test_what_is_finished_is_not_run_again_and_what_is_lost_is(finished: Matrix) -> None:
    before, csv_before = stored(finished), (finished.folder.path / "ladder.csv").read_bytes()
    lost = finished.folder.path / "ladder" / "identity" / "jpeg.npz"
    damaged = finished.folder.path / "ladder" / "transfer" / "none.npz"
    with np.load(lost) as saved:
        attacked = saved["attacked"]
    lost.unlink()
    damaged.write_bytes(b"no archive")
    again = prepare_matrix(finished.config, finished.folder.path)
    run_ladder(again)
    assert {path for path, time in stored(again).items() if time != before[path]} == {lost, damaged}
    with np.load(lost) as saved:
        np.testing.assert_array_equal(saved["attacked"], attacked)
    now = {k: v for k, v in lines(again).items() if k[0] != "clean"}
    then = {(v["rung"], v["row"]): v for v in csv.DictReader(csv_before.decode().splitlines()) if v["rung"] != "clean"}
    assert {k: (v["correct"], v["options"]) for k, v in now.items()} == {
        k: (v["correct"], v["options"]) for k, v in then.items()
    }


def test_a_changed_setting_runs_that_rung_alone(finished: Matrix, baseline: tuple[str, ...]) -> None:
    overrides = ladder_overrides("ladder.transfer.options.steps=3", *baseline, rungs=FAST, dip=False)
    changed = prepare_matrix(typed_matrix(*overrides), finished.folder.path)
    before = stored(finished)
    run_ladder(changed)
    again = {path for path, time in stored(changed).items() if time != before[path]}
    assert {path.parent.name for path in again} == {"transfer"}
    assert len(again) == 3
    run_ladder(finished)  # for the tests that come after this one


def test_tables_are_made_again_from_what_is_stored(finished: Matrix) -> None:
    files = [finished.folder.path / name for name in ("ladder.csv", "ladder_checks.csv")]
    texts, cells = [path.read_bytes() for path in files], stored(finished)
    for path in files:
        path.unlink()
    write_ladder(finished)
    assert [path.read_bytes() for path in files] == texts
    assert stored(finished) == cells


class _Broken(torch.nn.Module):
    """A classifier that meets its end on some inputs: darker than all that is not attacked."""

    def __init__(self, victim: torch.nn.Module, calls: int) -> None:
        super().__init__()
        self.victim, self.left = victim, calls

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the card fell off the bus,\nas cards do")
        return self.victim(images)


def test_a_failure_loses_no_finished_work(tmp_path: Path) -> None:
    whole = tiny_ladder(tmp_path, rungs=("transfer", "identity", "noise"), dip=False)
    run_ladder(replace(whole, config=replace(whole.config, ladder={"transfer": whole.config.ladder["transfer"]})))
    kept = stored(whole)
    failed = run_ladder(replace(whole, victim=_Broken(whole.victim, calls=0)))
    assert [text.split(":")[0] for text in failed] == [
        f"{g} x {r}" for g in ("identity", "noise") for r in ("none", "jpeg")
    ]
    assert stored(whole) == kept
    status = lines(whole)["identity", "jpeg"]["status"]
    assert status == "failed: RuntimeError: the card fell off the bus, as cards do"
    assert lines(whole)["transfer", "jpeg"]["status"] == "done"
    assert run_ladder(whole) == []
    assert {line["status"] for line in lines(whole).values()} == {"done"}
    assert not list((tmp_path / "ladder").rglob("*.json"))


def test_the_baseline_is_attacked_itself(finished: Matrix) -> None:
    (target,) = [target for target in targets_of(finished) if target.label == "baseline"]
    assert target.victim is finished.baseline
    assert target.row.name == "none"
    path = finished.folder.path / "ladder" / "transfer"
    with np.load(path / "none.npz") as ours, np.load(path / "baseline.npz") as theirs:
        assert (ours["attacked"] != theirs["attacked"]).any()
    assert int(lines(finished)["transfer", "baseline"]["correct"]) < int(
        lines(finished)["clean", "baseline"]["correct"]
    )


@pytest.mark.parametrize(
    ("rung", "row", "expected"),
    [
        (RungConfig("adaptive_pgd", readout=["last"]), "jpeg", "no such readout"),
        (RungConfig("adaptive_pgd", readout=["last"]), "dipguard", {"readout": "last"}),
        (RungConfig("adaptive_pgd", readout=["on_boundary", "mean"]), "dipguard", {"readout": "mean"}),
        (RungConfig("adaptive_pgd", options={"eot_iter": 2}), "jpeg", "deterministic"),
        (RungConfig("adaptive_pgd", options={"eot_iter": 2}), "dipguard", {"eot_iter": 2}),
        (RungConfig("defended_autoattack", options={"eot_iter": 2}), "jpeg", {"eot_iter": 1}),
        (RungConfig("defended_autoattack", options={"eot_iter": 2}), "dipguard", {"eot_iter": 2}),
        (RungConfig("unrolled"), "jpeg", "no DIP"),
        (RungConfig("adaptive_pgd", options={"stand_in": "short_dip"}), "none", "no DIP"),
        (RungConfig("adaptive_pgd", options={"stand_in": "short_dip"}), "dipguard", {"stand_in": "short_dip"}),
        (RungConfig("pgd", rows=["none"]), "jpeg", "left out"),
        (RungConfig("pgd", rows=["none"]), "none", {}),
    ],
)
def test_a_rung_applies_or_says_in_a_word_why_not(tmp_path: Path, rung: RungConfig, row: str, expected: object) -> None:
    matrix = tiny_ladder(tmp_path, rungs=("noise",))
    (target,) = [target for target in targets_of(matrix) if target.label == row]
    options, why = fitting_options(rung, target)
    assert (why if isinstance(expected, str) else options) == expected
    assert (why is None) == (not isinstance(expected, str))


def test_white_and_black(finished: Matrix) -> None:
    told = {(c.config.attack, c.target.label): is_white_box(c) for c in plan_ladder(finished)}
    assert told["pgd", "none"]
    assert told["pgd", "baseline"]
    assert not told["pgd", "jpeg"]
    assert told["adaptive_pgd", "jpeg"]
    assert not told["hopskipjump", "none"]
    assert not told["noise", "none"]
    assert set(BLACK_BOX) <= set(DEFENSE_AWARE)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ladder.identity.attack=adaptive", "`ladder.identity.attack` must be one of"),
        ("ladder.identity.eps_255=4", "`ladder.identity.eps_255` must be `ladder_eps_255`=24 or null, got 4"),
        ("ladder.identity.eps_255=400", "`ladder.identity.eps_255` must be from 0 to 255"),
        ("ladder_eps_255=-1", "`ladder_eps_255` must be from 0 to 255"),
        ("ladder.identity.limit=0", "`ladder.identity.limit` must be at least 1"),
        ("ladder.identity.batch_size=0", "`ladder.identity.batch_size` must be at least 1"),
        ("ladder.identity.rows=[nobody]", "`ladder.identity.rows` must be one of none, jpeg"),
        ("ladder.identity.options.steps=0", "`ladder.identity.options.steps` must be at least 1"),
        ("+ladder.identity.options.stepps=3", "takes no option 'stepps'"),
        ("ladder.noise.attack=cw", "eps_255"),
    ],
)
def test_bad_settings_end_before_anything_runs(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        estimate_ladder(tiny_ladder(tmp_path / "run", override, rungs=("identity", "noise"), dip=False))


@pytest.mark.parametrize(("name", "message"), [("clean", "must not name a rung"), ("a/b", "must be named by letters")])
def test_bad_names_of_rungs(tmp_path: Path, name: str, message: str) -> None:
    config = typed_matrix(*ladder_overrides(rungs=("noise",), dip=False))
    with pytest.raises(ValueError, match=f"`ladder` {message}"):
        prepare_matrix(replace(config, ladder={name: RungConfig("pgd")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_row_must_not_be_called_as_the_baseline(tmp_path: Path, baseline: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="must not name one 'baseline'"):
        tiny_ladder(tmp_path, *baseline, "+rival@rows.baseline=none", rungs=("noise",), dip=False)


def test_the_experiment_has_all_rungs_of_the_issue() -> None:
    ladder = typed_matrix("experiment=adaptive").ladder
    assert [rung.number for rung in ladder.values() if rung.check is None] == [
        "1", "2", "3a", "3b", "4a", "4b", "4c", "5a", "5b", "5c", "5d", "6", "7a", "7b", "8",
    ]  # fmt: skip
    assert sorted(str(rung.check) for rung in ladder.values() if rung.check) == ["control", "large_eps"]
    for rung in ladder.values():
        assert rung.attack in {**ATTACKS, **DEFENSE_AWARE}
        assert set(rung.full) <= set(rung.options)


@pytest.mark.slow
def test_the_whole_experiment_on_digits(tmp_path: Path, baseline: tuple[str, ...]) -> None:
    few = (*baseline, "data.limit=2", "~rows.none")
    made = run_tiny_ladder(tmp_path, *few)
    assert {"ladder.md", "ladder.png", "report.md"} <= {path.name for path in made}
    matrix = tiny_ladder(tmp_path, *few)
    told, costs = lines(matrix), estimate_ladder(matrix)
    for (rung, row), line in told.items():
        if row == "dipguard":
            assert line["status"] == "done"
            if rung not in ("clean", "worst_case"):
                assert int(line["dip_steps"]) <= costs[f"{rung} x {row}"].dip_steps
    assert told["mean_image", "dipdefend"]["status"] == "no such readout"
    assert "the ladder" in (tmp_path / "report.md").read_text().lower()
    texts = {path: path.read_bytes() for path in made if "ladder" in path.name}
    before = stored(matrix)
    for path in texts:
        path.unlink()
    evaluate.run(compose_matrix(*ladder_overrides(*few, "rebuild=true")), tmp_path)
    assert {path: path.read_bytes() for path in texts} == texts
    assert stored(matrix) == before
