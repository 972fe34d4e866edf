import pytest
import torch

from dipguard.attacks.best_found import CANDIDATES, LOSSES, BestFound, joined, margins
from dipguard.attacks.target import FINAL, fresh_indices

from .conftest import Median, Noise, accuracy, adaptive, quick


def picture(value, count=1):
    return torch.full((count, 3, 2, 2), value)


def test_the_margin_is_above_0_where_misread():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 7.0]])
    assert margins(logits, torch.tensor([0, 1])).tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_several_views(name):
    logits, labels = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 2])
    true = logits.softmax(-1)[:, torch.arange(3), labels]
    expected = {"ce": -true.mean(0).log() - torch.tensor(4.0).log(), "margin": margins(logits[0], labels)}
    if name == "margin":
        logits = logits[:1].expand(4, -1, -1)
    assert torch.allclose(LOSSES[name](logits, labels), expected[name], atol=1e-6)


def test_the_best_is_misread_by_most_draws_and_then_by_most():
    found = BestFound(picture(0.5, 2), torch.tensor([0, 1]))
    right, wrong, worse = [2.0, 0.0], [0.0, 1.0], [0.0, 4.0]
    seen = [
        (0.1, [[right, right], [right, right]]),  # nothing: the best so far all the same
        (0.2, [[wrong, right], [right, right]]),  # half of the first image's draws
        (0.3, [[worse, right], [worse, right]]),  # all of them
        (0.4, [[wrong, right], [wrong, right]]),  # all of them, by less
        (0.6, [[worse, wrong], [right, right]]),  # for the second image [0, 1] is right, by less than [0, 2] was
    ]
    for value, logits in seen:
        scores = torch.tensor(logits)
        scores[:, 1] = scores[:, 1].flip(-1)  # of class 1
        found.see(picture(value, 2), scores)
    assert [float(image.mean()) for image in found.top[0]] == [pytest.approx(0.3), pytest.approx(0.6)]
    assert found.history == [2, 1, 1, 1, 0]
    assert found.last_history == [2, 1, 1, 1, 0]
    assert found.withstood.tolist() == [False, False]


def test_the_last_look_may_be_worse_than_the_best():
    found = BestFound(picture(0.5), torch.tensor([0]))
    for value, logits in ((0.1, [0.0, 1.0]), (0.2, [1.0, 0.0])):
        found.see(picture(value), torch.tensor([[logits]]))
    found.stay()
    assert (found.history, found.last_history) == ([0, 0, 0], [0, 1, 1])
    assert torch.allclose(found.top[0], picture(0.1))


def test_some_of_the_images():
    found = BestFound(picture(0.5, 3), torch.tensor([0, 0, 0]))
    found.see(picture(0.7, 2), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), rows=torch.tensor([2, 0]))
    assert found.top[0][:, 0, 0, 0].tolist() == pytest.approx([0.7, 0.5, 0.7])
    assert found.withstood.tolist() == [True, True, False]


def test_batches_of_several_lengths_are_joined_without_their_start():
    assert joined([[2, 2, 1], [2, 0]], total=4) == [0.5, 0.25]
    assert joined([[2], [1]], total=3) == [1.0]


def test_the_best_few_are_kept_in_order():
    draws = torch.Generator().manual_seed(3)
    images, labels = torch.rand(4, 3, 2, 2, generator=draws), torch.tensor([0, 1, 0, 1])
    looks = []
    kept, single = BestFound(images, labels, keep=4), BestFound(images, labels)
    for number in range(9):
        rows = torch.arange(4) if number % 3 else torch.tensor([3, 1])  # the others keep what they have
        attacked = torch.rand(len(rows), 3, 2, 2, generator=draws)
        logits = torch.randn(2, len(rows), 2, generator=draws).round()  # some are equally good
        looks.append((rows.tolist(), attacked, logits))
        for found in (kept, single):
            found.see(attacked, logits, rows=rows)
        assert int(kept.seen[:, 0].sum()) == min(4, sum(0 in rows for rows, _, _ in looks))
    assert torch.equal(kept.top[0], single.top[0])
    assert kept.history == single.history
    for b in range(4):
        mine = [(x[rows.index(b)], s[:, rows.index(b)]) for rows, x, s in looks if b in rows]
        wrong = [float((s.argmax(-1) != labels[b]).float().mean()) for _, s in mine]
        margin = [float((s[:, 1 - labels[b]] - s[:, labels[b]]).mean()) for _, s in mine]
        order = sorted(range(len(mine)), key=lambda i: (wrong[i], margin[i], -i), reverse=True)[:4]
        assert all(torch.equal(kept.top[k, b], mine[i][0]) for k, i in enumerate(order))


