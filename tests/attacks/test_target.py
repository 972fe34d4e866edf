"""What holds for every adaptive attack and its target: most tests below run for each of them."""

import json

import pytest
import torch

from dipguard import DIPGuard
from dipguard.attacks import Cost, DefendedVictim, Snapshot, build_attack
from dipguard.decision.intermediates import Intermediate

from .conftest import ADAPTIVE, QUICK, Enlarge, Median, NoDefense, Noise, adaptive, any_size

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


def quick(name, victim, defense, **options):
    return adaptive(name, victim, defense, **{**QUICK[name], **options})


@EVERY
def test_result_keeps_shape_dtype_range_and_the_given_images(digits_cnn, digits, name):
    part = digits.select(0, 2)
    given = part.images.clone()
    attacked = quick(name, digits_cnn, Median())(part.images, part.labels)
    assert (attacked.shape, attacked.dtype) == (given.shape, given.dtype)
    assert 0 <= attacked.min() <= attacked.max() <= 1
    assert not attacked.requires_grad
    assert torch.equal(part.images, given)


@pytest.mark.parametrize(("name", "draws"), [*((name, "fresh") for name in ADAPTIVE), ("adaptive_pgd", "fixed")])
def test_modes_and_the_callers_random_state_change_nothing(digits_cnn, digits, name, draws):
    part = digits.select(0, 2)
    expected = quick(name, digits_cnn, Noise(), draws=draws)(part.images, part.labels)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with torch.no_grad(), torch.inference_mode():
        attacked = quick(name, digits_cnn, Noise(), draws=draws)(part.images.clone(), part.labels.clone())
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(attacked, expected)
    attacked.add_(0)  # an inference tensor would refuse outside of inference mode


class _Sloppy:
    """A random defence that draws from the global generator and knows no indices' use."""

    def purify(self, images, *, indices=None):
        return (images + 0.05 * torch.randn_like(images)).clamp(0, 1)


@EVERY
def test_a_defence_that_uses_the_global_generator_is_seeded_too(digits_cnn, digits, name):
    part = digits.select(0, 2)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(quick(name, digits_cnn, _Sloppy(), draws="fresh")(part.images, part.labels))
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
def test_fooled_asks_the_defended_victim(digits_cnn, digits, name):
    part = digits.select(0, 4)
    attack = quick(name, digits_cnn, Median())
    attacked = attack(part.images, part.labels)
    read = digits_cnn(Median().purify(attacked)).argmax(1)
    assert torch.equal(attack.fooled(attacked, part.labels), read != part.labels)


@EVERY
def test_the_estimate_holds_and_costs_add_up_over_calls(digits_cnn, digits, name):
    part = digits.select(0, 4)
    attack = quick(name, digits_cnn, Median())
    estimate = attack.estimate(4)
    assert attack.spent == Cost()
    attack(part.images, part.labels)
    spent = attack.spent
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
def test_the_victim_is_left_as_it_was(digits_cnn, digits, name):
    victim = digits_cnn.train()
    try:
        victim.network[1].eval()
        modes = [module.training for module in victim.modules()]
        flags = [p.requires_grad for p in victim.parameters()]
        state = {key: value.clone() for key, value in victim.state_dict().items()}
        quick(name, victim, Median())(digits.images[:2], digits.labels[:2])
        assert [module.training for module in victim.modules()] == modes
        assert [p.requires_grad for p in victim.parameters()] == flags
        assert all(p.grad is None for p in victim.parameters())
        assert all(torch.equal(value, state[key]) for key, value in victim.state_dict().items())
    finally:
        victim.eval()


@EVERY
def test_settings_are_json(digits_cnn, name):
    settings = adaptive(name, digits_cnn, NoDefense(), seed=3, batch_size=7, draws="fresh").settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings.items() >= {"name": name, "seed": 3, "batch_size": 7, "draws": "fresh"}.items()


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@EVERY
def test_the_attack_follows_the_victim_to_the_gpu(digits_cnn, digits, name):
    part = digits.select(0, 4)
    attack = quick(name, digits_cnn, Noise())
    try:
        digits_cnn.cuda()
        attacked = attack(part.images, part.labels)
        assert attacked.device == part.images.device
        assert attack.fooled(attacked, part.labels).shape == (4,)
    finally:
        digits_cnn.cpu()


class _Broken:
    def __init__(self, change):
        self.change = change

    def purify(self, images, *, indices=None):
        return self.change(images)


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
        quick(name, digits_cnn, _Broken(change))(digits.images[:2], digits.labels[:2])


