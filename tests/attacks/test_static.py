"""The attacks on a victim: each is the library's, and where the library breaks ours does not."""

import copy

import foolbox
import pytest
import torch
import torchattacks
from torch import nn

from dipguard.attacks import build_attack

from .conftest import Scaled, Shadowed, right

FAMILY = pytest.mark.parametrize("name", ["fgsm", "pgd", "bim", "mifgsm", "eotpgd"])
ITERATIVE = pytest.mark.parametrize("name", ["pgd", "bim", "mifgsm", "eotpgd"])
THEIRS = {"fgsm": "FGSM", "pgd": "PGD", "bim": "BIM", "mifgsm": "MIFGSM", "eotpgd": "EOTPGD"}


@FAMILY
def test_gradient_signs_fool_the_digits_victim(digits_cnn, digits, name):
    attacked = build_attack(name, digits_cnn)(digits.images, digits.labels)
    assert right(digits_cnn, digits.images, digits.labels) >= 0.9
    assert right(digits_cnn, attacked, digits.labels) <= 0.15


@FAMILY
def test_gradient_signs_are_the_librarys(digits_cnn, digits, name):
    part = digits.select(0, 8)
    fixed = {"random_start": False} if name in ("pgd", "eotpgd") else {}
    ours = build_attack(name, digits_cnn, **fixed)(part.images, part.labels)
    theirs = getattr(torchattacks, THEIRS[name])(digits_cnn, **fixed)(part.images, part.labels)
    assert torch.equal(ours, theirs)


@ITERATIVE
def test_steps_arrive(digits_cnn, digits, name):
    part = digits.select(0, 8)
    fixed = {"random_start": False} if name in ("pgd", "eotpgd") else {}
    attack = build_attack(name, digits_cnn, eps_255=4, alpha_255=1, steps=1, **fixed)
    assert (attack(part.images, part.labels) - part.images).abs().max() == pytest.approx(1 / 255, abs=1e-6)
    assert attack.settings.items() >= {"alpha_255": 1, "steps": 1, **fixed}.items()


def test_the_start_depends_on_the_seed_and_the_batchs_first_index(digits_cnn, digits):
    name, images, labels = "pgd", digits.images[:8], digits.labels[:8]
    attack = build_attack(name, digits_cnn, batch_size=4)
    whole = attack(images, labels)
    assert torch.equal(attack(images[4:], labels[4:], indices=torch.arange(4, 8)), whole[4:])
    assert not torch.equal(attack(images[4:], labels[4:]), whole[4:])
    assert not torch.equal(build_attack(name, digits_cnn, batch_size=4, seed=1)(images, labels), whole)


@FAMILY
def test_a_victim_that_is_too_sure_is_fooled_where_the_library_stands_still(digits_cnn, digits, name):
    part = digits.select(0, 8)
    sure = Scaled(digits_cnn)
    theirs = getattr(torchattacks, THEIRS[name])(sure)(part.images, part.labels)
    ours = build_attack(name, sure)(part.images, part.labels)
    assert right(sure, theirs, part.labels) >= 0.75
    assert right(sure, ours, part.labels) == 0


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("pgd", {"eps_255": 0}, ValueError, "`eps_255` must be above 0"),
        ("bim", {"eps_255": -8}, ValueError, "`eps_255`"),
        ("fgsm", {"eps_255": 256}, ValueError, "`eps_255`.*255"),
        ("mifgsm", {"eps_255": float("nan")}, ValueError, "`eps_255`"),
        ("fgsm", {"eps_255": "8"}, TypeError, "`eps_255`"),
        ("none", {"eps_255": 8}, TypeError, "'none' takes no option 'eps_255'"),
        ("pgd", {"alpha_255": 0}, ValueError, "`alpha_255`"),
        ("eotpgd", {"alpha_255": 300}, ValueError, "`alpha_255`"),
        ("bim", {"steps": 0}, ValueError, "`steps`"),
        ("bim", {"random_start": True}, TypeError, "takes no option 'random_start'"),
        ("eotpgd", {"eot_iter": 0}, ValueError, "`eot_iter`"),
    ],
)
def test_bad_options_of_gradient_signs_are_refused(digits_cnn, name, options, error, message):
    with pytest.raises(error, match=message):
        build_attack(name, digits_cnn, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("fgsm", 0.25), ("pgd", 0.02), ("bim", 0.02), ("mifgsm", 0.02)])
