"""What holds for every attack: most tests below run for each of them."""

import json
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from dipguard.attacks import ATTACKS, Attack, Cost, DefendedVictim, Snapshot, build_attack
from dipguard.registry import _registered, lookup, options_of

from .conftest import ADAPTIVE, STATIC, Changed, NoDefense, Noise, accuracy, quick

EVERY = pytest.mark.parametrize("name", ATTACKS)
SOME = pytest.mark.parametrize("name", ["none", "pgd", "ddn", "bpda", "hopskipjump"])


@EVERY
def test_result_keeps_shape_dtype_and_range(digits, quick_result, name):
    given, attacked = digits.images[:4], quick_result(name)
    assert (attacked.shape, attacked.dtype) == (given.shape, given.dtype)
    assert 0 <= attacked.min() <= attacked.max() <= 1
    assert not attacked.requires_grad
    assert attacked.data_ptr() != given.data_ptr()


@pytest.mark.parametrize("name", ["fgsm", "adaptive_pgd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_attacked_in_float32(digits_cnn, digits, name, dtype):
    given, labels = digits.images[:4].to(dtype), digits.labels[:4]
    attacked = quick(name, digits_cnn, Noise())(given, labels)
    assert attacked.dtype == dtype
    assert torch.equal(attacked, quick(name, digits_cnn, Noise())(given.float(), labels).to(dtype))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in STATIC),
        *((name, {"draws": "fresh"}) for name in ADAPTIVE),
        ("adaptive_pgd", {"draws": "fixed"}),
    ],
)
def test_the_callers_gradient_mode_autocast_and_random_state_change_nothing(digits_cnn, digits, name, options):
    part = digits.select(0, 4)
    expected = quick(name, digits_cnn, Noise(), **options)(part.images, part.labels)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        attacked = quick(name, digits_cnn, Noise(), **options)(part.images.clone(), part.labels.clone())
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(attacked, expected)
    attacked.add_(0)  # an inference tensor would refuse outside of inference mode