CLIMB = {"eps_255": 30, "alpha_255": 10}


@pytest.mark.parametrize(
    ("name", "defense", "options"),
    [
        ("adaptive_pgd", Median, CLIMB),
        ("adaptive_pgd", Noise, CLIMB),
        ("unrolled", Noise, CLIMB),
        ("defended_autoattack", Median, {"eps_255": 8, "steps": 3}),
        ("defended_autoattack", Noise, {"eps_255": 60, "steps": 3}),
        ("defended_square", Median, {"eps_255": 8, "n_queries": 15}),
        ("defended_square", Noise, {"eps_255": 60, "n_queries": 15}),
    ],
)
def test_history_is_what_the_defended_victim_says(digits_cnn, digits, name, defense, options):
    """With draws of the evaluation: so every look was at the image that it was taken for."""
    part = digits.select(0, 8)
    attack = quick(name, digits_cnn, defense(), draws="fixed", batch_size=5, **options)
    attacked = attack(part.images, part.labels)
    assert all(best <= last for best, last in zip(attack.history, attack.last_history, strict=True))
    assert attack.history == sorted(attack.history, reverse=True)
    assert attack.history[-1] == pytest.approx(accuracy(attack, attacked, part))
    assert float((attacked - part.images).abs().max()) <= options["eps_255"] / 255 + 1e-6
    assert torch.equal(attack(part.images, part.labels), attacked)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adaptive_pgd", {"steps": 3}),
        ("adaptive_pgd", {"steps": 1}),  # fewer looks than are kept
        ("unrolled", {"steps": 1, "T": 2}),
        ("defended_autoattack", {"steps": 2}),
        ("defended_square", {"n_queries": 5}),
    ],
)
def test_final_looks_are_at_draws_of_their_own_and_are_paid_for(digits_cnn, digits, name, options):
    part, defense = digits.select(0, 2), Noise()
    attack = adaptive(name, digits_cnn, defense, final_looks=3, batch_size=2, **options)
    without = adaptive(name, digits_cnn, Noise(), batch_size=2, **options)
    attack(part.images, part.labels)
    without(part.images, part.labels)
    final = [index for index in defense.indices if index >= FINAL * 2**32]
    assert set(final) == {int(i) for look in range(3) for i in fresh_indices(torch.arange(2), FINAL + look)}
    assert attack.spent.purifications == without.spent.purifications + len(final) == len(defense.indices)
    assert len(final) <= attack.final_cost(2).purifications == 2 * CANDIDATES * 3
    assert attack.estimate(2) == without.estimate(2) + attack.final_cost(2)


def test_the_version_that_fools_most_of_the_final_looks_is_returned(digits_cnn, digits):
    """A version that fooled at the search's draws alone must lose to one that fools later too."""
    part = digits.select(0, 1)
    iterates = []

    class Lucky:
        def purify(self, images, *, indices=None):
            final = bool((indices >= FINAL * 2**32).all())
            if not final:
                iterates.append(images[0].clone())
                return images * 0  # all are misread equally, or none
            # At the final looks the third iterate alone is read as what it is not.
            wanted = torch.stack([(image == iterates[2]).all() for image in images]).view(-1, 1, 1, 1)
            return torch.where(wanted, 1 - part.images, part.images)

    assert int(digits_cnn(part.images).argmax()) == int(part.labels) != int(digits_cnn(1 - part.images).argmax())
    options = {"steps": 3, "eps_255": 30, "alpha_255": 9, "draws": "fixed"}
    for final_looks, returned in ((0, 0), (2, 2)):
        iterates.clear()
        attack = adaptive("adaptive_pgd", digits_cnn, Lucky(), final_looks=final_looks, **options)
        assert torch.equal(attack(part.images, part.labels)[0], iterates[returned])
