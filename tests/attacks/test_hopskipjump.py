import numpy as np
import pytest
import torch

from dipguard.attacks import Cost, build_defense_aware_attack
from dipguard.attacks.hopskipjump import FIGURE_5

from .conftest import Median, NoDefense, Noise


def hsj(victim, defense, **options):
    return build_defense_aware_attack("hopskipjump", victim, defense, **options)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("defense", [NoDefense, Median])
def test_what_it_found_is_adversarial_and_as_far_away_as_it_says(digits_cnn, digits, norm, defense):
    part = digits.select(0, 4)
    curve = hsj(digits_cnn, defense(), norm=norm).curve(part.images, part.labels, budgets=(60, 300))
    for budget in (60, 300):
        images, distances = curve.images[budget], curve.distances[budget]
        found = distances.isfinite()
        assert found.sum() >= 3
        assert (digits_cnn(defense().purify(images)).argmax(1) != part.labels)[found].all()
        order = float("inf") if norm == "Linf" else 2
        change = torch.linalg.vector_norm((images - part.images).flatten(1), ord=order, dim=1)
        assert torch.allclose(change[found], distances[found], atol=1e-6)
    assert (curve.distances[300] <= curve.distances[60]).all()
    assert curve.norm == norm


def test_every_query_is_counted(digits_cnn, digits):
    part = digits.select(0, 8)

    class Counting(Noise):
        images = 0

        def purify(self, images, *, indices=None):
            Counting.images += len(images)
            assert len(images) <= 50
            return super().purify(images, indices=indices)

    attack = hsj(digits_cnn, Counting(), together=50)
    curve = attack.curve(part.images, part.labels, budgets=(130,))
    spent = int(curve.queries.sum())
    assert Counting.images == spent
    assert attack.spent == Cost(purifications=spent, victim_queries=spent)
    wrong = curve.distances[130] == 0
    assert torch.equal(curve.queries, torch.where(wrong, 1, 130))


def test_an_image_does_not_depend_on_its_batch_mates_nor_on_later_budgets(digits_cnn, digits):
    part = digits.select(0, 6)
    attack = hsj(digits_cnn, Noise(), batch_size=4)
    whole = attack.curve(part.images, part.labels, budgets=(50, 150))
    two = torch.tensor([2, 5])
    alone = attack.curve(part.images[two], part.labels[two], budgets=(50,), indices=two)
    assert torch.allclose(alone.distances[50], whole.distances[50][two], atol=1e-6)


def test_a_random_defence_does_not_hang_it(digits_cnn, digits):
    part = digits.select(0, 6)

    class Coin(Noise):
        """Now and then shows the victim another picture altogether."""

        def purify(self, images, *, indices=None):
            chance = [torch.Generator().manual_seed(index) for index in indices.tolist()]
            swap = torch.tensor([float(torch.rand(1, generator=one)) < 0.3 for one in chance])
            return torch.where(swap.view(-1, 1, 1, 1), images.flip(3), images)

    for draws in ("fresh", "fixed"):
        curve = hsj(digits_cnn, Coin(), draws=draws).curve(part.images, part.labels, budgets=(100, 400))
        assert curve.queries.max() <= 400


def test_the_call_returns_the_largest_budgets_images(digits_cnn, digits):
    part = digits.select(0, 3)
    attack = hsj(digits_cnn, Median(), queries=80)
    assert torch.equal(
        attack(part.images, part.labels), attack.curve(part.images, part.labels, budgets=(80,)).images[80]
    )
    assert FIGURE_5 == (200, 1000, 2500)
    assert attack.estimate(3) == Cost(240, 240 * 7, 240)
    assert attack.estimate(10, queries=2500).purifications == 25_000


@pytest.mark.parametrize(
    ("budgets", "error", "message"),
    [((), ValueError, "at least one"), ((0,), ValueError, "`budgets`"), (("200",), TypeError, "`budgets`")],
)
def test_bad_budgets_are_refused(digits_cnn, digits, budgets, error, message):
    with pytest.raises(error, match=message):
        hsj(digits_cnn, Median()).curve(digits.images[:1], digits.labels[:1], budgets=budgets)


def test_on_a_real_victim_the_curves_fall(real_victim):
    victim, data = real_victim
    part = data.select(0, 3)
    curve = hsj(victim, NoDefense()).curve(part.images, part.labels, budgets=(100, 300))
    at = {(b, e): curve.accuracy(budget=b, eps_255=e) for b in (100, 300) for e in (0, 8, 25, 100)}
    assert all(at[300, eps] <= at[100, eps] for eps in (0, 8, 25, 100))
    assert at[300, 0] >= 0.6
    assert at[300, 100] == 0


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_it_is_no_weaker_than_the_papers_library(digits_cnn, digits, norm, tmp_path, monkeypatch):
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
    theirs = evasion.HopSkipJump(classifier, norm=2 if norm == "L2" else np.inf, max_iter=5, verbose=False)
    found = torch.tensor(theirs.generate(images.numpy(), labels.numpy()))
    order = 2 if norm == "L2" else float("inf")
    distances = torch.linalg.vector_norm((found - images).flatten(1), ord=order, dim=1)
    budget = asked[0] // len(images)
    ours = hsj(digits_cnn, NoDefense(), norm=norm).curve(images, labels, budgets=(budget,)).distances[budget]
    assert 700 < budget < 1200
    assert ours.median() <= 1.1 * distances.median()
