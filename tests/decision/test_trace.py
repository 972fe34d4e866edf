from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dipguard.decision import DecisionTrace


def a_trace(*, samples: bool = False, crossings: int = 2) -> DecisionTrace:
    generator = torch.Generator().manual_seed(0)
    return DecisionTrace(
        index=17,
        given=torch.rand(3, 4, 4, generator=generator),
        given_scores=torch.tensor([0.1, 0.7, 0.2]),
        steps=torch.tensor([4, 9, 14]),
        scores=torch.rand(3, 3, generator=generator),
        quality=torch.rand(3, generator=generator),
        loss=torch.rand(3, generator=generator),
        crossing_at=torch.arange(crossings),
        alpha=torch.rand(crossings, generator=generator),
        on_boundary=torch.rand(crossings, 3, 4, 4, generator=generator),
        last=torch.rand(2, 3, 4, 4, generator=generator),
        samples=torch.rand(3, 3, 4, 4, generator=generator) if samples else None,
        settings={"K_max": 2, "network": "small", "jitter": 1 / 30, "every": None},
    )


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("crossings", [0, 2])
def test_saved_and_loaded_is_equal(tmp_path: Path, samples: bool, crossings: int) -> None:
    trace = a_trace(samples=samples, crossings=crossings)
    loaded = DecisionTrace.load(trace.save(tmp_path / "deep" / "trace.safetensors"))
    assert loaded.equals(trace)
    assert (loaded.index, loaded.settings, loaded.given_decision, loaded.K_max) == (17, trace.settings, 1, 2)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["trace.safetensors"]


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
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        DecisionTrace.load(tmp_path / "none.safetensors")
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
        ("crossing_at", torch.tensor([0, 2])),
    ],
)
def test_fields_that_do_not_fit_are_named(name: str, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=f"`{name}` of a trace must"):
        replace(a_trace(samples=True), **{name: value})