def test_attacks_on_the_deepest_real_victim(deepest, name, most):
    victim, data = deepest
    attacked = build_attack(name, victim)(data.images, data.labels)
    assert right(victim, attacked, data.labels) <= most


DARK = torch.full((4, 3, 32, 32), 0.1)


@pytest.mark.parametrize("factor", [1000.0, 1e5])
def test_mifgsm_moves_a_sure_victims_images_where_the_library_leaves_them(digits_cnn, digits, factor):
    part = digits.select(0, 8)
    sure = Scaled(digits_cnn, factor)
    sure_of = sure(part.images).argmax(1) == part.labels
    theirs = torchattacks.MIFGSM(sure)(part.images, part.labels)
    ours = build_attack("mifgsm", sure)(part.images, part.labels)
    assert torch.equal(theirs[sure_of], part.images[sure_of])  # 0/0, and nobody is told
    assert right(sure, ours, part.labels) == 0


def test_one_sure_image_among_others_does_not_change_theirs(digits_cnn, digits):
    part = digits.select(0, 4)
    ours = build_attack("mifgsm", digits_cnn)(part.images, part.labels)
    assert torch.equal(ours, torchattacks.MIFGSM(digits_cnn)(part.images, part.labels))
    mixed = torch.cat([part.images, DARK[:1]])
    labels = torch.cat([part.labels, Shadowed(digits_cnn)(DARK[:1]).argmax(1)])
    victim = Shadowed(digits_cnn)
    attacked = build_attack("mifgsm", victim)(mixed, labels)
    assert torch.equal(attacked[:4], torchattacks.MIFGSM(victim)(mixed, labels)[:4])


def test_images_on_a_plateau_are_moved_within_the_budget_and_reproducibly(digits_cnn):
    victim = Shadowed(digits_cnn)
    labels = victim(DARK).argmax(1)
    assert torch.equal(torchattacks.MIFGSM(victim)(DARK, labels), DARK)
    attack = build_attack("mifgsm", victim)
    attacked = attack(DARK, labels)
    assert (attacked - DARK).abs().amax(dim=(1, 2, 3)).tolist() == pytest.approx([8 / 255] * 4, abs=1e-6)
    assert torch.equal(attack(DARK, labels), attacked)
    assert not torch.equal(build_attack("mifgsm", victim, seed=1)(DARK, labels), attacked)


def test_cw_fools_the_digits_victim(digits_cnn, digits):
    attacked = build_attack("cw", digits_cnn)(digits.images, digits.labels)
    assert right(digits_cnn, attacked, digits.labels) <= 0.15


class _Shifted(nn.Module):
    """The same decisions and margins, other logits."""

    def __init__(self, victim, shift):
        super().__init__()
        self.victim, self.shift = victim, shift

    def forward(self, images):
        return self.victim(images) + self.shift


def test_cw_depends_on_margins_alone_where_the_library_needs_positive_logits(digits_cnn, digits):
    part, shift = digits.select(0, 8), -64.0
    # In float64 a shift costs no digits, so that only the objective can make a difference.
    victim, images = copy.deepcopy(digits_cnn).double(), part.images.double()
    expected = build_attack("cw", victim)(images, part.labels)
    shifted = build_attack("cw", _Shifted(victim, shift))(images, part.labels)
    assert torch.allclose(shifted, expected, atol=1e-6)
    assert right(victim, shifted, part.labels) <= 0.2


