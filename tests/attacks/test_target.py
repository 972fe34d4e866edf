"""What holds for adaptive attacks alone, and for their target: most tests below run for each of them."""

import pytest
import torch

from dipguard import DIPGuard
from dipguard.attacks import Cost, DefendedVictim, build_attack
from dipguard.decision.intermediates import Intermediate

from .conftest import ADAPTIVE, Enlarge, Median, NoDefense, Noise, Purifier, adaptive, any_size, quick

LOOKS = {
    "bpda": 3,
    "hopskipjump": 50,
    "adaptive_pgd": 4,
    "unrolled": 2,
    "defended_autoattack": 6,
    "defended_square": 10,
}
"""Purifications of an image, at most, with the quick options."""
EVERY = pytest.mark.parametrize("name", ADAPTIVE)
SOME = pytest.mark.parametrize("name", ["bpda", "hopskipjump"])


@EVERY
def test_a_defence_that_uses_the_global_generator_is_seeded_too(digits_cnn, digits, name):
    part, results = digits.select(0, 2), []
    sloppy = Purifier(lambda images: (images + 0.05 * torch.randn_like(images)).clamp(0, 1))
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(quick(name, digits_cnn, sloppy, draws="fresh")(part.images, part.labels))
    assert torch.equal(*results)


@EVERY
def test_fresh_draws_never_repeat_and_are_none_of_the_evaluations(digits_cnn, digits, name):
    part = digits.select(0, 4)
    defense = Noise()
    quick(name, digits_cnn, defense, draws="fresh")(part.images, part.labels, indices=torch.arange(5, 9))
    seen = defense.indices
    assert len(set(seen)) == len(seen) > len(part)
    assert min(seen) >= 2**32
    assert len({index % 2**32 for index in seen}) == len(seen)  # the part that torch's generator looks at


@EVERY
def test_fixed_draws_are_the_evaluations(digits_cnn, digits, name):
    part = digits.select(0, 4)
    defense = Noise()
    attack = quick(name, digits_cnn, defense, draws="fixed")
    attacked = attack(part.images, part.labels, indices=torch.arange(5, 9))
    assert set(defense.indices) == {5, 6, 7, 8}
    read = digits_cnn(Noise().purify(attacked, indices=torch.arange(5, 9))).argmax(1)
    assert torch.equal(attack.fooled(attacked, part.labels, indices=torch.arange(5, 9)), read != part.labels)


@EVERY
def test_fooled_asks_the_defended_victim(digits_cnn, digits, quick_result, name):
    attacked, labels = quick_result(name), digits.labels[:4]
    read = digits_cnn(Median().purify(attacked)).argmax(1)
    assert torch.equal(quick(name, digits_cnn).fooled(attacked, labels), read != labels)


@EVERY
def test_the_estimate_holds_and_costs_add_up_over_calls(digits_cnn, digits, name):
    part = digits.select(0, 4)
    attack = quick(name, digits_cnn, Median())
    estimate = attack.estimate(4)
    assert attack.spent == Cost()
    told: list[int] = []
    attack.target.tell = told.append
    attack(part.images, part.labels)
    spent = attack.spent
    assert sum(told) == spent.purifications
    unrolled = 4 * 2 if name == "unrolled" else 0
    assert spent.dip_steps == 7 * spent.purifications + unrolled
    assert spent.victim_queries == spent.purifications + unrolled // 2
    assert 0 < spent.purifications <= estimate.purifications
    assert spent.dip_steps <= estimate.dip_steps
    assert spent.gradients <= estimate.gradients
    assert estimate.purifications == 4 * LOOKS[name]
    attack.fooled(part.images, part.labels)
    assert attack.spent == spent  # no part of the attack
    attack(part.images, part.labels)
    assert attack.spent == spent + spent


@EVERY
def test_a_defence_may_change_the_resolution(digits_cnn, digits, name):
    part = digits.select(0, 4)
    attack = quick(name, any_size(digits_cnn), Enlarge())
    attacked = attack(part.images, part.labels)
    assert attacked.shape == part.images.shape
    assert not torch.equal(attacked, part.images)


@EVERY
def test_a_dip_is_attacked(digits_cnn, digits, name):
    part = digits.select(0, 2)
    guard = DIPGuard(digits_cnn, network="small", T=2, t0=0, decisions=2, progress=False)
    few = {"hopskipjump": {"queries": 2}, "defended_square": {"n_queries": 2}}.get(name, {"steps": 1})
    attack = quick(name, digits_cnn, guard, **few)
    attacked = attack(part.images, part.labels)
    assert attacked.shape == part.images.shape
    assert attack.fooled(attacked, part.labels).shape == (2,)


@SOME
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x + 2, "left \\[0, 1\\]"),
        (lambda x: x * float("nan"), "left \\[0, 1\\]"),
        (lambda x: x[:1, 0], "returned \\(1, 32, 32\\)"),
        (lambda x: x[:0], "returned \\(0, 3, 32, 32\\)"),
        (lambda x: x.tolist(), "returned list"),
    ],
)
def test_a_careless_defence_is_caught(digits_cnn, digits, name, change, message):
    with pytest.raises(RuntimeError, match=f"`defense` {message}"):
        quick(name, digits_cnn, Purifier(change))(digits.images[:2], digits.labels[:2])