@SOME
def test_bad_defences_are_refused(digits_cnn, name):
    with pytest.raises(TypeError, match=r"`defense` must have purify.*got method"):
        quick(name, digits_cnn, Median().purify)

    class Old:
        def purify(self, images):
            return images

    with pytest.raises(TypeError, match="indices=None\\), got purify\\(images\\)"):
        quick(name, digits_cnn, Old())


@SOME
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.full((4, 3, 32, 32), 2.0)}, ValueError, "`images`.*\\[0, 1\\]"),
        ({"labels": torch.tensor([0, 1, 2])}, ValueError, "`labels`.*\\(4,\\)"),
        ({"labels": torch.tensor([0, 1, 2, 10])}, ValueError, "`labels`.*below 10"),
        ({"indices": torch.tensor([0, 1])}, ValueError, "`indices`"),
    ],
)
def test_bad_input_is_refused(digits_cnn, digits, name, change, error, message):
    given = {"images": digits.images[:4], "labels": digits.labels[:4]}
    with pytest.raises(error, match=message):
        quick(name, digits_cnn, Median())(**{**given, **change})


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("bpda", {"eps_255": 0}, ValueError, "`eps_255` must be above 0"),
        ("bpda", {"alpha_255": 0}, ValueError, "`alpha_255`"),
        ("bpda", {"steps": 0}, ValueError, "`steps`"),
        ("bpda", {"draws": "new"}, ValueError, "`draws` must be one of fresh, fixed"),
        ("bpda", {"queries": 5}, TypeError, "'bpda' takes no option 'queries'"),
        ("bpda", {"budgets": (0, 1)}, ValueError, "`budgets` must be from 1 to 15, got 0"),
        ("bpda", {"budgets": (16,)}, ValueError, "`budgets` must be from 1 to 15, got 16"),
        ("bpda", {"budgets": (1.5,)}, TypeError, "`budgets`"),
        ("hopskipjump", {"steps": 8}, TypeError, "'hopskipjump' takes no option 'steps'"),
        ("hopskipjump", {"eps_255": 0}, ValueError, "`eps_255` must be above 0"),
        ("hopskipjump", {"budgets": (0,)}, ValueError, "`budgets`"),
        ("hopskipjump", {"budgets": ("200",)}, TypeError, "`budgets`"),
        ("hopskipjump", {"budgets": (2501,)}, ValueError, "`budgets` must be from 1 to 2500, got 2501"),
        ("hopskipjump", {"radii_255": (-1,)}, ValueError, "`radii_255`"),
        ("hopskipjump", {"queries": 0}, ValueError, "`queries`"),
        ("hopskipjump", {"init_eval": 1}, ValueError, "`init_eval`"),
    ],
)
def test_bad_options_are_refused(digits_cnn, name, options, error, message):
    with pytest.raises(error, match=message):
        adaptive(name, digits_cnn, Median(), **options)


@EVERY
def test_a_bare_victim_is_no_target(digits_cnn, name):
    with pytest.raises(
        TypeError, match=rf"`target` must be a DefendedVictim.* for the attack '{name}', got Normalised"
    ):
        build_attack(name, digits_cnn)


@EVERY
def test_a_call_is_the_last_snapshot(digits_cnn, digits, name):
    part, attack = digits.select(0, 3), quick(name, digits_cnn, Median())
    made = attack.snapshots(part.images, part.labels)
    assert list(made) == [Snapshot(attack.eps_255, None)]
    assert torch.equal(*made.values(), attack(part.images, part.labels))
    assert attack.adaptive


def test_the_target_says_what_the_defence_has(digits_cnn, digits):
    class Mirrored(Median):
        @property
        def intermediate_views(self):
            return {"stitched": 1, "mirrored": 2}

        def intermediates(self, images, *, indices=None):
            made = self.purify(images, indices=indices)
            views = torch.stack([made, made.flip(-1)])
            return {"stitched": Intermediate(made[None]), "mirrored": Intermediate(views, torch.neg)}

    part, target = digits.select(0, 2), DefendedVictim(digits_cnn, Mirrored())
    assert (target.views("stitched"), target.views("mirrored"), target.steps_per_image) == (1, 2, 7)
    assert DefendedVictim(digits_cnn, NoDefense()).views("stitched") == 1
    with pytest.raises(ValueError, match="`intermediate` must be one of stitched, mirrored, got 'last'"):
        target.views("last")
    assert target.cost(purifications=2, gradients=1) == Cost(2, 14, 2, 1)
    answer, made = target.intermediate(part.images, torch.arange(2), name="mirrored", seed=0)
    assert torch.equal(answer, Median().purify(part.images))
    assert torch.equal(made.views, torch.stack([answer, answer.flip(-1)]))
    assert made.view is torch.neg
    answer, made = target.intermediate(part.images, torch.arange(2), name="stitched", seed=0)
    assert torch.equal(made.views[0], answer)
