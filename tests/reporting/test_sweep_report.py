"""Sweeps' reports, from job folders as a sweep leaves them; sweeps that really run are in tests/sweeps."""

import csv
import io
import json
import os
import re
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from dipguard.evaluation.metrics import wilson
from dipguard.reporting import sweep_report
from dipguard.reporting.sweep_jobs import Sweep, read_sweep, short_labels, text_of
from dipguard.reporting.sweep_report import (
    MEAN,
    Grid,
    best_section,
    draw_lines,
    draw_map,
    long_csv,
    pair_section,
    state_section,
    summary,
)
from tests.csv_files import read_csv
from tests.reporting.stored_run import cell, write_results

N = 32


def correct(T: int | None, network: str, beta: float, attack: str) -> int:
    """Right of 32 by a rule: T and network matter, beta hardly."""
    right = 20 + 2 * {"medium": 1, "large": 2}.get(network, 0) + (beta == 0.5) - 5 * (attack == "pgd_8")
    return right if T is None else right + T // 100


def job(
    folder: Path, *, T: int | None = 200, network: str = "small", beta: float = 0.5, state: str = "DONE"
) -> list[str]:
    """Write a job's folder; return its overrides."""
    values = {"T": T, "network": network, "beta": beta}
    (folder / ".hydra").mkdir(parents=True)
    texts = {name: "null" if value is None else value for name, value in values.items()}
    overrides = [f"defenses.paper.{name}={text}" for name, text in texts.items()] + ["logger=csv", "+sweep=grid"]
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    (folder / "config.yaml").write_text(json.dumps({"defenses": {"paper": {"name": "paper", **values}}}))
    if state:
        (folder / state).write_text(json.dumps({"key": "k", "seconds": 1, "error": "ValueError", "message": "bad | T"}))
    if state == "DONE":
        write_results(folder, [cell(a, "paper", correct(T, network, beta, a), n=N) for a in ("clean", "pgd_8")])
    return overrides