class Watched(nn.Module):
    """The brightness of an image as ten logits; notes how convolutions would multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.add(torch.backends.cudnn.conv.fp32_precision)
        return images.mean(dim=(1, 2, 3))[:, None] * torch.linspace(-1, 1, 10).to(images)


@EVERY
def test_a_victim_is_never_attacked_in_tf32(digits, name):
    before, victim = torch.backends.cudnn.conv.fp32_precision, Watched()
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        attack = quick(name, victim)
        attack.fooled(attack(digits.images[:2], digits.labels[:2]), digits.labels[:2])
        assert victim.seen == {"ieee"}
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@EVERY
def test_the_victim_is_left_as_it_was(digits_cnn, digits, name):
    victim = digits_cnn.train()
    try:
        victim.network[1].eval()
        victim.network[0].weight.requires_grad_(False)
        modes = [module.training for module in victim.modules()]
        flags = [p.requires_grad for p in victim.parameters()]
        state = {key: value.clone() for key, value in victim.state_dict().items()}
        quick(name, victim)(digits.images[:2], digits.labels[:2])
        assert [module.training for module in victim.modules()] == modes
        assert [p.requires_grad for p in victim.parameters()] == flags
        assert all(p.grad is None for p in victim.parameters())
        assert all(torch.equal(value, state[key]) for key, value in victim.state_dict().items())
    finally:
        victim.eval().requires_grad_(True)


@pytest.mark.parametrize("name", STATIC)
def test_whole_batches_do_not_depend_on_what_follows(digits_cnn, digits, name):
    attack = quick(name, digits_cnn, batch_size=2)
    few = attack(digits.images[:2], digits.labels[:2])
    assert torch.equal(attack(digits.images[:3], digits.labels[:3])[:2], few)


@EVERY
def test_options_are_all_in_the_settings_with_the_defaults_of_the_source(digits_cnn, name):
    target = DefendedVictim(digits_cnn, NoDefense()) if name in ADAPTIVE else digits_cnn
    attack = lookup(ATTACKS, name, argument="attack")(target)
    options = options_of(ATTACKS[name])  # read without importing it: the defaults are literals
    settings = attack.settings
    assert {"seed", "batch_size"} <= options.keys() <= settings.keys()
    assert {option: settings[option] for option in options} == {
        option: [] if default == () else default for option, default in options.items()
    }


@EVERY
def test_the_one_snapshot_is_what_a_call_gives_and_the_given_images_stay(digits_cnn, digits, quick_result, name):
    part, attack = digits.select(0, 4), quick(name, digits_cnn)
    given = part.images.clone()
    made = attack.snapshots(part.images, part.labels)
    assert torch.equal(part.images, given)
    assert list(made) == [Snapshot(attack.eps_255, None)]
    assert torch.equal(*made.values(), quick_result(name))
    assert attack.adaptive == (name in ADAPTIVE)
    if not attack.adaptive:  # nothing is counted
        assert attack.spent == attack.estimate(4) == Cost()
        assert (attack.history, attack.last_history, attack.flat) == ([], [], None)


@EVERY
def test_settings_hold_everything_and_are_json(digits_cnn, name):
    given = {"seed": 3, "batch_size": 7} | ({"draws": "fresh"} if name in ADAPTIVE else {})
    settings = quick(name, digits_cnn, **given).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings.items() >= {"name": name, **given}.items()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8)}, TypeError, "`images`.*255"),
        ({"images": torch.full((4, 3, 32, 32), 2.0)}, ValueError, "`images`.*\\[0, 1\\]"),
        ({"images": torch.zeros(3, 32, 32)}, ValueError, "`images`.*4 dimensions"),
        ({"images": torch.zeros(0, 3, 32, 32)}, ValueError, "`images`"),
        ({"labels": torch.tensor([0, 1, 2])}, ValueError, "`labels`.*\\(4,\\)"),
        ({"labels": torch.tensor([0, 1, 2, 10])}, ValueError, "`labels`.*below 10"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, ValueError, "`labels`.*at least 0"),
        ({"labels": torch.zeros(4)}, TypeError, "`labels`.*integer"),
        ({"indices": torch.tensor([0, 1])}, ValueError, "`indices`"),
    ],
)
@SOME
def test_bad_input_is_refused(digits_cnn, digits, name, change, error, message):
    given = {"images": digits.images[:4], "labels": digits.labels[:4]}
    with pytest.raises(error, match=message):
        quick(name, digits_cnn)(**{**given, **change})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "`seed`"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"batch_size": 2.5}, TypeError, "`batch_size`"),
        ({"colour": "red"}, TypeError, "takes no option 'colour'"),
    ],
)
@SOME
def test_bad_options_are_refused(digits_cnn, name, options, error, message):
    with pytest.raises(error, match=message):
        quick(name, digits_cnn, **options)


def test_unknown_attacks_and_victims_are_refused(digits_cnn):
    with pytest.raises(ValueError, match=r"`attack`.*none, fgsm, pgd, bim, mifgsm, cw, ddn.*'magic'"):
        build_attack("magic", digits_cnn)
    with pytest.raises(TypeError, match=r"`target` must be a torch.nn.Module, got method"):
        build_attack("none", digits_cnn.forward)
    with pytest.raises(TypeError, match=r"`target` must be a torch.nn.Module, got DefendedVictim"):
        build_attack("pgd", DefendedVictim(digits_cnn, NoDefense()))


def test_an_installed_package_adds_its_attacks(digits_cnn, digits, monkeypatch):
    points = {"dipguard.attacks": [EntryPoint("dark", f"{__name__}:Dark", "dipguard.attacks")]}
    monkeypatch.setattr("dipguard.registry._registered", _registered.__wrapped__)
    monkeypatch.setattr("dipguard.registry.entry_points", lambda group: points.get(group, []))
    part = digits.select(0, 2)
    attack = build_attack("dark", digits_cnn, share=0.5)
    assert torch.equal(attack(part.images, part.labels), part.images * 0.5)
    assert attack.settings.items() >= {"name": "dark", "share": 0.5, "seed": 0}.items()
    with pytest.raises(TypeError, match=r"'dark' takes no option 'colour'.*share"):
        build_attack("dark", digits_cnn, colour="red")


class Dark(Attack):
    name = "dark"

    def __init__(self, target, *, share=1.0, **options):
        super().__init__(target, **options)
        self.share = share

    def attack_batch(self, images, labels, indices):
        return images * self.share


def test_autoattack_takes_images_in_float64(digits_cnn, digits):
    part = digits.select(0, 2)
    attack = quick("autoattack", digits_cnn, eps_255=0.01)  # no image is fooled, so that all its attacks run
    made = attack(part.images.double(), part.labels)
    assert made.dtype == torch.float64
    torch.testing.assert_close(made, attack(part.images, part.labels).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in STATIC if name not in ("none", "cw", "ddn")])
@pytest.mark.parametrize("eps_255", [0.5, 8])
def test_the_budget_is_in_levels_of_255_and_is_kept(digits_cnn, digits, quick_result, name, eps_255):
    part = digits.select(0, 4 if eps_255 == 8 else 2)
    fast = {"version": "rand"} if name == "autoattack" else {}  # standard takes its time where it fails
    attack = quick(name, digits_cnn, eps_255=eps_255, **fast)
    attacked = quick_result(name) if eps_255 == 8 else attack(part.images, part.labels)  # 8 is the default
    change = (attacked - part.images).abs().max()
    assert change <= eps_255 / 255 + 1e-6
    if name not in ("square", "autoattack"):  # they give an image back that they could not fool
        assert change == pytest.approx(eps_255 / 255, abs=1e-6)
    assert attack.settings["eps_255"] == eps_255


class _Careless(Attack):
    """An attack as a user might add it, that breaks a promise in the way it is told to."""

    name = "careless"
    eps_255 = 8

    def __init__(self, target, change):
        super().__init__(target, batch_size=3)
        self.change = change

    def attack_batch(self, images, labels, indices):
        return self.change(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x + 0.02, "left \\[0, 1\\]"),
        (lambda x: (x + 0.04).clamp(0, 1), "changed a pixel by 0.04, its budget is 0.0313"),
        (lambda x: x * float("nan"), "left \\[0, 1\\]: its values go from nan"),
        (lambda x: x[:2], "returned \\(2, 3, 32, 32\\)"),
        (lambda x: x.double(), "torch.float64"),
        (lambda x: x.add_(0.5).clamp_(0, 1), "changed a pixel by 0.5"),  # its own copy, which it may change
    ],
)
def test_a_careless_attack_is_caught(digits_cnn, digits, change, message):
    with pytest.raises(RuntimeError, match=f"'careless'.*{message}"):
        _Careless(digits_cnn, change)(digits.images[:4], digits.labels[:4])


@pytest.mark.parametrize("name", ["fgsm", "bpda"])
def test_a_victim_of_probabilities_is_a_warning(digits_cnn, digits, name):
    sure = Changed(digits_cnn, lambda logits: logits.softmax(1))
    with pytest.warns(UserWarning, match="probabilities"):
        quick(name, sure)(digits.images[:2], digits.labels[:2])


def test_rounding_is_no_breach(digits_cnn, digits):
    attack = _Careless(digits_cnn, lambda x: (x + 8 / 255 + 5e-7).clamp(0, 1))
    assert attack(digits.images[:4], digits.labels[:4]).shape == (4, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@EVERY
def test_the_attack_follows_the_victim_to_the_gpu(digits_cnn, digits, name):
    part, attack = digits.select(0, 8), quick(name, digits_cnn, Noise())
    try:
        digits_cnn.cuda()
        before = torch.cuda.get_rng_state()
        attacked = attack(part.images, part.labels)
        assert attacked.device == part.images.device
        assert torch.equal(torch.cuda.get_rng_state(), before)
        assert attack.fooled(attacked, part.labels).shape == (8,)
    finally:
        digits_cnn.cpu()


MOST = {"none": 1, "noise": 1, "fgsm": 0.5, "square": 0.5}
"""Share of the two images that may still be right, where that is not none."""


@pytest.mark.parametrize(
    "name", [name if name in ("pgd", "ddn") else pytest.param(name, marks=pytest.mark.slow) for name in STATIC]
)
def test_it_fools_a_real_victim(real_victim, name):
    victim, data = real_victim[0], real_victim[1].select(0, 2)
    attack = quick(name, victim, **{"square": {"n_queries": 100}}.get(name, {}))
    assert accuracy(attack, data.images, data) >= 0.5
    assert accuracy(attack, attack(data.images, data.labels), data) <= MOST.get(name, 0)


def test_fooled_are_those_that_the_victim_misreads(digits_cnn, digits):
    part = digits.select(0, 16)
    attack = build_attack("fgsm", digits_cnn, eps_255=1, batch_size=5)
    attacked = attack(part.images, part.labels)
    fooled = attack.fooled(attacked, part.labels)
    assert torch.equal(fooled, digits_cnn(attacked).argmax(1) != part.labels)
    assert 0 < fooled.sum() < 16


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fooled_leaves_victim_and_grad_mode_alone(digits_cnn, digits, mode):
    part = digits.select(0, 4)
    attack = build_attack("fgsm", digits_cnn)
    attacked = attack(part.images, part.labels)
    victim = digits_cnn.train()
    try:
        with mode():
            fooled = attack.fooled(attacked, part.labels)
        assert victim.training
        fooled.logical_not_()  # an inference tensor would refuse
    finally:
        victim.eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacked": torch.full((4, 3, 32, 32), 2.0)}, "`attacked` must lie in \\[0, 1\\]"),
        ({"labels": torch.tensor([0, 1, 2])}, "`labels`"),
    ],
)
def test_fooled_refuses_bad_input(digits_cnn, digits, change, message):
    given = {"attacked": digits.images[:4], "labels": digits.labels[:4]}
    with pytest.raises(ValueError, match=message):
        build_attack("fgsm", digits_cnn).fooled(**{**given, **change})


def test_costs_add_up_and_read_well():
    cost = Cost(purifications=2, dip_steps=2000, victim_queries=2) + Cost(1, 1000, 1, 4)
    assert cost == Cost(3, 3000, 3, 4)
    assert sum([cost, cost], Cost()) == Cost(6, 6000, 6, 8)
    assert str(Cost(1500, 1_500_000, 1500, 7)) == (
        "1,500 purifications (1,500,000 DIP steps), 1,500 victim queries, 7 gradients"
    )
