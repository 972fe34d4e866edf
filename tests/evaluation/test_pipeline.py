from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from dipguard import DIPGuard
from dipguard.evaluation.pipeline import execute, pending, prepare
from dipguard.evaluation.run_folder import RunFolder, flatten
from dipguard.evaluation.settings import guard_options
from tests.tiny_run import TINY, typed_config


@pytest.mark.parametrize(
    ("fitted", "size", "groups"),
    [
        ("......", 2, [[0, 1, 2, 3, 4, 5]]),
        (".....", 2, [[0, 1, 2, 3, 4]]),
        ("xx....", 2, [[2, 3, 4, 5]]),
        ("xxxxxx", 2, []),
        (".x....", 2, [[0], [2, 3, 4, 5]]),
        ("..x...", 2, [[0, 1, 3], [4, 5]]),
        ("..xx..", 2, [[0, 1, 4, 5]]),
        ("....", 8, [[0, 1, 2, 3]]),
        ("x.x.", 1, [[1, 3]]),
    ],
)
def test_what_is_left_falls_into_the_stacks_of_an_uninterrupted_run(
    fitted: str, size: int, groups: list[list[int]]
) -> None:
    found = pending([mark == "x" for mark in fitted], size)
    assert found == groups
    stacks = [set(group[i : i + size]) for group in found for i in range(0, len(group), size)]
    first_cut = [set(range(i, min(i + size, len(fitted)))) for i in range(0, len(fitted), size)]
    assert all(any(stack <= whole for whole in first_cut) for stack in stacks)


def test_outcome_is_what_the_guard_gives_by_itself(tmp_path: Path) -> None:
    config = typed_config(*TINY, "fit.dtype=float64")
    run = prepare(config, tmp_path)
    outcome = execute(run)
    given = outcome.given
    alone = DIPGuard(run.victim, **{**guard_options(config, run.device), "stack_size": 32})
    direct = alone.defend(given, indices=run.clean.indices.tolist())
    images = torch.stack([reconstruction.image for reconstruction in outcome.reconstructions])
    assert torch.allclose(images.double(), direct.reconstructions.double(), atol=1e-5)
    assert outcome.decision_defended.tolist() == direct.decisions_after.tolist()
    assert outcome.decision_given.tolist() == direct.decisions_before.tolist()
    assert [reconstruction.reason for reconstruction in outcome.reconstructions] == direct.reasons


@pytest.mark.parametrize("saved", [None, "3", "0", "{"])
def test_a_chosen_stack_size_is_kept_for_the_sessions_to_come(
    tmp_path: Path, saved: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [*(option for option in TINY if "stack_size" not in option), "report.figures=0"]
    record = tmp_path / "stack_size.json"
    if saved is not None:
        record.write_text(saved if saved == "{" else f'{{"stack_size": {saved}}}')
    with caplog.at_level(logging.INFO, "dipguard"):
        outcome = execute(prepare(typed_config(*overrides), tmp_path))
    # 3 is what an earlier session took; nothing can be read out of the others, and a short job takes 32.
    size = 3 if saved == "3" else 32
    assert json.loads(record.read_text()) == {"stack_size": size}
    assert f"stacks of {size}" in caplog.text
    assert ("is damaged, so the stack size is chosen again" in caplog.text) == (saved in ("0", "{"))
    same = execute(prepare(typed_config(*overrides, f"fit.stack_size={size}"), tmp_path / "said"))
    assert not (tmp_path / "said" / "stack_size.json").exists()
    pairs = zip(outcome.reconstructions, same.reconstructions, strict=True)
    assert all(torch.equal(chosen.image, said.image) for chosen, said in pairs)
    assert outcome.seconds["start"] > 0


def test_seconds_of_a_folder_without_start_up_are_read(tmp_path: Path) -> None:
    (tmp_path / "fits.json").write_text(
        '{"4": {"fit": 2.0, "decide": 1.0}, "5": {"fit": 2.5, "decide": 0, "start": 3}}'
    )
    assert RunFolder(tmp_path, {}).seconds([4, 5]) == {"start": 3.0, "fit": 4.5, "decide": 1.0}


def test_progress_of_others_random_numbers_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    execute(prepare(typed_config(*TINY, "data.limit=1"), tmp_path))
    assert torch.equal(torch.get_rng_state(), before)


def test_settings_are_flattened_as_on_the_command_line() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}, "f": None}) == {"a.b": 1, "a.c.d": [2], "e": {}, "f": None}


def test_run_folder_names_every_setting_that_differs(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"seed": 0, "defense": {"tau": 0.7, "K": 15}})
    RunFolder(tmp_path, {"defense": {"K": 15, "tau": 0.7}, "seed": 0})
    with pytest.raises(ValueError, match="holds a run with other settings") as caught:
        RunFolder(tmp_path, {"seed": 1, "defense": {"tau": 0.7, "K": 15, "N": 10}})
    assert "defense.N: not set there, 10 now; seed: 0 there, 1 now" in str(caught.value)


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json must hold JSON, but it is damaged"):
        RunFolder(tmp_path, {"seed": 0})


def test_remains_of_a_killed_write_are_swept(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / ".000000.safetensors.k3x9").write_bytes(b"half")
    RunFolder(tmp_path, {"seed": 0})
    assert list((tmp_path / "traces").iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[1]", '{"0": 1}', '{"x": {"fit": 1.0}}'])
def test_damaged_list_of_fits_means_fitting_again(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fits.json").write_text(content)
    folder = RunFolder(tmp_path, {"seed": 0})
    assert not folder.is_fitted(0, torch.zeros(3, 32, 32))
    assert "fits.json is damaged, so everything is fitted again" in caplog.text