def test_the_librarys_own_cw_fails_on_negative_logits(digits_cnn, digits):
    part = digits.select(0, 16)
    victim = _Shifted(copy.deepcopy(digits_cnn), -64.0)
    theirs = torchattacks.CW(victim)(part.images, part.labels)
    ours = build_attack("cw", victim)(part.images, part.labels)
    assert right(victim, theirs, part.labels) > 0.5
    assert right(victim, ours, part.labels) <= 0.2


def test_batch_mates_matter_so_the_batch_size_is_kept_and_1_sets_images_free(digits_cnn, digits):
    part = digits.select(0, 8)
    together, singly = (build_attack("cw", digits_cnn, lr=0.03, batch_size=size) for size in (8, 1))
    # Far beyond what rounding does to a batch of another size: the library stops all images at the same step.
    theirs, ours = together(part.images, part.labels), singly(part.images, part.labels)
    assert int(((theirs - ours).abs().amax(dim=(1, 2, 3)) > 0.01).sum()) >= 4
    assert torch.equal(singly(part.images[3:4], part.labels[3:4]), ours[3:4])
    assert (together.settings["batch_size"], singly.settings["batch_size"]) == (8, 1)


def test_pixels_at_the_limits_never_move(digits_cnn, digits):
    part = digits.select(0, 8)
    assert (part.images == 0).any()
    attacked = build_attack("cw", digits_cnn)(part.images, part.labels)
    at_limit = (part.images == 0) | (part.images == 1)
    assert torch.equal(attacked[at_limit], part.images[at_limit])
    assert not torch.equal(attacked, part.images)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps_255": 8}, TypeError, "'cw' takes no option 'eps_255'.*c, kappa, steps, lr"),
        ({"c": 0}, ValueError, "`c` must be above 0"),
        ({"lr": -1}, ValueError, "`lr`"),
        ({"kappa": -1}, ValueError, "`kappa`"),
        ({"steps": 1.5}, TypeError, "`steps`"),
    ],
)
def test_bad_options_of_cw_are_refused(digits_cnn, options, error, message):
    with pytest.raises(error, match=message):
        build_attack("cw", digits_cnn, **options)


@pytest.mark.slow
def test_cw_on_the_deepest_real_victim(deepest):
    victim, data = deepest
    assert right(victim, build_attack("cw", victim)(data.images, data.labels), data.labels) <= 0.02


class _FewClasses(nn.Module):
    """The first ``count`` classes of a victim."""

    def __init__(self, victim, count):
        super().__init__()
        self.victim, self.count = victim, count

    def forward(self, images):
        return self.victim(images)[:, : self.count]


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("autoattack", {}, 0.15),
        ("autoattack", {"version": "rand", "steps": 5}, 0.15),
        ("square", {"n_queries": 400, "eps_255": 60}, 0.8),  # few queries, on a victim that rounding trains anew
    ],
)
def test_autoattack_and_square_fool_the_digits_victim(digits_cnn, digits, name, options, most):
    part = digits.select(0, 8)
    attacked = build_attack(name, digits_cnn, **options)(part.images, part.labels)
    assert right(digits_cnn, attacked, part.labels) <= most


def test_the_weakest_budget_goes_through_all_four_parts(digits_cnn, digits):
    part = digits.select(0, 2)
    victim = copy.deepcopy(digits_cnn)  # FAB leaves gradients behind, where it is not called by `attack_batch`
    attack = build_attack("autoattack", victim, eps_255=0.25, steps=1, targets=1)
    made = attack.make(attack.view(victim))
    assert [type(each).__name__ for each in made._autoattack.attacks] == ["APGD", "APGDT", "FAB", "Square"]
    made._autoattack.attacks[-1].n_queries = 5  # all else is as `attack_batch` runs it
    with torch.no_grad():
        attacked = made(part.images, part.labels)
    assert (attacked - part.images).abs().max() <= 0.25 / 255 + 1e-6
    assert right(digits_cnn, attacked, part.labels) == right(digits_cnn, part.images, part.labels)


