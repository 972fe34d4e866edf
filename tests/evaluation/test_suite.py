"""The attack suite from end to end: real digits, real attacks, real defences; short."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dipguard.attacks import ATTACKS
from dipguard.evaluation import masking
from dipguard.evaluation.cell import fitting_options
from dipguard.evaluation.matrix import Matrix
from dipguard.evaluation.metrics import wilson
from dipguard.evaluation.plan import prepare
from dipguard.evaluation.results import suite_results, worst_case, write_results
from dipguard.evaluation.runner import run
from dipguard.registry import lookup
from dipguard.victims import build_victim
from tests.csv_files import read_csv
from tests.tiny_matrix import completed, typed_matrix, written
from tests.tiny_suite import run_tiny_suite, tiny_suite

FAST = ("transfer", "identity", "identity_eot", "last_iterate", "short_dip", "hopskipjump", "noise", "large_eps")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that name another classifier: the digits' own, its weights moved a little."""
    state = build_victim("digits_cnn", progress=False).network.state_dict()
    draws = torch.Generator().manual_seed(0)
    moved = {name: w * (1 + 0.1 * torch.randn(w.shape, generator=draws)) for name, w in state.items() if w.ndim > 1}
    path = tmp_path_factory.mktemp("baseline") / "moved.pt"
    torch.save({**state, **moved}, path)
    return "victim@baseline=digits_cnn", f"baseline.weights={path}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, baseline: tuple[str, ...]) -> Matrix:
    """Feed-forward defences and a second victim as baseline."""
    return completed(tiny_suite(tmp_path_factory.mktemp("suite"), *baseline, attacks=FAST, dip=False))


def lines(matrix: Matrix) -> dict[tuple[str, str], dict[str, str]]:
    read = read_csv(matrix.folder / "results.csv")
    made = {(line["attack"], line["defense"]): line for line in read}
    assert len(made) == len(read)
    return made


def test_every_cell_is_done_or_says_why_not(finished: Matrix) -> None:
    made = lines(finished)
    assert {defense for _, defense in made} == {"none", "jpeg", "baseline"}
    assert {attack for attack, _ in made} == {"clean", *FAST, "worst_case"}
    skipped = {"identity_eot": "deterministic", "last_iterate": "no such intermediate", "short_dip": "no DIP"}
    for (attack, _), line in made.items():
        assert line["status"] == skipped.get(attack, "done")
        figures = [line[name] for name in ("n", "correct", "accuracy", "low", "high")]
        assert all(figures) if line["status"] == "done" else not any(figures)


def test_figures_are_those_of_the_attacked_images_behind_the_defence(finished: Matrix) -> None:
    made, labels = lines(finished), finished.clean.labels
    for attack in ("transfer", "identity", "hopskipjump", "noise", "large_eps"):
        attacked = finished.attacked(attack, "jpeg")
        (result,) = finished.results[attack, "jpeg"]
        assert attacked.dtype == torch.float32
        with torch.no_grad():
            purified = finished.targets["jpeg"].defense.purify(attacked, indices=finished.clean.indices)
            assert torch.equal(purified, finished.reconstructions(attack, "jpeg"))
            read = finished.targets["none"].victim(purified).argmax(1)
        assert result.right.tolist() == (read == labels).tolist()
        eps = 64 if attack == "large_eps" else 24
        assert float((attacked - finished.clean.images).abs().max()) <= eps / 255 + 1e-6
        line = made[attack, "jpeg"]
        assert (int(line["n"]), int(line["correct"])) == (4, int(result.right.sum()))
        assert float(line["eps_255"]) == eps
        low, high = wilson(int(result.right.sum()), 4)
        assert (float(line["low"]), float(line["high"])) == pytest.approx((low, high), abs=1e-6)


