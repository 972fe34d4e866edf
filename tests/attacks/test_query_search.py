import pytest
import torch

from dipguard.attacks.hsj_walk import walk
from dipguard.attacks.query_search import QueryCurve, QuerySearch

IMAGE = torch.full((3, 8, 8), 0.5)


def search(*, budgets, rule, norm="Linf"):
    """Run one search of label 0 to its end; ``rule`` says whether an image is read as 1."""
    route = walk(IMAGE, torch.Generator().manual_seed(0), norm=norm, init_eval=20)
    one = QuerySearch(IMAGE, 0, route, norm, budgets)
    sizes = []
    while one.asked is not None:
        sizes.append(len(one.asked))
        one.answer(torch.tensor([int(rule(image)) for image in one.asked]))
    return one, sizes


def bright(image):
    return float(image.mean()) > 0.501


@pytest.mark.parametrize("budgets", [(1,), (2,), (17, 33), (50, 51, 200)])
def test_no_query_is_made_beyond_the_budget(budgets):
    one, sizes = search(budgets=budgets, rule=bright)
    assert one.queries == sum(sizes) == budgets[-1]


def test_more_queries_never_find_less_and_each_budget_keeps_its_own():
    budgets = tuple(range(20, 400, 20))
    one, _ = search(budgets=budgets, rule=bright)
    distances = [one.at(budget)[1] for budget in budgets]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > distances[-1]
    for budget in budgets:
        image, distance = one.at(budget)
        assert float((image - IMAGE).abs().max()) == pytest.approx(distance)
        assert bright(image)
        alone, _ = search(budgets=(budget,), rule=bright)
        assert alone.at(budget)[1] == distance


def test_an_image_that_is_read_wrongly_costs_one_query_and_has_distance_0():
    one, sizes = search(budgets=(5, 50), rule=lambda image: True)
    assert sizes == [1]
    assert [one.at(budget)[1] for budget in (5, 50)] == [0, 0]
    assert torch.equal(one.at(50)[0], IMAGE)


def test_where_nothing_is_found_the_image_stays_at_infinity():
    one, _ = search(budgets=(5, 500), rule=lambda image: False)
    assert one.queries == 101  # the image itself, and every start
    assert one.at(500)[1] == float("inf")
    assert torch.equal(one.at(500)[0], IMAGE)


def test_accuracy_is_counted_from_distances():
    distances = {10: torch.tensor([0.0, 8 / 255, 12 / 255, float("inf")]), 20: torch.tensor([0.0, 0.0, 0.0, 2 / 255])}
    curve = QueryCurve("Linf", images={}, distances=distances, queries=torch.tensor([1, 20, 20, 20]))
    assert [curve.accuracy(budget=10, eps_255=eps) for eps in (0, 7.9, 8, 25)] == [0.75, 0.75, 0.5, 0.25]
    assert curve.accuracy(budget=20, eps_255=2) == 0
    with pytest.raises(ValueError, match="`budget` must be one of 10, 20, got 30"):
        curve.accuracy(budget=30, eps_255=8)
    with pytest.raises(ValueError, match="`eps_255`"):
        curve.accuracy(budget=10, eps_255=-1)
