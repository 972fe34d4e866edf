"""Stopping rules and the store: what a rule chose is not chosen again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dipguard.defenses import build_defense
from dipguard.evaluation.riders import groups_of, purify_group, serve_all_rows, unstored
from dipguard.store import TraceStore
from tests.store.parts import SHORT, guard, random_victim, smooth_images

ROWS: dict[str, dict[str, Any]] = {
    "dip_fixed": {"step": 13},
    "dip_es_wmv": {"window": 5},
    "dipdefend_rule": {"smoothing": 0.1},
}
FIT = {"network": "small", "engine": "native", "jitter": 0.1, "padding": "reflect"}


@pytest.fixture
def store(tmp_path: Path) -> TraceStore:
    return TraceStore(tmp_path / "store")


def row(name: str, store: TraceStore | None, **options: Any) -> Any:
    options = {"T": 24, "stack_size": 4, "progress": False, **ROWS[name], **options}
    return build_defense(name, random_victim(), fit=FIT, store=store, **options)


@pytest.mark.parametrize("name", ROWS)
def test_a_rule_alone(store: TraceStore, name: str):
    wanted = row(name, None).purify(smooth_images())
    assert torch.equal(row(name, store).purify(smooth_images(2)), wanted[:2])
    assert torch.equal(row(name, store).purify(smooth_images()), wanted)
    assert torch.equal(row(name, store).purify(smooth_images()), wanted)
    assert store.counts == {"fitted": 3}


def test_another_rule_is_another_choice(store: TraceStore):
    row("dip_es_wmv", store).purify(smooth_images(1))
    wanted = row("dip_es_wmv", None, window=9).purify(smooth_images(1))
    assert torch.equal(row("dip_es_wmv", store, window=9).purify(smooth_images(1)), wanted)


def test_a_fixed_step_is_found_among_a_fit_s_samples(store: TraceStore):
    guard(store).purify(smooth_images())
    got = row("dip_fixed", store, step=11).purify(smooth_images())
    assert torch.equal(got, row("dip_fixed", None, step=11).purify(smooth_images()))
    assert store.counts == {"fitted": 3}


def table(store: TraceStore | None, **paper: Any) -> dict[str, Any]:
    short = {**SHORT, **paper}
    more = {} if store is None else {"store": store}
    rows = {name: build_defense(name, random_victim(), fit=FIT, T=24, **ROWS[name], **more) for name in ROWS}
    rows["paper"] = build_defense("paper", random_victim(), **short, **more)
    return rows


def test_rows_that_ride_on_one_fit_ride_on_the_store_s(store: TraceStore):
    images, indices = smooth_images(), torch.arange(3)

    def purify(rows: dict[str, Any]) -> dict[str, Any]:
        (group,) = groups_of(rows)
        assert group.leader == "paper"
        return purify_group(rows, group, list(group.rows), images, indices)

    wanted = purify(table(None))
    # The store's fit is longer than T: the rules must not see the rest of it.
    for rows in (table(store, store_T=[30]), table(store), table(store, tau=0.1)):
        got = purify(rows)
        for name in ROWS:
            assert torch.equal(got[name][0], wanted[name][0]), name
    assert store.counts == {"fitted": 3, "replayed": 6}
    assert got["paper"][1] > 0.9 * float(sum(info[1] for info in [got["dip_fixed"]]))  # as if they were fitted now


def test_rows_of_several_T_are_served_by_one_fit(store: TraceStore):
    rows = {f"T{T}": build_defense("paper", random_victim(), **{**SHORT, "T": T}, store=store) for T in (14, 18, 24)}
    rows["large"] = build_defense("paper", random_victim(), **{**SHORT, "network": "medium"}, store=store)
    serve_all_rows(rows)
    assert [options.T for options in rows["T14"].guard.also] == [18, 24]
    assert rows["large"].guard.also == ()
    for label, T in (("T14", 14), ("T18", 18), ("T24", 24)):
        got = rows[label].purify(smooth_images())
        assert torch.equal(got, guard(T=T).purify(smooth_images()))
    assert store.counts == {"fitted": 3, "decided": 6}


def test_unstored_rows_leave_the_store_alone(store: TraceStore):
    rows = table(store)
    for one in rows.values():
        unstored(one).purify(smooth_images(1))
    assert unstored("anything") == "anything"
    assert not store.path.exists()
    assert rows["paper"].guard.store is store
    assert rows["dip_fixed"].store is store
