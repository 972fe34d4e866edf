"""Eq. 3-5 against the slow, literal form."""

import pytest
import torch

from dipguard.decision import localise, needed_for_replay, passes


def linear_victim(classes: int = 4, side: int = 6) -> tuple[torch.nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * side * side, classes)).double()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    # No class wins on a grey image: random images are then decided differently.
    net[1].bias.data = -net[1].weight.data.sum(1) / 2
    return net.requires_grad_(False), torch.rand(40, 3, side, side, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("N", [1, 2, 7, 10, 50])
@pytest.mark.parametrize("scores", ["logits", "probabilities"])
def test_localise_is_the_grid_search_of_eq_5(N: int, scores: str) -> None:
    victim, images = linear_victim()
    decided = victim(images)
    y = decided.argmax(1)
    pairs = [i for i in range(39) if y[i] != y[i + 1]]
    before, after = images[pairs], images[[i + 1 for i in pairs]]
    alpha, found = localise(before, after, victim(before), victim(after), victim, N=N, scores=scores)
    assert len(pairs) > 5
    for m, (a, b) in enumerate(zip(before, after, strict=True)):
        first, second = int(victim(a[None]).argmax()), int(victim(b[None]).argmax())
        best, best_error = None, float("inf")
        for n in range(N + 1):
            mixed = (n / N) * a + (1 - n / N) * b
            f = victim(mixed[None])[0]
            f = f.softmax(0) if scores == "probabilities" else f
            error = float((f[first] - f[second]).abs())
            if error < best_error - 1e-12:
                best, best_error = n, error
        assert float(alpha[m]) == pytest.approx(best / N)
        torch.testing.assert_close(found[m], (best / N) * a + (1 - best / N) * b, rtol=0, atol=1e-12)


def test_of_equal_differences_the_smallest_alpha_is_taken() -> None:
    victim, x = linear_victim(classes=2)
    f = torch.eye(2, dtype=torch.float64)
    alpha, found = localise(x[:1], x[1:2], f[:1], f[1:], victim, N=1)
    assert alpha.tolist() == [0.0]
    assert torch.equal(found, x[1:2])


def test_no_pairs_give_no_images() -> None:
    victim, images = linear_victim()
    none = images[:0]
    alpha, found = localise(none, none, victim(images)[:0], victim(images)[:0], victim)
    assert alpha.shape == (0,)
    assert found.shape == (0, 3, 6, 6)


@pytest.mark.parametrize(("rule", "expected"), [("at_least", [1, 2, 4]), ("above", [2])])
def test_thresholds_hold_or_not_at_equality(rule: str, expected: list[int]) -> None:
    quality = torch.tensor([0.9, 0.7, 0.8, 0.6, 0.7], dtype=torch.float64)
    steps = torch.tensor([49, 50, 51, 60, 70])
    kept = passes(quality, steps, tau=0.7, t0=50, rule=rule)
    assert torch.nonzero(kept).flatten().tolist() == expected
    rounded = torch.tensor([0.7])  # in float32 below 0.7
    assert passes(rounded, steps[:1], tau=0.7, t0=0, rule=rule).tolist() == [False]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("K_max", [1, 3, 8])
def test_no_replay_asks_for_what_was_forgotten_and_all_kept_is_needed(seed: int, K_max: int) -> None:
    quality = torch.rand(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    asked = set()
    for tau in [0.0, *quality.tolist()]:
        asked |= set([m for m in range(30) if quality[m] >= tau][-K_max:])
    assert set(torch.nonzero(needed_for_replay(quality, K_max=K_max)).flatten().tolist()) == asked


def test_forgetting_as_they_come_is_forgetting_at_the_end() -> None:
    quality = torch.rand(60, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    kept: list[int] = []
    for m in range(60):
        kept.append(m)
        mask = needed_for_replay(quality[kept], K_max=4)
        kept = [m for m, needed in zip(kept, mask.tolist(), strict=True) if needed]
    assert kept == torch.nonzero(needed_for_replay(quality, K_max=4)).flatten().tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 1.1}, "`tau` must be from 0 to 1, got 1.1"),
        ({"tau": float("nan")}, "`tau` must be from 0 to 1, got nan"),
        ({"t0": -1}, "`t0` must be at least 0, got -1"),
        ({"rule": ">"}, "`rule` must be one of at_least, above, got '>'"),
    ],
)
def test_bad_thresholds_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        passes(torch.ones(2), torch.ones(2), **{"tau": 0.5, "t0": 0, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"), [({"N": 0}, "`N` must be at least 1"), ({"scores": "odds"}, "`scores` must be")]
)
def test_bad_grids_are_named(arguments: dict, message: str) -> None:
    victim, images = linear_victim()
    with pytest.raises(ValueError, match=message):
        localise(images[:1], images[1:2], victim(images[:1]), victim(images[1:2]), victim, **arguments)