def write_plan(folder: Path, jobs: dict[str, list[str]], **more: Any) -> Path:
    planned = [{"folder": name, "overrides": overrides} for name, overrides in jobs.items()]
    (folder / "sweep.json").write_text(json.dumps({"began": 0, "sweep": "grid", "jobs": planned, **more}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A full grid of T and network, and beta varied alone."""
    jobs = {}
    for T, network in product((300, 100, 200), ("small", "large")):
        jobs[f"{T}-{network}"] = job(tmp_path / f"{T}-{network}", T=T, network=network)
    jobs["beta"] = job(tmp_path / "beta", beta=0.9)
    return write_plan(tmp_path, jobs)


T, NETWORK, BETA = (f"defenses.paper.{name}" for name in ("T", "network", "beta"))


def test_parameters_are_what_differs_in_their_order(folder: Path) -> None:
    sweep = read_sweep(folder)
    assert dict(sweep.parameters) == {T: (100, 200, 300), NETWORK: ("small", "large"), BETA: (0.5, 0.9)}
    assert dict(sweep.labels) == {T: "T", NETWORK: "network", BETA: "beta"}
    assert (sweep.name, sweep.defenses) == ("grid", ["paper"])
    assert list(sweep.results["attack"].unique()) == ["clean", "pgd_8"]
    assert sweep.setting("beta") == "T = 200, network = small, beta = 0.9"


def share(*settings: tuple[int | None, str, float], attacks: tuple[str, ...] = ("clean", "pgd_8")) -> float:
    return float(np.mean([correct(*setting, attack) / N for setting in settings for attack in attacks]))


def test_jobs_are_compared_only_where_all_else_is_equal(folder: Path) -> None:
    grid = Grid(read_sweep(folder), "paper")
    ranked = grid.ranking()
    assert ranked.iloc[0]["job"] == "300-large"
    assert ranked["value"].is_monotonic_decreasing
    profile = grid.profile(T)
    # The job with another beta is a setting of its own, with a single T.
    assert profile["value"].tolist() == pytest.approx(
        [share(*((T, network, 0.5) for network in ("small", "large"))) for T in (100, 200, 300)]
    )
    assert grid.profile(T, "pgd_8")["value"].tolist() == pytest.approx(
        [share(*((T, n, 0.5) for n in ("small", "large")), attacks=("pgd_8",)) for T in (100, 200, 300)]
    )
    assert grid.profile(BETA)["value"].tolist() == pytest.approx([share((200, "small", b)) for b in (0.5, 0.9)])
    assert (profile["low"] < profile["value"]).all()
    assert (profile["value"] < profile["high"]).all()


def test_interval_of_a_mean_is_that_of_one_attacks_images(folder: Path) -> None:
    scores = Grid(read_sweep(folder), "paper").of(MEAN).set_index("job")
    right = share((100, "small", 0.5)) * N
    assert right % 1 == 0.5
    assert scores.loc["100-small", "low"] == pytest.approx(wilson(int(right), N)[0])
    assert scores.loc["100-small", "high"] == pytest.approx(wilson(int(right) + 1, N)[1])


def test_parameters_varied_together_make_a_map_and_a_cross_does_not(folder: Path) -> None:
    grid = Grid(read_sweep(folder), "paper")
    assert [pair for pair, _ in grid.maps()] == [(T, NETWORK)]
    cells = grid.map((T, NETWORK))
    for (i, j), line in cells.iterrows():
        assert line["value"] == pytest.approx(share(((100, 200, 300)[i], ("small", "large")[j], 0.5)))
    assert grid.map((T, BETA)) is None


def test_report_has_all_files_and_figures(folder: Path) -> None:
    made = sweep_report.write_sweep_report(folder)
    names = ["report.md", "sweep.csv", "figure6_mean.png", "figure7_columns.png", "map_T_network.png"]
    assert [path.name for path in made] == names
    for path in made[2:]:
        assert (matplotlib.image.imread(path)[..., :3] < 0.95).any(axis=2).mean() > 0.05
    report = (folder / "report.md").read_text()
    assert "7 jobs: 7 done." in report
    assert f"Best mean over 2 attacks: {100 * share((300, 'large', 0.5)):.1f} % at T = 300, network = large" in report
    assert "The paper's Table 3" in report
    assert f"| small | {100 * share((100, 'small', 0.5)):.1f} (" in " ".join(report.split())
    assert report.index("| small ") < report.index("![figure6_mean]"), "tables come before figures"
    lines = read_csv(folder / "sweep.csv")
    assert len(lines) == 7 * 2
    assert {(line["T"], line["network"]) for line in lines} == {
        (str(T), n) for T in (100, 200, 300) for n in ("small", "large")
    }
    assert "best mean accuracy of defence paper" in summary(folder)


def test_lines_and_maps_show_the_figures(folder: Path) -> None:
    grid = Grid(read_sweep(folder), "paper")
    figure = draw_lines(grid, mean=True)
    assert [ax.get_xlabel() for ax in figure.axes if ax.axison] == ["T", "network", "β"]
    thick = [line for line in figure.axes[0].get_lines() if line.get_marker() != "None"]
    assert list(thick[0].get_xdata()) == [100, 200, 300]
    assert list(thick[0].get_ydata()) == pytest.approx((100 * grid.profile(T)["value"]).tolist())
    by_attack = draw_lines(grid, mean=False)
    assert [text.get_text() for text in by_attack.legends[0].get_texts()] == ["Clean", "PGD 8"]
    ((pair, cells),) = grid.maps()
    (ax,) = draw_map(grid, pair, cells).axes
    values = np.asarray(ax.images[0].get_array())
    assert values[0, 0] == pytest.approx(100 * share((100, "small", 0.5)))
    assert values.shape == (2, 3)


def table_of(sweep: Sweep) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(long_csv(sweep), newline="")))


def test_null_is_a_value_with_a_place_and_a_name_of_its_own(tmp_path: Path) -> None:
    jobs = {}
    for T_, network in product((100, None, 200), ("small", "large")):
        jobs[f"{T_}-{network}"] = job(tmp_path / f"{T_}-{network}", T=T_, network=network)
    sweep = read_sweep(write_plan(tmp_path, jobs))
    assert dict(sweep.parameters) == {T: (100, "null", 200), NETWORK: ("small", "large")}
    assert sweep.setting("None-small") == "T = null, network = small"
    assert [line["T"] for line in table_of(sweep)] == [T_ for T_ in ("100", "null", "200") for _ in range(2 * 2)]
    grid = Grid(sweep, "paper")
    expected = [100 * share((T_, "small", 0.5), (T_, "large", 0.5)) for T_ in (100, None, 200)]
    ax = draw_lines(grid, mean=True).axes[0]
    (line,) = (line for line in ax.get_lines() if line.get_marker() != "None")
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 1, 2], pytest.approx(expected))
    assert [text.get_text() for text in ax.get_xticklabels()] == ["100", "null", "200"]
    ((pair, cells),) = grid.maps()
    assert "| network / T | 100 | null | 200 |" in " ".join(pair_section(grid, pair, cells).split())
    (ax,) = draw_map(grid, pair, cells).axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["100", "null", "200"]
    assert ax.images[0].get_array()[0, 1] == pytest.approx(100 * share((None, "small", 0.5)))


def test_null_is_read_from_what_a_job_was_given_and_from_its_choices(tmp_path: Path) -> None:
    given = {"a": [f"{T}=null", "victim@surrogate=null"], "b": [f"{T}=100", "victim@surrogate=digits_cnn"], "c": []}
    hydra = tmp_path / "c" / ".hydra" / "hydra.yaml"
    hydra.parent.mkdir(parents=True)
    hydra.write_text(json.dumps({"hydra": {"runtime": {"choices": {"victim@surrogate": None}}}}))
    sweep = read_sweep(write_plan(tmp_path, given))
    assert dict(sweep.parameters) == {T: ("null", 100), "victim@surrogate": ("null", "digits_cnn")}
    assert sweep.jobs["c"].values == {T: None, "victim@surrogate": "null"}
    assert sweep.setting("c") == "surrogate = null"


def test_a_job_without_the_key_is_no_point_of_its_line(tmp_path: Path) -> None:
    jobs = {str(T_): job(tmp_path / str(T_), T=T_) for T_ in (100, 200)}
    jobs["without"] = [text for text in job(tmp_path / "without", T=300) if not text.startswith(T)]
    (tmp_path / "without" / "config.yaml").write_text(json.dumps({"defenses": {"paper": {"name": "paper"}}}))
    grid = Grid(read_sweep(write_plan(tmp_path, jobs)), "paper")
    assert grid.parameters[T] == (100, 200)
    assert grid.profile(T).index.tolist() == [0, 1]
    assert f"| – | {100 * share((300, 'small', 0.5), attacks=('clean',)):.1f} |" in " ".join(best_section(grid).split())


def test_what_is_missing_failed_or_damaged_is_told(folder: Path) -> None:
    plan = json.loads((folder / "sweep.json").read_text())
    jobs = {entry["folder"]: entry["overrides"] for entry in plan["jobs"]}
    jobs["failed"] = job(folder / "failed", T=400, state="FAILED")
    jobs["killed"] = job(folder / "killed", T=500, state="")
    jobs["gone"] = ["defenses.paper.T=600"]
    write_plan(folder, jobs)
    (folder / "100-small" / "results.csv").write_text("no,results\n1,2\n")
    sweep = read_sweep(folder)
    report = state_section(sweep)
    assert "10 jobs: 6 done, 2 failed, 1 unfinished, 1 missing." in report
    assert "failed: ValueError: bad \\| T: T = 400, network = small, beta = 0.5 (failed)" in report
    assert re.search(r"^- failed: its results are damaged: .*\(100-small\)$", report, flags=re.MULTILINE)
    assert "missing: not begun: T = 600 (gone)" in report
    states = {line["job"]: (line["state"], line["problem"]) for line in table_of(sweep)}
    assert states["100-small"][0] == "failed"
    assert states["killed"] == ("unfinished", "running, or killed before its end")
    assert states["gone"] == ("missing", "not begun")
    assert states["200-small"] == ("done", "")


def test_no_field_of_the_table_is_a_formula(folder: Path) -> None:
    jobs = {"=1+1": job(folder / "=1+1", network="@sum"), "plain": job(folder / "plain")}
    lines = table_of(read_sweep(write_plan(folder, jobs)))
    assert {(line["job"], line["network"]) for line in lines} >= {("'=1+1", "'@sum")}
    assert not any(value[:1] in ("=", "+", "-", "@") for line in lines for value in line.values())


def test_jobs_of_an_earlier_grid_are_left_out(folder: Path) -> None:
    plan = json.loads((folder / "sweep.json").read_text())
    write_plan(folder, {entry["folder"]: entry["overrides"] for entry in plan["jobs"][:2]})
    sweep = read_sweep(folder)
    assert (len(sweep.jobs), sweep.others) == (2, 5)
    assert "5 more of earlier starts" in summary(folder)
    for damaged in ("[]", "{"):
        (folder / "sweep.json").write_text(damaged)
        assert len(read_sweep(folder).jobs) == 7


def test_a_defence_that_no_parameter_acts_on_is_one_line_below_the_swept_ones(tmp_path: Path) -> None:
    jobs = {}
    for T in (100, 200):
        jobs[str(T)] = job(tmp_path / str(T), T=T)
        write_results(
            tmp_path / str(T),
            [cell("clean", "none", 31, n=N), cell("clean", "paper", correct(T, "small", 0.5, "clean"), n=N)],
        )
    made = sweep_report.write_sweep_report(write_plan(tmp_path, jobs))
    assert [path.name for path in made] == ["report.md", "sweep.csv", "figure6_mean_paper.png"]
    report = (tmp_path / "report.md").read_text()
    heads = [line for line in report.splitlines() if line.startswith("#")]
    assert heads == [
        "# Sweep grid", "## Settings: paper", "## Defences that the parameters do not act on",
        "## Mean accuracy (Figure 6): paper",
    ]  # fmt: skip
    assert sum(line.startswith("| none ") for line in report.splitlines()) == 1
    assert "defence none" not in summary(tmp_path)


@pytest.mark.parametrize("label", ["mirror", "paper"])
def test_defences_that_the_sweep_chose_are_compared_in_one_table(tmp_path: Path, label: str) -> None:
    jobs = {}
    for name, found, right in (("paper", "paper", 16), ("own", label, 24)):  # a config of one's own may be of `paper`
        jobs[name] = [*job(tmp_path / name), f"defense={name}"]
        write_results(tmp_path / name, [cell("clean", found, right, n=N)])
    sweep_report.write_sweep_report(write_plan(tmp_path, jobs))
    report = (tmp_path / "report.md").read_text()
    if label == "paper":
        assert "75.0 % at defense = own." in report
    else:
        assert [line for line in report.splitlines() if line.startswith("##")] == ["## Results"]
        assert re.findall(r"\| (paper|mirror) *\| *([\d.]+) \|", report) == [("paper", "50.0"), ("mirror", "75.0")]
        assert "best mean accuracy of defence" not in report


def test_a_mean_is_over_the_attacks_that_the_defence_has_without_worst_case_and_checks(tmp_path: Path) -> None:
    jobs = {}
    for steps, right in ((100, 10), (200, 20)):
        jobs[str(steps)] = job(tmp_path / str(steps), T=steps)
        lines = [cell("clean", name, 30, n=N) for name in ("none", "paper")]
        lines += [cell("blur", "none", 1, n=N, number="3a"), cell("identity", "paper", right, n=N, number="2")]
        lines += [cell("noise", "paper", 31, n=N, check="control"), cell("worst_case", "paper", 0, n=N, number="9")]
        write_results(tmp_path / str(steps), lines)
    sweep = read_sweep(write_plan(tmp_path, jobs))
    grid = Grid(sweep, "paper")
    assert grid.ranking()["value"].tolist() == pytest.approx([25 / N, 20 / N])
    assert grid.profile(T, "worst_case")["value"].tolist() == [0, 0]
    assert Grid(sweep, "none").ranking()["value"].tolist() == pytest.approx([15.5 / N])
    assert tmp_path / "figure7_columns_paper.png" in sweep_report.write_sweep_report(tmp_path)
    assert f"Best mean over 2 attacks: {2500 / N:.1f} % at T = 200" in (tmp_path / "report.md").read_text()


def test_where_the_attack_is_swept_each_job_has_the_mean_of_its_own(tmp_path: Path) -> None:
    jobs = {}
    for attack, right in (("fgsm", 9), ("pgd", 5)):
        jobs[attack] = [*job(tmp_path / attack), f"attack={attack}"]
        write_results(tmp_path / attack, [cell(attack, "paper", right, n=N)])
    sweep_report.write_sweep_report(write_plan(tmp_path, jobs))
    report = (tmp_path / "report.md").read_text()
    assert f"Best mean over 1 attack: {900 / N:.1f} % at attack = fgsm." in report
    assert "| pgd " in report


def test_a_parameter_that_is_called_like_a_column_has_one_of_its_own(tmp_path: Path) -> None:
    jobs = {seed: [*job(tmp_path / seed), f"seed={seed}"] for seed in ("1", "2")}
    lines = table_of(read_sweep(write_plan(tmp_path, jobs)))
    assert {(float(line["seed"]), line["seed (swept)"]) for line in lines} == {(0, seed) for seed in jobs}


def test_map_of_equal_cells_can_be_read(tmp_path: Path) -> None:
    jobs = {f"{a}-{b}": job(tmp_path / f"{a}-{b}", T=a, beta=b) for a, b in product((100, 101), (0.1, 0.2))}
    grid = Grid(read_sweep(write_plan(tmp_path, jobs)), "paper")
    ((pair, cells),) = grid.maps()
    (ax,) = draw_map(grid, pair, cells).axes
    (image,) = ax.images
    shades = [sum(image.to_rgba(image.get_array())[i, j, :3]) / 3 for i, j in product(range(2), range(2))]
    assert len(ax.texts) == 4
    for text, shade in zip(ax.texts, shades, strict=True):
        assert abs({"black": 0.0, "white": 1.0}[text.get_color()] - shade) > 0.45


def test_groups_deletions_and_dicts_are_parameters(tmp_path: Path) -> None:
    jobs = {
        "a": ["attack@attacks.clean=none", "defenses.jpeg={quality:30}"],
        "b": ["attack@attacks.clean=fgsm", "defenses.jpeg={quality:75}", "~defenses.none"],
    }
    sweep = read_sweep(write_plan(tmp_path, jobs))
    assert dict(sweep.parameters) == {
        "attack@attacks.clean": ("none", "fgsm"),
        "defenses.jpeg.quality": (30, 75),
        "~defenses.none": ("left out",),
    }


def test_a_sweep_without_results_has_a_report(tmp_path: Path) -> None:
    write_plan(tmp_path, {"a": ["defenses.paper.T=1"], "b": ["defenses.paper.T=2"]})
    assert [path.name for path in sweep_report.write_sweep_report(tmp_path)] == ["report.md", "sweep.csv"]
    assert "2 jobs: 0 done, 2 missing." in (tmp_path / "report.md").read_text()


def test_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no job of one"):
        read_sweep(tmp_path)


def test_labels_are_as_short_as_they_can_be() -> None:
    assert short_labels(["a.x.tau", "b.x.tau", "attack@attacks.clean"]) == {
        "a.x.tau": "a.x.tau", "b.x.tau": "b.x.tau", "attack@attacks.clean": "clean",
    }  # fmt: skip
    assert [text_of(value) for value in (None, True, 1.50, 20260101, "x")] == ["–", "True", "1.5", "20260101", "x"]


@pytest.fixture
def of_seeds(tmp_path: Path) -> Path:
    """Two betas with three seeds each, of which the larger beta is better in the mean and not in each."""
    jobs, right = {}, {0.5: (10, 12, 14), 0.9: (11, 18, 10)}
    for beta, seed in product(right, range(3)):
        name = f"{beta}-{seed}"
        jobs[name] = [*job(tmp_path / name, beta=beta), f"seed={seed}"]
        (tmp_path / name / "config.yaml").write_text(json.dumps({"seed": seed, "defenses": {"paper": {"beta": beta}}}))
        write_results(tmp_path / name, [cell("clean", "paper", right[beta][seed], n=N)])
    return write_plan(tmp_path, jobs)


def test_figures_are_means_over_seeds(of_seeds: Path) -> None:
    grid = Grid(read_sweep(of_seeds), "paper")
    assert set(grid.parameters) == {BETA}
    assert grid.ranking()["value"].tolist() == pytest.approx([13 / N, 12 / N])
    assert grid.profile(BETA)["value"].tolist() == pytest.approx([12 / N, 13 / N])
    sweep_report.write_sweep_report(of_seeds)
    report = (of_seeds / "report.md").read_text()
    assert "Figures are means over the seeds 0, 1, 2, as far as their jobs are done." in report
    assert f"{1300 / N:.1f} % at beta = 0.9. 2 of 2 settings" in report
    assert f"best mean accuracy of defence paper: {13 / N:.1%} at beta = 0.9" in summary(of_seeds)


def test_a_sweep_of_seeds_alone_has_one_mean(of_seeds: Path) -> None:
    plan = json.loads((of_seeds / "sweep.json").read_text())
    write_plan(of_seeds, {entry["folder"]: entry["overrides"] for entry in plan["jobs"][:3]})
    sweep_report.write_sweep_report(of_seeds)
    report = (of_seeds / "report.md").read_text()
    assert "## Results" in report
    assert f"| {1200 / N:.1f} " in report
    assert f"mean accuracy of defence paper: {12 / N:.1%}" in summary(of_seeds)


def test_a_search_has_the_trials_of_its_last_start(tmp_path: Path) -> None:
    for beta, when in ((0.1, 100), (0.2, 300), (0.3, 400)):
        job(tmp_path / str(beta), beta=beta)
        os.utime(tmp_path / str(beta) / ".hydra" / "overrides.yaml", (when, when))
    (tmp_path / "sweep.json").write_text(json.dumps({"began": 300.5, "sweep": "optuna", "jobs": None}))
    sweep = read_sweep(tmp_path)
    assert (sorted(sweep.jobs), sweep.others) == (["0.2", "0.3"], 1)