@pytest.mark.parametrize(("count", "version"), [(4, "standard"), (3, "rand")])
def test_the_number_of_classes_is_the_victims(digits_cnn, digits, count, version):
    few = _FewClasses(digits_cnn, count)
    part = digits.select(0, 40)
    images, labels = (values[part.labels < count][:4] for values in (part.images, part.labels))
    attacked = build_attack("autoattack", few, version=version, eps_255=16)(images, labels)
    assert right(few, attacked, labels) == 0
    with pytest.raises(ValueError, match=rf"`victim` must have at least {count} classes for '{version}', got 2"):
        build_attack("autoattack", _FewClasses(digits_cnn, 2), version=version)(images[:1], labels[:1] * 0)


def test_the_library_takes_ten_classes_for_granted(digits_cnn, digits):
    part = digits.select(0, 40)
    images, labels = (values[part.labels < 5][:4] for values in (part.images, part.labels))
    with pytest.raises(IndexError):
        torchattacks.AutoAttack(_FewClasses(copy.deepcopy(digits_cnn), 5), eps=0.5 / 255, seed=0)(images, labels)
    attack = build_attack("autoattack", _FewClasses(digits_cnn, 5), eps_255=0.5)
    targeted = attack.make(attack.view(attack.victim), num_classes=5)._autoattack.attacks[1:3]
    assert [part.n_target_classes for part in targeted] == [4, 4]


def test_steps_and_targets_arrive(digits_cnn):
    attack = build_attack("autoattack", digits_cnn, steps=100, targets=3)
    parts = attack.make(attack.view(digits_cnn), num_classes=1000)._autoattack.attacks
    assert [part.steps for part in parts[:3]] == [100] * 3
    assert [part.n_target_classes for part in parts[1:3]] == [3, 3]


@pytest.mark.parametrize("name", ["square", "autoattack"])
def test_seeds_and_indices_settle_the_draws(digits_cnn, digits, name):
    part = digits.select(0, 4)
    options = {"eps_255": 60, "n_queries": 100} if name == "square" else {"version": "rand", "steps": 1}
    attack = build_attack(name, digits_cnn, **options)
    first = attack(part.images, part.labels)
    torch.manual_seed(7)
    assert torch.equal(attack(part.images, part.labels), first)
    assert not torch.equal(attack(part.images, part.labels, indices=torch.arange(4, 8)), first)
    assert not torch.equal(build_attack(name, digits_cnn, seed=1, **options)(part.images, part.labels), first)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("square", {"n_queries": 0}, ValueError, "`n_queries`"),
        ("autoattack", {"version": "plus"}, ValueError, "`version` must be one of standard, rand"),
        ("autoattack", {"steps": 0}, ValueError, "`steps`"),
        ("autoattack", {"targets": 0}, ValueError, "`targets`"),
    ],
)
def test_bad_options_of_autoattack_and_square_are_refused(digits_cnn, name, options, error, message):
    with pytest.raises(error, match=message):
        build_attack(name, digits_cnn, **options)