def test_worst_case_is_each_images_worst(finished: Matrix) -> None:
    made = lines(finished)
    for defense in ("none", "jpeg", "baseline"):
        # Neither the control nor the large eps.
        verdicts = [finished.results[a, defense][0].right for a in ("clean", "transfer", "identity", "hopskipjump")]
        right = torch.stack(verdicts).all(dim=0)
        assert int(made["worst_case", defense]["correct"]) == int(right.sum())
        assert made["worst_case", defense]["note"] == "over 3 attacks"
        assert float(made["worst_case", defense]["eps_255"]) == 24


def test_an_attack_on_fewer_images_counts_for_those_alone(tmp_path: Path) -> None:
    matrix = tiny_suite(tmp_path, "+attacks.identity.limit=2", attacks=("transfer", "identity"), dip=False)
    run(matrix)
    assert lines(matrix)["identity", "none"]["cut"] == "steps 2 of 200, the first 2 images"
    results = suite_results(matrix, matrix.targets["none"])
    rights = {result.cell.label: result.right for result in results}
    assert (len(rights["transfer"]), len(rights["identity"])) == (4, 2)
    expected = [bool(rights["transfer"][i]) and (i >= 2 or bool(rights["identity"][i])) for i in range(4)]
    assert worst_case(results).tolist() == expected
    assert worst_case([]) is None
    limited = [result for result in results if result.cell.label == "identity"]
    whole = matrix.results["clean", "none"][0]
    assert len(whole.right) == 4
    for clean in (None, whole):  # images that no attack was made on have no worst case
        assert len(worst_case(limited, clean)) == 2
    labels, misread = matrix.clean.labels, torch.tensor([0, 0, 1, 0])
    clean = replace(matrix.results["clean", "none"][0], decisions=(labels + misread) % 10)
    assert worst_case(results, clean).tolist() == [e and not m for e, m in zip(expected, misread, strict=True)]


def test_costs_are_told_before_and_counted_after(finished: Matrix, caplog: pytest.LogCaptureFixture) -> None:
    made = lines(finished)
    again = prepare(finished.config, finished.folder / "elsewhere")
    for attack in ("identity", "hopskipjump"):
        cell, line = again.cell(attack, "jpeg"), made[attack, "jpeg"]
        assert 0 < int(line["victim_queries"]) <= cell.cost.victim_queries
        assert int(line["dip_steps"]) == 0
    assert int(made["transfer", "jpeg"]["purifications"]) == 0
    fewer = {label: node for label, node in again.config.attacks.items() if label in ("transfer", "identity")}
    small = prepare(replace(again.config, attacks=fewer), finished.folder / "elsewhere")
    with caplog.at_level(logging.INFO, logger="dipguard"):
        run(small)
    assert f"identity x jpeg will cost at most {small.cell('identity', 'jpeg').cost}" in caplog.text
    assert "transfer x jpeg will cost" not in caplog.text


def test_what_is_finished_is_not_run_again_and_what_is_lost_is(finished: Matrix) -> None:
    before, then = written(finished), lines(finished)
    cell = finished.cell("identity", "jpeg")
    attacked = finished.attacked("identity", "jpeg")
    lost = finished.store.file("cells", cell.key)
    damaged = finished.store.file("attacks", cell.attack_key)
    lost.unlink()
    damaged.write_bytes(b"no archive")
    again = completed(prepare(finished.config, finished.folder))
    assert {path for path, made in written(again).items() if made != before[path]} == {lost, damaged}
    assert torch.equal(again.attacked("identity", "jpeg"), attacked)
    old, new = ({k: (v["correct"], v["options"]) for k, v in made.items()} for made in (then, lines(again)))
    assert new == old