@SOME
def test_bad_defences_are_refused(digits_cnn, name):
    with pytest.raises(TypeError, match=r"`defense` must have purify.*got method"):
        quick(name, digits_cnn, Median().purify)

    class Old:
        def purify(self, images):
            return images

    with pytest.raises(TypeError, match="indices=None\\), got purify\\(images\\)"):
        quick(name, digits_cnn, Old())


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("bpda", {"eps_255": 0}, ValueError, "`eps_255` must be above 0"),
        ("bpda", {"alpha_255": 0}, ValueError, "`alpha_255`"),
        ("bpda", {"steps": 0}, ValueError, "`steps`"),
        ("bpda", {"draws": "new"}, ValueError, "`draws` must be one of fresh, fixed"),
        ("bpda", {"queries": 5}, TypeError, "'bpda' takes no option 'queries'"),
        ("bpda", {"budgets": 5}, TypeError, "`budgets` must be a list of integers, got 5"),
        ("bpda", {"budgets": (0, 1)}, ValueError, "`budgets` must be from 1 to 15, got 0"),
        ("bpda", {"budgets": (16,)}, ValueError, "`budgets` must be from 1 to 15, got 16"),
        ("bpda", {"budgets": (1.5,)}, TypeError, "`budgets`"),
        ("hopskipjump", {"steps": 8}, TypeError, "'hopskipjump' takes no option 'steps'"),
        ("hopskipjump", {"eps_255": 0}, ValueError, "`eps_255` must be above 0"),
        ("hopskipjump", {"budgets": (0,)}, ValueError, "`budgets`"),
        ("hopskipjump", {"budgets": ("200",)}, TypeError, "`budgets`"),
        ("hopskipjump", {"budgets": (2501,)}, ValueError, "`budgets` must be from 1 to 2500, got 2501"),
        ("hopskipjump", {"radii_255": (-1,)}, ValueError, "`radii_255`"),
        ("hopskipjump", {"radii_255": 8}, TypeError, "`radii_255` must be a list of numbers, got 8"),
        ("hopskipjump", {"queries": 0}, ValueError, "`queries`"),
        ("hopskipjump", {"init_eval": 1}, ValueError, "`init_eval`"),
        ("adaptive_pgd", {"eps_255": 0}, ValueError, "`eps_255`"),
        ("adaptive_pgd", {"alpha_255": 0}, ValueError, "`alpha_255`"),
        ("adaptive_pgd", {"steps": 0}, ValueError, "`steps`"),
        ("adaptive_pgd", {"eot_iter": 0}, ValueError, "`eot_iter`"),
        ("adaptive_pgd", {"backward": "sharpen"}, ValueError, "`backward` must be one of identity, blur, short_dip"),
        ("adaptive_pgd", {"intermediate": "last"}, ValueError, "`intermediate` must be one of stitched, got 'last'"),
        ("adaptive_pgd", {"loss": "dlr"}, ValueError, "`loss` must be one of ce, margin"),
        ("adaptive_pgd", {"coarse": 0}, ValueError, "`coarse` must be at least 1"),
        ("adaptive_pgd", {"final_looks": -1}, ValueError, "`final_looks` must be at least 0"),
        ("unrolled", {"T": 1}, ValueError, "`T` must be at least 2"),
        ("unrolled", {"evaluate_every": 0}, ValueError, "`evaluate_every`"),
        ("unrolled", {"intermediate": "last"}, TypeError, "'unrolled' takes no option 'intermediate'"),
        ("defended_autoattack", {"steps": 0}, ValueError, "`steps`"),
        ("defended_autoattack", {"eot_iter": 0}, ValueError, "`eot_iter`"),
        ("defended_autoattack", {"draws": "new"}, ValueError, "`draws` must be one of fresh, fixed"),
        ("defended_square", {"n_queries": 1}, ValueError, "`n_queries` must be at least 2"),
        ("defended_square", {"steps": 3}, TypeError, "'defended_square' takes no option 'steps'"),
    ],
)
def test_bad_options_are_refused(digits_cnn, name, options, error, message):
    with pytest.raises(error, match=message):
        adaptive(name, digits_cnn, Median(), **options)


@EVERY
def test_a_bare_victim_is_no_target(digits_cnn, name):
    with pytest.raises(TypeError, match=rf"`target` must be a DefendedVictim.* attack '{name}', got Normalised"):
        build_attack(name, digits_cnn)


def test_the_target_says_what_the_defence_has(digits_cnn, digits):
    class Turned(Median):
        @property
        def intermediate_views(self):
            return {"stitched": 1, "turned": 3}

        def intermediates(self, images, *, indices=None):
            made = self.purify(images, indices=indices)
            views = torch.stack([made, made.flip(-1)])
            return {"stitched": Intermediate(made[None]), "turned": Intermediate(views, torch.add, 1)}

    part, target = digits.select(0, 2), DefendedVictim(digits_cnn, Turned())
    assert (target.views("stitched"), target.views("turned"), target.steps_per_image) == (1, 3, 7)
    assert DefendedVictim(digits_cnn, NoDefense()).views("stitched") == 1
    with pytest.raises(ValueError, match="`intermediate` must be one of stitched, turned, got 'last'"):
        target.views("last")
    assert target.cost(purifications=2, gradients=1) == Cost(2, 14, 2, 1)
    answer, made = target.intermediate(part.images, torch.arange(2), name="turned", seed=0)
    assert torch.equal(answer, Median().purify(part.images))
    assert torch.equal(made.views, torch.stack([answer, answer.flip(-1)]))
    assert (made.scores, made.readings) == (torch.add, 3)
    answer, made = target.intermediate(part.images, torch.arange(2), name="stitched", seed=0)
    assert torch.equal(made.views[0], answer)


@pytest.mark.parametrize("name", ["bpda", "adaptive_pgd"])
def test_a_defence_may_write_into_what_it_is_given(digits_cnn, digits, name):
    part = digits.select(0, 2)
    defenses = Purifier(lambda x: x * 0.5), Purifier(lambda x: x.mul_(0.5))
    assert torch.equal(*(quick(name, digits_cnn, d)(part.images, part.labels) for d in defenses))
