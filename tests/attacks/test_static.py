"""The attacks on a victim: each is the library's, and where the library breaks ours does not."""

import copy

import foolbox
import pytest
import torch
import torchattacks

from dipguard.attacks import build_attack
from dipguard.attacks.libraries import VictimView

from .conftest import Changed, Shadowed, right, scaled

THEIRS = {"fgsm": "FGSM", "pgd": "PGD", "bim": "BIM", "mifgsm": "MIFGSM"}


@pytest.mark.parametrize(
    ("name", "options", "count", "most"),
    [
        *((name, {}, 40, 0.15) for name in (*THEIRS, "cw")),
        ("autoattack", {}, 8, 0.15),
        ("autoattack", {"version": "rand", "steps": 5}, 8, 0.15),
        ("square", {"n_queries": 400, "eps_255": 60}, 8, 0.8),  # few queries, on a victim that rounding trains anew
    ],
)
def test_it_fools_the_digits_victim(digits_cnn, digits, name, options, count, most):
    part = digits.select(0, count)
    attacked = build_attack(name, digits_cnn, **options)(part.images, part.labels)
    assert right(digits_cnn, digits.images, digits.labels) >= 0.9
    assert right(digits_cnn, attacked, part.labels) <= most


@pytest.mark.parametrize("name", THEIRS)
def test_gradient_signs_are_the_librarys(digits_cnn, digits, name):
    part, exact = digits.select(0, 8), copy.deepcopy(digits_cnn).double()  # in float32 rounding turns the smallest ones
    fixed = {"random_start": False} if name == "pgd" else {}
    ours = build_attack(name, exact, **fixed)(part.images, part.labels)
    theirs = getattr(torchattacks, THEIRS[name])(VictimView(exact), **fixed)(part.images, part.labels)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["pgd", "bim", "mifgsm"])
def test_steps_arrive(digits_cnn, digits, name):
    part = digits.select(0, 8)
    fixed = {"random_start": False} if name == "pgd" else {}
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


@pytest.mark.parametrize(("name", "factor"), [*((name, 1000.0) for name in THEIRS), ("mifgsm", 1e5)])
def test_a_victim_that_is_too_sure_is_fooled_where_the_library_stands_still(digits_cnn, digits, name, factor):
    part = digits.select(0, 8)
    sure = scaled(digits_cnn, factor)
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
        ("bim", {"alpha_255": 300}, ValueError, "`alpha_255`"),
        ("bim", {"steps": 0}, ValueError, "`steps`"),
        ("bim", {"random_start": True}, TypeError, "takes no option 'random_start'"),
        ("cw", {"eps_255": 8}, TypeError, "'cw' takes no option 'eps_255'.*c, kappa, steps, lr"),
        ("cw", {"c": 0}, ValueError, "`c` must be above 0"),
        ("cw", {"lr": -1}, ValueError, "`lr`"),
        ("cw", {"kappa": -1}, ValueError, "`kappa`"),
        ("cw", {"steps": 1.5}, TypeError, "`steps`"),
        ("square", {"n_queries": 0}, ValueError, "`n_queries`"),
        ("autoattack", {"version": "plus"}, ValueError, "`version` must be one of standard, rand"),
        ("autoattack", {"steps": 0}, ValueError, "`steps`"),
        ("autoattack", {"targets": 0}, ValueError, "`targets`"),
        ("ddn", {"eps_255": 8}, TypeError, "'ddn' takes no option 'eps_255'.*steps"),
        ("ddn", {"steps": 0}, ValueError, "`steps`"),
        ("noise", {"eps_255": 0}, ValueError, "`eps_255`"),
        ("noise", {"eps_255": -1}, ValueError, "`eps_255`"),
        ("noise", {"eps_255": 256}, ValueError, "`eps_255`"),
    ],
)
def test_bad_options_are_refused(digits_cnn, name, options, error, message):
    with pytest.raises(error, match=message):
        build_attack(name, digits_cnn, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "most"),
    [("fgsm", 64, 0.25), *((name, 64, 0.02) for name in ("pgd", "bim", "mifgsm", "cw")), ("ddn", 16, 0)],
)
def test_attacks_on_the_deepest_real_victim(deepest, name, count, most):
    victim, data = deepest[0], deepest[1].select(0, count)
    attacked = build_attack(name, victim)(data.images, data.labels)
    assert right(victim, attacked, data.labels) <= most


DARK = torch.full((4, 3, 32, 32), 0.1)


def test_one_sure_image_among_others_does_not_change_theirs(digits_cnn, digits):
    part, victim = digits.select(0, 4), Shadowed(digits_cnn)
    mixed = torch.cat([part.images, DARK[:1]])
    labels = torch.cat([part.labels, victim(DARK[:1]).argmax(1)])
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