def test_ddn_is_the_librarys(digits_cnn, digits):
    part = digits.select(0, 4)
    attack = build_attack("ddn", digits_cnn, steps=40)
    model = foolbox.PyTorchModel(digits_cnn, bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.DDNAttack(steps=40)(model, part.images, part.labels, epsilons=None)[1]
    ours = attack(part.images, part.labels)
    assert torch.equal(ours, theirs.clamp(0, 1))
    assert right(digits_cnn, ours, part.labels) == 0


def test_images_that_ddn_cannot_fool_come_back_clean_and_are_counted(digits_cnn, digits):
    part = digits.select(0, 8)
    attack = build_attack("ddn", digits_cnn, steps=1)  # too short a way
    attacked = attack(part.images, part.labels)
    withstood = ~attack.fooled(attacked, part.labels)
    assert withstood.sum() >= 4
    assert torch.equal(attacked[withstood], part.images[withstood])


def test_ddns_change_is_smaller_than_pgds(digits_cnn, digits):
    part = digits.select(0, 8)
    norms = {}
    for name in ("pgd", "ddn"):
        attacked = build_attack(name, digits_cnn)(part.images, part.labels)
        norms[name] = (attacked - part.images).flatten(1).norm(dim=1)
    assert (norms["ddn"] < norms["pgd"]).all()


def test_ddn_fools_a_victim_that_is_too_sure_by_a_change_of_the_same_size(digits_cnn, digits):
    part = digits.select(0, 4)
    changes = {}
    for victim in (digits_cnn, Scaled(digits_cnn)):
        attack = build_attack("ddn", victim, steps=40)
        attacked = attack(part.images, part.labels)
        assert attack.fooled(attacked, part.labels).all()
        changes[type(victim)] = float((attacked - part.images).flatten(1).norm(dim=1).mean())
    assert changes[Scaled] == pytest.approx(changes[type(digits_cnn)], rel=0.2)


def test_batch_mates_do_not_matter_to_ddn(digits_cnn, digits):
    part = digits.select(0, 4)
    victim, images = digits_cnn.double(), part.images.double()
    try:
        attack = build_attack("ddn", victim, steps=30)
        assert torch.allclose(attack(images, part.labels)[2:3], attack(images[2:3], part.labels[2:3]), atol=1e-9)
    finally:
        digits_cnn.float()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps_255": 8}, TypeError, "'ddn' takes no option 'eps_255'.*steps"),
        ({"steps": 0}, ValueError, "`steps`"),
    ],
)
def test_bad_options_of_ddn_are_refused(digits_cnn, options, error, message):
    with pytest.raises(error, match=message):
        build_attack("ddn", digits_cnn, **options)


@pytest.mark.slow
def test_ddn_on_the_deepest_real_victim(deepest):
    victim, data = deepest[0], deepest[1].select(0, 16)
    assert right(victim, build_attack("ddn", victim)(data.images, data.labels), data.labels) == 0


def test_noise_moves_every_pixel_by_eps_or_to_the_border(digits_cnn):
    images = torch.full((2, 3, 32, 32), 0.5)
    images[1] = 0.0
    noisy = build_attack("noise", digits_cnn, eps_255=8)(images, torch.tensor([0, 1]))
    change = noisy - images
    assert torch.allclose(change[0].abs(), torch.tensor(8 / 255))
    assert 0.45 < float((change[0] > 0).float().mean()) < 0.55
    assert change[1].unique().tolist() == [0.0, pytest.approx(8 / 255)]


def test_noise_is_drawn_from_seed_and_index(digits_cnn, digits):
    part = digits.select(0, 2)
    first = build_attack("noise", digits_cnn)(part.images, part.labels)
    assert not torch.equal(build_attack("noise", digits_cnn, seed=1)(part.images, part.labels), first)
    moved = build_attack("noise", digits_cnn)(part.images, part.labels, indices=torch.tensor([3, 4]))
    assert not torch.equal(moved, first)


def test_noise_harms_less_than_a_gradient_does(digits_cnn, digits):
    noisy, attacked = (build_attack(name, digits_cnn)(digits.images, digits.labels) for name in ("noise", "fgsm"))
    assert right(digits_cnn, noisy, digits.labels) >= 0.8 > 0.3 > right(digits_cnn, attacked, digits.labels)


@pytest.mark.parametrize("eps_255", [0, -1, 256])
def test_bad_sizes_of_noise_are_refused(digits_cnn, eps_255):
    with pytest.raises(ValueError, match="`eps_255`"):
        build_attack("noise", digits_cnn, eps_255=eps_255)