def test_a_worst_case_names_what_it_lacks_also_in_a_rebuild(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = tiny_suite(tmp_path, attacks=("transfer", "identity", "noise"), dip=False)
    for cell in matrix.cells:
        if cell.label == "identity":
            monkeypatch.setattr(cell.attack, "attack_batch", lambda *batch: 1 / 0)
    assert len(run(matrix)) == 2
    for rebuild in (False, True):
        again = prepare(replace(matrix.config, rebuild=rebuild), tmp_path)
        if rebuild:
            write_results(again)
        told = lines(again)
        assert told["worst_case", "jpeg"]["note"] == "over 1 attacks, without identity"
        assert told["identity", "jpeg"]["status"] == "failed: ZeroDivisionError: division by zero"


def test_a_failing_randomness_check_is_told_and_made_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("the card fell off the bus")

    matrix = tiny_suite(tmp_path, attacks=("transfer",), dip=False)
    with monkeypatch.context() as patched:
        patched.setattr(masking, "check_randomness", broken)
        failed = run(matrix)
    told = "RuntimeError: the card fell off the bus"
    assert failed == [f"randomness check x {defense}: {told}" for defense in ("none", "jpeg")]
    assert {line["status"] for line in lines(matrix).values()} == {"done"}
    target = matrix.targets["jpeg"]
    assert masking.randomness_of(matrix, target) is None
    assert run(prepare(matrix.config, tmp_path)) == []
    assert masking.randomness_of(matrix, target) == (0, 0)


def test_the_baseline_is_attacked_itself(finished: Matrix) -> None:
    target = finished.targets["baseline"]
    assert target.victim is not finished.targets["none"].victim
    assert target.defense.name == "none"
    ours, theirs = (finished.attacked("transfer", label) for label in ("none", "baseline"))
    assert (ours != theirs).any()
    assert torch.equal(ours, finished.attacked("transfer", "jpeg"))
    made = lines(finished)
    assert int(made["transfer", "baseline"]["correct"]) < int(made["clean", "baseline"]["correct"])


@pytest.mark.parametrize(
    ("node", "defense", "expected"),
    [
        ({"name": "adaptive_pgd", "intermediate": ["last"]}, "jpeg", "no such intermediate"),
        ({"name": "adaptive_pgd", "intermediate": ["last"]}, "mirror", {"intermediate": "last"}),
        ({"name": "adaptive_pgd", "intermediate": ["on_boundary", "mean"]}, "mirror", {"intermediate": "mean"}),
        ({"name": "adaptive_pgd", "intermediate": "stitched"}, "jpeg", {"intermediate": "stitched"}),
        ({"name": "adaptive_pgd", "intermediate": "last"}, "jpeg", "no such intermediate"),
        ({"name": "adaptive_pgd", "eot_iter": 2}, "jpeg", "deterministic"),
        ({"name": "adaptive_pgd", "eot_iter": 2}, "mirror", {"eot_iter": 2}),
        ({"name": "defended_autoattack", "eot_iter": 2}, "jpeg", {"eot_iter": 1}),
        ({"name": "defended_autoattack", "eot_iter": 2}, "mirror", {"eot_iter": 2}),
        ({"name": "unrolled"}, "jpeg", "no DIP"),
        ({"name": "adaptive_pgd", "backward": "short_dip"}, "none", "no DIP"),
        ({"name": "adaptive_pgd", "backward": "short_dip"}, "mirror", {"backward": "short_dip"}),
        ({"name": "pgd", "only": ["none"]}, "jpeg", "left out"),
        ({"name": "pgd", "only": ["none"]}, "none", {}),
        ({"name": "pgd", "number": "1", "full": {"steps": 9}, "steps": 3}, "none", {"steps": 3}),
    ],
)
def test_an_attack_applies_or_says_why_not(
    suite: Matrix, node: dict[str, object], defense: str, expected: object
) -> None:
    target = suite.targets[defense]
    kind = lookup(ATTACKS, str(node["name"]), argument="attack")
    assert isinstance(kind, type)
    options, why = fitting_options(node, target, kind=kind, source=target)
    assert (why if isinstance(expected, str) else options) == expected
    assert (why is None) == (not isinstance(expected, str))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return tiny_suite(tmp_path_factory.mktemp("plan"), attacks=("noise", "transfer"))


def test_white_and_black_box(finished: Matrix) -> None:
    told = {(cell.name, cell.target.label): cell.white_box for cell in finished.cells if cell.attack is not None}
    assert told["pgd", "none"]
    assert told["pgd", "baseline"]
    assert not told["pgd", "jpeg"]
    assert told["adaptive_pgd", "jpeg"]
    assert not told["hopskipjump", "none"]
    assert not told["noise", "none"]


def test_what_was_cut_is_said(suite: Matrix, finished: Matrix) -> None:
    assert finished.cell("identity", "jpeg").cut == "steps 2 of 200"
    default = replace(finished.cell("identity", "jpeg"), node={"name": "adaptive_pgd", "full": {"coarse": 7}})
    assert default.cut == f"coarse {default.attack.coarse} of 7", "options that the node leaves out are cut too"
    longer = replace(finished.cell("identity", "jpeg"), node={"name": "adaptive_pgd", "full": {"steps": 1}})
    assert longer.cut == ""
    assert suite.cell("clean", "mirror").cut == "T 20 of 170"
    assert finished.cell("clean", "jpeg").cut == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attacks.identity.name=adaptive", "`attacks.identity.name` must be one of"),
        ("attacks.identity.eps_255=4", "`attacks.identity.eps_255` must be `eps_255`=24, got 4"),
        ("eps_255=-1", "`eps_255` must be from 0 to 255"),
        ("+attacks.identity.batch_size=0", "`attacks.identity.batch_size` must be at least 1"),
        ("attacks.identity.steps=0", "`attacks.identity.steps` must be at least 1"),
        ("attacks.noise.name=cw", "eps_255"),
        ("+attack@attacks.cw=cw +attacks.cw.number=x", "`attacks.cw.eps_255` must be `eps_255`=24, got none"),
        ("attacks.clean.name=noise", "`attacks.clean` must be the attack 'none'"),
        (
            "~attacks.identity.number +attacks.identity.check=control",
            "`attacks.identity.check` needs attacks with a `number`, got 'control' alone",
        ),
    ],
)
def test_bad_settings_end_before_anything_runs(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tiny_suite(tmp_path / "run", *override.split(), attacks=("identity", "noise"), dip=False)


def test_a_defence_must_not_be_called_as_the_baseline(tmp_path: Path, baseline: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="must not name one 'baseline'"):
        tiny_suite(tmp_path, *baseline, "+defense@defenses.baseline=none", attacks=("noise",), dip=False)


def test_the_experiment_has_all_attacks_and_the_short_ladder_some() -> None:
    attacks, short = (typed_matrix("experiment=adaptive", *more).attacks for more in (("ladder=full",), ()))
    assert [node["number"] for node in attacks.values() if node.get("number")] == [
        "1", "1b", "1c", "1d", "2", "3a", "3b", "3c", "4a", "4b", "4c", "5a", "5b", "5c", "5d", "6", "7a", "7b", "8",
        "7c", "8b",
    ]  # fmt: skip
    assert [node["number"] for node in short.values() if node.get("number")] == [
        "1", "1b", "1c", "1d", "2", "3a", "3c", "4a", "5c", "5d", "7a",
    ]  # fmt: skip
    config = typed_matrix("experiment=adaptive", "ladder=full")
    assert config.judge == typed_matrix("experiment=adaptive").judge == 10
    assert set(config.defenses) == {"none", "jpeg", "dipdefend", "paper", "mirror"}
    assert (attacks["blur"]["steps"], attacks["blur_eot"]["eot_iter"]) == (200, 20)
    assert (attacks["hopskipjump"]["queries"], attacks["hopskipjump_500"]["queries"]) == (2500, 500)
    assert (attacks["square"]["n_queries"], attacks["square_500"]["n_queries"]) == (2500, 500)
    assert sorted(str(node["check"]) for node in attacks.values() if node.get("check")) == ["control", "large_eps"]
    for node in attacks.values():
        assert node["name"] in ATTACKS
        assert set(node.get("full") or {}) <= set(node)


def test_several_budgets_of_one_attack_are_a_row_each(tmp_path: Path) -> None:
    settings = typed_matrix(
        "data.limit=3", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "figures=0",
        "~attacks.fgsm_8", "~attacks.pgd_8", "~attacks.clean", "~defenses.median", "~defenses.dip_fixed",
        "~defenses.paper", "~defenses.mirror", "+attack@attacks.bpda=bpda", "attacks.bpda.budgets=[1,3]",
        "attacks.bpda.eps_255=16",
    )  # fmt: skip
    matrix = completed(prepare(settings, tmp_path))
    rows = read_csv(tmp_path / "results.csv")
    assert [(row["defense"], row["eps_255"], row["budget"]) for row in rows] == [
        (defense, "16.0", budget) for defense in ("none", "jpeg") for budget in ("1", "3")
    ]
    assert not (tmp_path / "checks.csv").exists()  # there is no suite
    for number, result in enumerate(matrix.results["bpda", "jpeg"]):
        attacked = matrix.attacked("bpda", "jpeg", snapshot=number)
        purified = matrix.targets["jpeg"].defense.purify(attacked, indices=matrix.clean.indices)
        assert torch.equal(purified, matrix.reconstructions("bpda", "jpeg", snapshot=number))
        assert int(rows[2 + number]["correct"]) == int(result.right.sum())
    # One run served both budgets, and is counted once.
    assert [bool(row["gradients"]) for row in rows] == [False, True, False, True]
    first, last = (matrix.attacked("bpda", "jpeg", snapshot=number) for number in (0, 1))
    assert not torch.equal(first, last)
    assert torch.equal(matrix.attacked("bpda", "jpeg"), last)


@pytest.mark.slow
def test_the_whole_experiment_on_digits(tmp_path: Path, baseline: tuple[str, ...]) -> None:
    aside = ("~defenses.none", "~defenses.paper", "~attacks.from_paper", "~attacks.from_dipdefend")
    overrides = (
        *baseline,
        "data.limit=1",
        "attacks.hopskipjump.queries=6",
        *aside,
        "~attacks.square_500",
        "~attacks.hopskipjump_500",
    )
    made = run_tiny_suite(tmp_path, *overrides)
    names = {path.name for path in made}
    assert {"suite.md", "suite.png", "report.md"} <= names
    assert "table1.md" not in names  # there is nothing beside the suite
    matrix = tiny_suite(tmp_path, *overrides)
    told, before = lines(matrix), written(matrix)
    for (attack, defense), line in told.items():
        if defense == "mirror":
            assert line["status"] == "done"
            if attack != "worst_case":
                cell = matrix.cell(attack, defense)
                assert int(line["dip_steps"]) <= cell.cost.dip_steps
    assert told["mean_image", "dipdefend"]["status"] == "no such intermediate"
    texts = {path: path.read_bytes() for path in made if "suite" in path.name}
    for path in texts:
        path.unlink()
    run_tiny_suite(tmp_path, *overrides, "rebuild=true")
    assert {path: path.read_bytes() for path in texts} == texts
    assert written(matrix) == before


def test_the_short_ladder_takes_what_its_comment_says(tmp_path: Path) -> None:
    overrides = ("experiment=adaptive", "data=digits", "victim=digits_cnn", "trainer.accelerator=cpu")
    matrix = prepare(typed_matrix(*overrides, "data.limit=16", "defenses.mirror.preset=cifar10"), tmp_path)
    dip = [cell for cell in matrix.cells if cell.why is None and cell.target.defense.steps_per_image]
    made = {cell.attack_key: cell.cost for cell in dip if cell.cost.purifications}
    judged = {cell.key: cell for cell in dip}
    costs = [*made.values(), *(cell.judging for cell in judged.values())]
    assert sum(cost.purifications for cost in made.values()) == 5296
    assert sum(cell.judging.purifications for cell in judged.values()) == 4736
    assert round(sum(cost.dip_steps for cost in costs) / 1e6, 1) == 6.0


def test_square_is_a_black_box(tmp_path: Path) -> None:
    plain = "+attacks.plain={name: square, eps_255: 24}"
    matrix = tiny_suite(tmp_path, plain, attacks=("square",), dip=False)
    assert not any(matrix.cell(attack, "none").white_box for attack in ("square", "plain"))
