"""HopSkipJump: the walk against boundaries that are known exactly, the counted search, and the attack."""

import math

import numpy as np
import pytest
import torch

from dipguard.attacks import Cost, Snapshot
from dipguard.attacks.hopskipjump import QuerySearch, length, walk
from dipguard.classifier import Decider

from .conftest import Median, NoDefense, Noise, adaptive

IMAGE = torch.full((3, 8, 8), 0.5)


def nearest(adversarial, *, queries, seed=0):
    """Drive one walk with the rule ``adversarial``; the distances of all images that it found, in order."""
    route = walk(IMAGE, torch.Generator().manual_seed(seed))
    asked, found, count = next(route), [], 0
    while count < queries:
        answers = torch.tensor([adversarial(candidate) for candidate in asked])
        found += [length(candidate - IMAGE) for candidate in asked[answers]]
        assert 0 <= asked.min() <= asked.max() <= 1
        count += len(asked)
        try:
            asked = route.send(answers)
        except StopIteration:
            break
    return found, count


def test_it_comes_near_to_the_nearest_point_of_a_half_space():
    gap = 0.05
    weights = torch.linspace(0.5, 1.5, 192).view(3, 8, 8)

    def adversarial(image):
        return float(((image - IMAGE) * weights).sum()) > gap * float(weights.sum())

    best = gap  # the distance of a plane is the gap over the dual norm of its weights
    found, count = nearest(adversarial, queries=6000)
    assert count >= 6000
    assert best <= min(found) <= 1.25 * best
    assert min(found) < min(found[:10]) / 2


def test_the_distance_falls_with_the_rounds():
    def adversarial(image):
        return length(image - IMAGE) > 0.1 and float((image - IMAGE).mean()) > -0.1

    found, _ = nearest(adversarial, queries=1500)
    assert 0.1 < min(found) < 0.102


def test_a_flat_answer_is_no_division_by_zero():
    found, _ = nearest(lambda image: True, queries=500)
    assert all(math.isfinite(distance) for distance in found)
    assert min(found) < 1e-2


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_answers_by_chance_neither_stop_nor_hang_it(share):
    """What ART's search for a step repeats for ever, and foolbox's assertions stop at."""
    chance = torch.Generator().manual_seed(1)

    def adversarial(image):
        return float(torch.rand(1, generator=chance)) < share

    for seed in range(3):
        found, count = nearest(adversarial, queries=3000, seed=seed)
        assert count >= 3000 or not found or min(found) < 1e-2
        assert all(math.isfinite(distance) for distance in found)


def test_a_defence_that_turns_round_after_the_start_costs_a_bounded_number_of_steps():
    state = {"asked": 0}

    def adversarial(image):
        state["asked"] += 1
        return state["asked"] <= 60 and float((image - IMAGE).mean()) > 0.005  # later everything is read rightly

    found, count = nearest(adversarial, queries=5000)
    assert len(found) <= 60
    assert count >= 5000  # the budget ends it, and nothing else