def test_cw_depends_on_margins_alone_where_the_library_needs_positive_logits(digits_cnn, digits):
    part = digits.select(0, 8)
    # In float64 a shift costs no digits, so that only the objective can make a difference.
    victim, images = copy.deepcopy(digits_cnn).double(), part.images.double()
    expected = build_attack("cw", victim)(images, part.labels)
    shifted = build_attack("cw", Changed(victim, lambda logits: logits - 64))(images, part.labels)
    assert torch.allclose(shifted, expected, atol=1e-6)
    assert right(victim, shifted, part.labels) <= 0.2


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
    few, two = (Changed(digits_cnn, lambda logits, n=n: logits[:, :n]) for n in (count, 2))
    images, labels = (values[digits.labels < count][:4] for values in (digits.images, digits.labels))
    attacked = build_attack("autoattack", few, version=version, eps_255=16)(images, labels)
    assert right(few, attacked, labels) == 0
    with pytest.raises(ValueError, match=rf"`victim` must have at least {count} classes for '{version}', got 2"):
        build_attack("autoattack", two, version=version)(images[:1], labels[:1] * 0)


@pytest.mark.parametrize(("options", "classes", "tried"), [({"targets": 3}, 1000, 3), ({}, 5, 4)])
def test_steps_and_targets_arrive(digits_cnn, options, classes, tried):
    attack = build_attack("autoattack", digits_cnn, steps=100, **options)
    parts = attack.make(attack.view(digits_cnn), num_classes=classes)._autoattack.attacks
    assert [part.steps for part in parts[:3]] == [100] * 3
    assert [part.n_target_classes for part in parts[1:3]] == [tried] * 2


@pytest.mark.parametrize(
    ("name", "options"),
    [("square", {"eps_255": 60, "n_queries": 100}), ("autoattack", {"version": "rand", "steps": 1}), ("noise", {})],
)
def test_seeds_and_indices_settle_the_draws(digits_cnn, digits, name, options):
    part = digits.select(0, 4)
    attack = build_attack(name, digits_cnn, **options)
    first = attack(part.images, part.labels)
    torch.manual_seed(7)
    assert torch.equal(attack(part.images, part.labels), first)
    assert not torch.equal(attack(part.images, part.labels, indices=torch.arange(4, 8)), first)
    assert not torch.equal(build_attack(name, digits_cnn, seed=1, **options)(part.images, part.labels), first)


def test_ddn_is_the_librarys(digits_cnn, digits):
    part = digits.select(0, 4)
    attack = build_attack("ddn", digits_cnn, steps=40)
    model = foolbox.PyTorchModel(VictimView(digits_cnn), bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.DDNAttack(steps=40)(model, part.images, part.labels, epsilons=None)[1]
    ours = attack(part.images, part.labels)
    assert torch.equal(ours, theirs.clamp(0, 1))
    assert right(digits_cnn, ours, part.labels) == 0


def test_images_that_ddn_cannot_fool_come_back_clean(digits_cnn, digits):
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
    changes = []
    for victim in (digits_cnn, scaled(digits_cnn)):
        attack = build_attack("ddn", victim, steps=40)
        attacked = attack(part.images, part.labels)
        assert attack.fooled(attacked, part.labels).all()
        changes.append(float((attacked - part.images).flatten(1).norm(dim=1).mean()))
    assert changes[1] == pytest.approx(changes[0], rel=0.2)


def test_batch_mates_do_not_matter_to_ddn(digits_cnn, digits):
    part = digits.select(0, 4)
    victim, images = digits_cnn.double(), part.images.double()
    try:
        attack = build_attack("ddn", victim, steps=30)
        assert torch.allclose(attack(images, part.labels)[2:3], attack(images[2:3], part.labels[2:3]), atol=1e-9)
    finally:
        digits_cnn.float()


def test_noise_moves_every_pixel_by_eps_or_to_the_border(digits_cnn):
    images = torch.full((2, 3, 32, 32), 0.5)
    images[1] = 0.0
    noisy = build_attack("noise", digits_cnn, eps_255=8)(images, torch.tensor([0, 1]))
    change = noisy - images
    assert torch.allclose(change[0].abs(), torch.tensor(8 / 255))
    assert 0.45 < float((change[0] > 0).float().mean()) < 0.55
    assert change[1].unique().tolist() == [0.0, pytest.approx(8 / 255)]


def test_noise_harms_less_than_a_gradient_does(digits_cnn, digits):
    noisy, attacked = (build_attack(name, digits_cnn)(digits.images, digits.labels) for name in ("noise", "fgsm"))
    assert right(digits_cnn, noisy, digits.labels) >= 0.8 > 0.3 > right(digits_cnn, attacked, digits.labels)
