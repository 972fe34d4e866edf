"""Victims of every kind, for attacks and defences: shared by threads, of half precision, broken."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from dipguard.attacks import ATTACKS, DefendedVictim, build_attack
from dipguard.classifier import eval_mode, frozen
from dipguard.data import load_data
from dipguard.defenses import DEFENSES, build_defense
from dipguard.fit import WindowLogger
from dipguard.registry import lookup, options_of
from dipguard.store import Store
from dipguard.victims import check_victim

FIT = {"T": 4, "progress": False, "network": "small"}
QUICK = {
    "paper": {**FIT, "t0": 0, "tau": 0.0, "decisions": 4},
    "mirror": {"T": 4, "t0": 2, "every": 1, "networks": ["small"], "progress": False},
    "dip_fixed": {**FIT, "step": 3},
    "dipdefend": {"T": 4, "progress": False},
}
FEW = {
    "square": {"n_queries": 5},
    "cw": {"steps": 2},
    "ddn": {"steps": 2},
    "hopskipjump": {"queries": 10},
    "autoattack": {"version": "rand", "steps": 1},
    "bpda": {"steps": 2},
    "defended_autoattack": {"steps": 1},
    "defended_square": {"n_queries": 5},
}
"""Short attacks."""
LOADED = ("comdefend", "sr", "nrp")  # need weights
DEFENDED = [name for name in DEFENSES if name not in LOADED]


def built(name, victim, **options):
    """The attack called ``name``; an adaptive one attacks the victim behind a defence."""
    adaptive = lookup(ATTACKS, name, argument="attack").adaptive
    target = DefendedVictim(victim, build_defense("bit_depth", victim)) if adaptive else victim
    return build_attack(name, target, **options)


class Slow(nn.Module):
    """A small victim that lets other threads run in the middle of its forward pass."""

    def __init__(self, *, wait=0.0):
        super().__init__()
        self.norm, self.read, self.wait = nn.BatchNorm2d(3), nn.Linear(3 * 4 * 4, 5), wait

    def forward(self, images):
        time.sleep(self.wait)
        return self.read(nn.functional.adaptive_avg_pool2d(self.norm(images), 4).flatten(1)) * 20


@pytest.fixture
def given():
    return torch.rand(2, 3, 16, 16)


def test_threads_share_a_victim_in_train_mode(given):
    victim = Slow(wait=0.002)
    victim.norm.weight.requires_grad_(False)
    guard, attack = build_defense("bit_depth", victim), build_attack("pgd", victim, steps=2)
    labels = torch.tensor([0, 1])
    state = {key: value.clone() for key, value in victim.state_dict().items()}
    expected, attacked = guard.defend(given).decisions_after, attack(given, labels)

    def work(number):
        time.sleep(0.001 * number)
        same = [torch.equal(guard.defend(given).decisions_after, expected) for _ in range(5)]
        return all(same) and torch.equal(attack(given, labels), attacked)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert all(part.training for part in victim.modules())
    assert [p.requires_grad for p in victim.parameters()] == [False, True, True, True]
    assert all(torch.equal(value, state[key]) for key, value in victim.state_dict().items())


@pytest.mark.slow
def test_threads_share_a_guard_that_fits(given):
    victim = Slow(wait=0.001)
    state = {key: value.clone() for key, value in victim.state_dict().items()}
    guard = build_defense("paper", victim, **QUICK["paper"])
    expected = guard.purify(given)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: guard.purify(given), range(4)))
    assert all(torch.equal(one, expected) for one in made)
    assert all(part.training for part in victim.modules())
    assert all(torch.equal(value, state[key]) for key, value in victim.state_dict().items())


def test_modes_are_restored_by_the_last_of_several_holders():
    victim, inner = Slow(), nn.BatchNorm2d(3)
    whole = nn.Sequential(inner, victim)
    inner.eval()
    first, second = eval_mode(whole), frozen(victim)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not victim.training  # a thread with a part of it is not done yet
    assert whole.training
    second.__exit__(None, None, None)
    assert victim.training
    assert not inner.training
    assert all(p.requires_grad for p in whole.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["none", "pgd", "mifgsm", "cw", "ddn", "square", "adaptive_pgd", "hopskipjump"])
def test_attacks_take_victims_of_any_floating_point_type(given, name, dtype):
    victim = Slow().eval().to(dtype)
    labels = check_victim(victim, given).argmax(1)
    attack = built(name, victim, **FEW.get(name, {}))
    attacked = attack(given, labels)
    assert attacked.dtype == torch.float32
    assert name != "pgd" or not torch.equal(attacked, given)
    assert attack.fooled(attacked, labels).shape == (2,)
    assert next(victim.parameters()).dtype == dtype


def test_a_sure_victim_of_half_precision_has_a_gradient(given):
    victim = Slow().eval()
    with torch.no_grad():
        victim.read.weight *= 50
    labels = check_victim(victim, given).argmax(1)
    attacked = [build_attack("fgsm", one)(given, labels) for one in (victim, victim.half())]
    assert all(bool((one != given).flatten(1).any(dim=1).all()) for one in attacked)


def by_default(dtype, device):
    torch.set_default_dtype(dtype)  # both are put back after each test
    torch.set_default_device(device)


DEFAULTS = [(torch.float64, "cpu"), (torch.float32, "meta")]
READ_BY_TORCHATTACKS = ("cw", "autoattack", "defended_square", "defended_autoattack")
"""It makes numbers on the default device and reads them, which "meta" alone cannot do."""


@pytest.mark.parametrize(("dtype", "device"), DEFAULTS)
@pytest.mark.parametrize("name", DEFENDED)
def test_defences_do_not_depend_on_torchs_defaults(given, name, dtype, device):
    victim = Slow().eval()
    usual = build_defense(name, victim, **QUICK.get(name, {})).purify(given)
    by_default(dtype, device)
    assert torch.equal(build_defense(name, victim, **QUICK.get(name, {})).purify(given), usual)


@pytest.mark.parametrize(
    ("name", "dtype", "device"),
    [
        (name, dtype, device)
        for name in ATTACKS
        for dtype, device in DEFAULTS
        if name != "unrolled" and (device != "meta" or name not in READ_BY_TORCHATTACKS)  # tests/fit has unrolled
    ],
)
def test_attacks_do_not_depend_on_torchs_defaults(given, name, dtype, device):
    victim, labels = Slow().eval(), torch.tensor([0, 1])
    usual = built(name, victim, **FEW.get(name, {}))(given, labels)
    by_default(dtype, device)
    attacked = built(name, victim, **FEW.get(name, {}))(given, labels)
    assert attacked.dtype == usual.dtype == torch.float32
    assert torch.equal(attacked, usual)


class Broken(nn.Module):
    """Logits that are not finite."""

    def __init__(self, value):
        super().__init__()
        self.value, self.read = value, nn.Linear(3, 4)

    def forward(self, images):
        return self.read(images.mean(dim=(2, 3))) * self.value


BAD = pytest.mark.parametrize("value", [float("nan"), float("inf")])
MESSAGE = "`victim` must return finite logits, got NaN or infinite values"


@BAD
@pytest.mark.parametrize("name", DEFENDED)
def test_defences_refuse_a_victim_without_finite_logits(given, name, value):
    guard, work = build_defense(name, Broken(value), **QUICK.get(name, {})), []
    guard._purify = lambda *args, **options: work.append(args)  # which a bad victim must not be let in to
    with pytest.raises(ValueError, match=MESSAGE):
        guard.defend(given)
    assert work == []
    del guard._purify
    if name in ("paper", "mirror"):
        with pytest.raises(ValueError, match=MESSAGE):
            guard.purify(given)


@BAD
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_refuse_a_victim_without_finite_logits(given, name, value):
    attack = built(name, Broken(value))
    with pytest.raises(ValueError, match=MESSAGE):
        attack(given, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=MESSAGE):
        attack.fooled(given, torch.tensor([0, 1]))


class LaterBroken(Broken):
    """Breaks once the images are no longer those given."""

    def forward(self, images):
        return self.read(images.mean(dim=(2, 3))) * (1.0 if images.max() <= 0.5 else self.value)


@pytest.mark.parametrize("name", ["bim", "ddn", "adaptive_pgd", "hopskipjump"])
def test_attacks_notice_a_victim_that_breaks_on_the_way(given, name):
    victim = LaterBroken(float("nan"))
    images = (given / 2).clamp(max=0.5)
    images[:, :, 0, 0] = 0.5
    attack, labels = built(name, victim), check_victim(victim, images).argmax(1)
    with pytest.raises(ValueError, match=MESSAGE):
        attack(images, labels)


BOOLEANS = [
    (build, name, option)
    for build, table in ((built, ATTACKS), (build_defense, DEFENSES))
    for name, path in table.items()
    for option, default in options_of(path).items()
    if isinstance(default, bool) or option == "patches"
]
assert len(BOOLEANS) > 10


@pytest.mark.parametrize(("build", "name", "option"), BOOLEANS)
@pytest.mark.parametrize("value", ["no", "False", 0])
def test_a_boolean_is_no_string_and_no_number(build, name, option, value):
    with pytest.raises(TypeError, match=f"`{option}` must be true or false, got {value!r}"):
        build(name, Slow(), **{option: value})


BUILT = {
    "WindowLogger.flip": lambda value: WindowLogger(Slow(), warm_up=0, every=1, windows=1, flip=value),
    "Store.keep_samples": lambda value: Store("nowhere", keep_samples=value),
    "load_data.download": lambda value: load_data("cifar10", path="nowhere", download=value),
}


@pytest.mark.parametrize("door", BUILT)
@pytest.mark.parametrize("value", ["no", "False", 0])
def test_so_it_is_where_the_parts_of_a_defence_are_built(door, value):
    with pytest.raises(TypeError, match=f"`{door.partition('.')[2]}` must be true or false, got {value!r}"):
        BUILT[door](value)


GOOD = (torch.tensor([7, 0]), torch.tensor([7, 0], dtype=torch.uint8), [7, 0], (7, 0), np.array([7, 0]))
WRONG = (
    ([0, -1], ValueError, "must be at least 0, got -1"),
    (torch.tensor([0, -1]), ValueError, "must be at least 0, got -1"),
    ([0], ValueError, r"must hold one index per image \(2\), got 1"),
    (np.arange(3), ValueError, r"must hold one index per image \(2\), got 3"),
    ([0, 1.0], TypeError, r"must be integers, one per image \(2\), got \[0, 1.0\]"),
    (torch.tensor([0.0, 1.0]), TypeError, "must be integers.*torch.float32"),
    (np.array([0.0, 1.0]), TypeError, "must be integers.*float64"),
    (torch.tensor([[0, 1]]), TypeError, r"must be integers.*\(1, 2\)"),
    (np.array([[0], [1]]), TypeError, r"must be integers.*\(2, 1\)"),
    ([[0], [1]], TypeError, "must be integers"),
    (torch.tensor(1), TypeError, "must be integers"),
    (1, TypeError, "must be integers.*got 1"),
    ([True, False], TypeError, "must be integers.*True"),
    (torch.tensor([True, False]), TypeError, "must be integers.*bool"),
    ("01", TypeError, "must be integers.*'01'"),
    (["0", "1"], TypeError, "must be integers"),
)


@pytest.mark.parametrize("name", DEFENDED)
def test_every_defence_takes_indices_in_any_form_and_refuses_what_is_none(given, name):
    guard = build_defense(name, Slow(), **QUICK.get(name, {}))
    expected = guard.purify(given, indices=GOOD[0])
    forms = GOOD if guard.steps_per_image == 0 else GOOD[2:3]
    assert all(torch.equal(guard.purify(given, indices=form), expected) for form in forms)
    for bad, error, message in WRONG:
        for call in (guard.purify, guard.defend, guard.intermediates):
            with pytest.raises(error, match=f"`indices` {message}"):
                call(given, indices=bad)


@pytest.mark.parametrize("name", ["noise", "hopskipjump"])
def test_attacks_take_the_same_indices(given, name):
    victim = Slow()
    attack, labels = built(name, victim, **({"queries": 4} if name == "hopskipjump" else {})), torch.tensor([0, 1])
    expected = attack(given, labels, indices=GOOD[0])
    assert all(torch.equal(attack(given, labels, indices=form), expected) for form in GOOD)
    for bad, error, message in WRONG:
        for call in (attack, attack.snapshots, attack.fooled):
            with pytest.raises(error, match=f"`indices` {message}"):
                call(given, labels, indices=bad)
