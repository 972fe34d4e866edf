from __future__ import annotations

from itertools import pairwise

import pytest

from dipguard.decision import sampled_steps


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


@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_shorter_fit_samples_a_prefix_with_every(every: int) -> None:
    longer, shorter = sampled_steps(100, every=every), sampled_steps(61, every=every)
    assert longer[: len(shorter)] == shorter


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"T": 0}, ValueError, "`T` must be at least 1, got 0"),
        ({"T": 199}, ValueError, "`T` must be at least `decisions`, got T=199 and decisions=200"),
        ({"T": 10, "decisions": 1}, ValueError, "`decisions` must be at least 2, got 1"),
        ({"T": 10, "every": 6}, ValueError, "`every` must be from 1 to 5, got 6"),
        ({"T": 10, "every": 0}, ValueError, "`every` must be from 1 to 5, got 0"),
        ({"T": 10.0}, TypeError, "`T` must be an integer, got 10.0"),
        ({"T": 10, "decisions": None}, TypeError, "`decisions` must be an integer"),
    ],
)
def test_bad_schedules_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sampled_steps(**arguments)
