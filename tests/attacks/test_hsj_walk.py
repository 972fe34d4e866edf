"""The walk against boundaries that are known exactly: balls and half-spaces in pixel space, asked by hand."""

import math

import pytest
import torch

from dipguard.attacks.hsj_walk import length, walk

IMAGE = torch.full((3, 8, 8), 0.5)


def nearest(adversarial, *, norm, queries, seed=0, **options):
    """Drive one walk with the rule ``adversarial``; the distances of all images that it found, in order."""
    route = walk(IMAGE, torch.Generator().manual_seed(seed), norm=norm, **options)
    asked, found, count = next(route), [], 0
    while count < queries:
        answers = torch.tensor([adversarial(candidate) for candidate in asked])
        found += [length(candidate - IMAGE, norm) for candidate in asked[answers]]
        assert 0 <= asked.min() <= asked.max() <= 1
        count += len(asked)
        try:
            asked = route.send(answers)
        except StopIteration:
            break
    return found, count


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_it_comes_near_to_the_nearest_point_of_a_half_space(norm):
    gap = 0.05
    weights = torch.linspace(0.5, 1.5, 192).view(3, 8, 8)

    def adversarial(image):
        return float(((image - IMAGE) * weights).sum()) > gap * float(weights.sum())

    # The distance of a plane is the gap over the dual norm of its weights.
    dual = weights.abs().sum() if norm == "Linf" else torch.linalg.vector_norm(weights)
    best = gap * float(weights.sum()) / float(dual)
    found, count = nearest(adversarial, norm=norm, queries=6000)
    assert count >= 6000
    assert best <= min(found) <= 1.25 * best
    assert min(found) < min(found[:10]) / 2


def test_the_distance_falls_with_the_rounds():
    def adversarial(image):
        return length(image - IMAGE, "L2") > 1.0 and float((image - IMAGE).mean()) > -0.1

    found, _ = nearest(adversarial, norm="L2", queries=1500)
    assert min(found) < 1.02
    assert min(found) > 1.0


def test_it_gives_up_where_no_noise_is_adversarial():
    found, count = nearest(lambda image: False, norm="L2", queries=1000, init_size=7)
    assert (found, count) == ([], 7)


def test_a_flat_answer_is_no_division_by_zero():
    found, _ = nearest(lambda image: True, norm="L2", queries=500)
    assert all(math.isfinite(distance) for distance in found)
    assert min(found) < 1e-2


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_answers_by_chance_neither_stop_nor_hang_it(norm, share):
    """What ART's search for a step repeats for ever, and foolbox's assertions stop at."""
    chance = torch.Generator().manual_seed(1)

    def adversarial(image):
        return float(torch.rand(1, generator=chance)) < share

    for seed in range(3):
        found, count = nearest(adversarial, norm=norm, queries=3000, seed=seed)
        assert count >= 100 or not found or min(found) < 1e-2
        assert all(math.isfinite(distance) for distance in found)


def test_a_defence_that_turns_round_after_the_start_costs_a_bounded_number_of_steps():
    state = {"asked": 0}

    def adversarial(image):
        state["asked"] += 1
        return state["asked"] <= 60 and float((image - IMAGE).mean()) > 0.005  # later everything is read rightly

    found, count = nearest(adversarial, norm="Linf", queries=5000)
    assert len(found) <= 60
    assert count >= 5000  # the budget ends it, and nothing else


def test_the_generator_settles_the_walk():
    def adversarial(image):
        return float((image - IMAGE).sum()) > 3

    first, again, other = (nearest(adversarial, norm="L2", queries=400, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert first != other