def test_the_generator_settles_the_walk():
    def adversarial(image):
        return float((image - IMAGE).sum()) > 3

    first, again, other = (nearest(adversarial, queries=400, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def search(*, budgets, rule, **options):
    """Run one search of label 0 to its end; ``rule`` says whether an image is read as 1."""
    route = walk(IMAGE, torch.Generator().manual_seed(0), init_eval=20, **options)
    one = QuerySearch(IMAGE, 0, route, budgets)
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
    one, _ = search(budgets=(5, 500), rule=lambda image: False, init_size=7)
    assert one.queries == 8  # the image itself, and every start
    assert one.at(500)[1] == float("inf")
    assert torch.equal(one.at(500)[0], IMAGE)


def hsj(victim, defense, **options):
    return adaptive("hopskipjump", victim, defense, **options)


def distances(attack, budget):
    """What the last call found within a budget, [N]; infinite where it found nothing."""
    return torch.tensor([one.at(budget)[1] for one in attack.batches])


@pytest.mark.parametrize("defense", [NoDefense, Median])
def test_what_it_found_is_adversarial_and_as_far_away_as_it_says(digits_cnn, digits, defense):
    part = digits.select(0, 4)
    attack = hsj(digits_cnn, defense(), queries=120, budgets=(60, 120))
    made = attack.snapshots(part.images, part.labels)
    assert list(made) == [Snapshot(None, 60), Snapshot(None, 120)]
    for (_, budget), images in made.items():
        found = distances(attack, budget).isfinite()
        assert found.sum() >= 3
        assert (Decider(digits_cnn)(defense().purify(images)).argmax(1) != part.labels)[found].all()
        change = (images - part.images).flatten(1).abs().amax(dim=1)
        assert torch.allclose(change[found], distances(attack, budget)[found], atol=1e-6)
        assert torch.equal(images[~found], part.images[~found])
    assert (distances(attack, 120) <= distances(attack, 60)).all()


def test_every_query_is_counted(digits_cnn, digits):
    part = digits.select(0, 8)

    class Counting(Noise):
        images = 0

        def purify(self, images, *, indices=None):
            Counting.images += len(images)
            assert len(images) <= 128
            return super().purify(images, indices=indices)

    attack = hsj(digits_cnn, Counting(), queries=130)
    attack(part.images, part.labels)
    queries = torch.tensor([one.queries for one in attack.batches])
    spent = int(queries.sum())
    assert Counting.images == spent
    assert attack.spent == Cost(purifications=spent, victim_queries=spent)
    wrong = distances(attack, 130) == 0
    assert torch.equal(queries, torch.where(wrong, 1, 130))


def test_an_image_does_not_depend_on_its_batch_mates_nor_on_later_budgets(digits_cnn, digits):
    part = digits.select(0, 6)
    whole, alone = (hsj(digits_cnn, Noise(), batch_size=4, queries=n, budgets=(50,)) for n in (150, 50))
    whole(part.images, part.labels)
    two = torch.tensor([2, 5])
    alone(part.images[two], part.labels[two], indices=two)
    assert torch.allclose(distances(alone, 50), distances(whole, 50)[two], atol=1e-6)


def test_a_random_defence_does_not_hang_it(digits_cnn, digits):
    part = digits.select(0, 6)

    class Coin(Noise):
        """Now and then shows the victim another picture altogether."""

        def purify(self, images, *, indices=None):
            chance = [torch.Generator().manual_seed(index) for index in indices.tolist()]
            swap = torch.tensor([float(torch.rand(1, generator=one)) < 0.3 for one in chance])
            return torch.where(swap.view(-1, 1, 1, 1), images.flip(3), images)

    for draws in ("fresh", "fixed"):
        attack = hsj(digits_cnn, Coin(), draws=draws, queries=150, budgets=(100, 150))
        attack(part.images, part.labels)
        assert len(attack.batches) == 6
        assert max(one.queries for one in attack.batches) <= 150


def test_each_budget_and_radius_has_its_images_and_the_call_those_of_all_queries(digits_cnn, digits):
    part = digits.select(0, 3)
    attack = hsj(digits_cnn, Median(), queries=80, budgets=(80, 30), radii_255=(0, 20, 12.5))
    made = attack.snapshots(part.images, part.labels)
    assert list(made) == [Snapshot(eps, budget) for eps in (0, 12.5, 20) for budget in (30, 80)]
    for (eps, budget), images in made.items():
        found = torch.stack([one.at(budget)[0] for one in attack.batches])
        near = distances(attack, budget) <= eps / 255 + 1e-6
        assert torch.equal(images, torch.where(near.view(-1, 1, 1, 1), found, part.images))
    nearest = torch.stack([one.at(80)[0] for one in attack.batches])
    assert torch.equal(attack(part.images, part.labels), nearest)
    assert attack.estimate(3) == Cost(240, 240 * 7, 240)
    assert hsj(digits_cnn, Median()).estimate(10).purifications == 25_000


def test_radii_without_budgets_have_that_of_all_queries(digits_cnn, digits):
    part = digits.select(0, 2)
    attack = hsj(digits_cnn, Median(), queries=60, radii_255=(4, 200))
    assert list(attack.snapshots(part.images, part.labels)) == [Snapshot(4, 60), Snapshot(200, 60)]
    assert list(hsj(digits_cnn, Median(), queries=60).snapshots(part.images, part.labels)) == [Snapshot(None, None)]


def test_beyond_eps_the_clean_image_comes_back(digits_cnn, digits):
    part = digits.select(0, 4)
    free = hsj(digits_cnn, Median(), queries=70)
    found = free(part.images, part.labels)
    far = distances(free, 70)
    eps = float(far.median()) * 255
    attack = hsj(digits_cnn, Median(), queries=70, eps_255=eps)
    attacked = attack(part.images, part.labels)
    near = far <= eps / 255 + 1e-6
    assert 0 < int(near.sum()) < 4
    assert torch.equal(attacked, torch.where(near.view(-1, 1, 1, 1), found, part.images))
    alone = attack.snapshots(part.images[:1], part.labels[:1])
    assert list(alone) == [Snapshot(eps, None)]


@pytest.mark.slow
def test_on_a_real_victim_accuracy_falls_with_queries_and_radius(real_victim):
    victim, data = real_victim
    part, budgets, radii = data.select(0, 2), (100, 250), (0, 8, 25, 100)
    attack = hsj(victim, NoDefense(), queries=250, budgets=budgets, radii_255=radii)
    made = attack.snapshots(part.images, part.labels)
    at = {limit: 1 - float(attack.fooled(images, part.labels).float().mean()) for limit, images in made.items()}
    assert all(at[eps, 250] <= at[eps, 100] for eps in radii)
    assert at[0, 250] >= 0.6
    assert at[100, 250] == 0


@pytest.mark.slow
def test_it_is_no_weaker_than_the_papers_library(digits_cnn, digits, tmp_path, monkeypatch):
    """The Adversarial Robustness Toolbox's attack at the same number of queries."""
    monkeypatch.setenv("HOME", str(tmp_path))  # it makes a folder there when imported
    evasion = pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import BlackBoxClassifier

    read = digits_cnn(digits.images).argmax(1) == digits.labels
    images, labels = (values[read][:12] for values in (digits.images, digits.labels))
    asked = [0]

    def predict(x):
        asked[0] += len(x)
        with torch.no_grad():
            return torch.nn.functional.one_hot(digits_cnn(torch.tensor(x)).argmax(1), 10).float().numpy()

    classifier = BlackBoxClassifier(predict, (3, 32, 32), 10, clip_values=(0, 1))
    theirs = evasion.HopSkipJump(classifier, norm=np.inf, max_iter=5, verbose=False)
    found = torch.tensor(theirs.generate(images.numpy(), labels.numpy()))
    theirs_at = (found - images).flatten(1).abs().amax(dim=1)
    budget = asked[0] // len(images)
    attack = hsj(digits_cnn, NoDefense(), queries=budget)
    attack(images, labels)
    ours = torch.tensor([one.distance for one in attack.batches])
    assert 700 < budget < 1200
    assert ours.median() <= 1.1 * theirs_at.median()


def test_each_round_has_its_number_of_probes_radius_and_step():
    route, at, top, found, new = walk(IMAGE, torch.Generator().manual_seed(0), init_eval=20), IMAGE, None, [], False
    asked = next(route)
    while len(found) < 4:
        answers = torch.tensor([bright(image) for image in asked])
        if len(asked) > 1:  # probes around the boundary
            radius, far, count = float((asked - at).flatten(1).norm(dim=1).max()), length(at - IMAGE), len(asked)
            asked = route.send(answers)
            found.append((count, radius / (top or 10), length(asked[0] - at) / far))  # the first radius is 0.1
            answers, new = torch.tensor([bright(asked[0])]), True
        if bool(answers[-1]):
            at, top, new = asked[-1], length(asked[-1] - IMAGE) if new else top, False
        asked = route.send(answers)
    for t, one in enumerate(found, 1):
        assert one == pytest.approx((int(20 * math.sqrt(t)), 0.01, t**-0.5), rel=1e-3)
