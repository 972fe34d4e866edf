from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dipguard.decision import DecisionTrace, sampled_steps


def a_trace(*, samples: bool = False, crossings: int = 2) -> DecisionTrace:
    draw = torch.rand  # each test starts from seed 0
    return DecisionTrace(
        index=17, given=draw(3, 4, 4), given_scores=torch.tensor([0.1, 0.7, 0.2]), steps=torch.tensor([4, 9, 14]),
        scores=draw(3, 3), quality=draw(3), loss=draw(3), crossing_at=torch.arange(crossings), alpha=draw(crossings),
        on_boundary=draw(crossings, 3, 4, 4), last=draw(2, 3, 4, 4), samples=draw(3, 3, 4, 4) if samples else None,
        mirrored_logits=draw(3, 3) if samples else None,
        settings={"K_max": 2, "network": "small", "jitter": 1 / 30, "every": None},
    )  # fmt: skip


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("crossings", [0, 2])
def test_saved_and_loaded_is_equal(tmp_path: Path, samples: bool, crossings: int) -> None:
    trace = a_trace(samples=samples, crossings=crossings)
    loaded = DecisionTrace.load(trace.save(tmp_path / "deep" / "trace.safetensors"))
    assert loaded.equals(trace)
    assert (loaded.index, loaded.settings, loaded.given_decision, loaded.K_max) == (17, trace.settings, 1, 2)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["trace.safetensors"]


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    samples = torch.rand(3, 3, 4, 4)
    trace = replace(a_trace(), samples=samples, last=samples, on_boundary=samples[1:])
    assert DecisionTrace.load(trace.save(tmp_path / "trace.safetensors")).equals(trace)


def test_equality_sees_every_field() -> None:
    trace = a_trace(samples=True)
    for name, value in trace.tensors().items():
        assert not trace.equals(replace(trace, **{name: value + 1 if name != "crossing_at" else value.flip(0)})), name
    assert not trace.equals(replace(trace, index=1))
    assert not trace.equals(replace(trace, settings={}))
    assert not trace.equals(replace(trace, samples=None))


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    path = a_trace().save(tmp_path / "trace.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"trace\.safetensors must be a decision trace, but it is damaged"):
        DecisionTrace.load(path)


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"got {path}, which is no file"):
            DecisionTrace.load(path)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must be a decision trace"):
        DecisionTrace.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quality", torch.ones(2)),
        ("scores", torch.ones(3, 4)),
        ("on_boundary", torch.ones(1, 3, 4, 4)),
        ("last", torch.ones(2, 3, 4, 5)),
        ("samples", torch.ones(2, 3, 4, 4)),
        ("mirrored_logits", torch.ones(3, 2)),
        ("crossing_at", torch.tensor([0, 2])),
    ],
)
def test_fields_that_do_not_fit_are_named(name: str, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=f"`{name}` of a trace must"):
        replace(a_trace(samples=True), **{name: value})


@pytest.mark.parametrize("T", [200, 500, 750, 1000, 1250, 1500, 3000])
def test_200_samples_at_equal_intervals_for_every_T_of_table_3(T: int) -> None:
    steps = sampled_steps(T)
    gaps = {after - before for before, after in pairwise(steps)}
    assert len(steps) == 200
    assert steps[-1] == T - 1
    assert steps[0] >= 0
    assert gaps <= {T // 200, -(-T // 200)}


def test_whole_intervals_and_every_agree() -> None:
    assert sampled_steps(1000) == sampled_steps(1000, decisions=None, every=5)
    assert sampled_steps(20, decisions=4) == (4, 9, 14, 19)
    assert sampled_steps(10, decisions=4) == (2, 4, 7, 9)


@pytest.mark.parametrize("T", [1, 2, 80, 199])
def test_more_decisions_than_steps_sample_every_step(T: int) -> None:
    assert sampled_steps(T) == tuple(range(T))


@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_shorter_fit_samples_a_prefix_with_every(every: int) -> None:
    longer, shorter = sampled_steps(100, every=every), sampled_steps(61, every=every)
    assert longer[: len(shorter)] == shorter


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"T": 0}, ValueError, "`T` must be at least 1, got 0"),
        ({"T": 10, "decisions": 1}, ValueError, "`decisions` must be at least 2, got 1"),
        ({"T": 10, "every": 6}, ValueError, "`every` must be from 1 to 5, got 6"),
        ({"T": 10, "every": 0}, ValueError, "`every` must be from 1 to 5, got 0"),
        ({"T": 10.0}, TypeError, "`T` must be an integer, got 10.0"),
        ({"T": 10, "decisions": None}, TypeError, "`decisions` must be an integer"),
    ],
)
def test_bad_schedules_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sampled_steps(**arguments)
