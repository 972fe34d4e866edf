"""What holds for every feed-forward defence of `DEFENSES`, with its variants: each test runs for all of them."""

import json
import sys
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from dipguard.classifier import eval_mode
from dipguard.defenses import DEFENSES, Defense, DefenseResult, build_defense
from dipguard.defenses.comdefend import ComDefendNetwork
from dipguard.defenses.nrp import NRPNetwork
from dipguard.defenses.super_resolution import IMDN
from dipguard.registry import options_of
from tests.defenses.conftest import all_stays

NETWORKS = {"comdefend": ComDefendNetwork, "imdn": IMDN, "nrp": NRPNetwork}

# id -> (defence, options, network whose weights it takes, side of the images)
VARIANTS = {
    "none": ("none", {}, None, 32),
    "jpeg": ("jpeg", {}, None, 32),
    "median": ("median", {}, None, 32),
    "total_variation": ("total_variation", {}, None, 32),
    "bit_depth": ("bit_depth", {}, None, 32),
    "comdefend": ("comdefend", {}, "comdefend", 16),
    "comdefend in patches": ("comdefend", {"patches": True}, "comdefend", 32),
    "comdefend without noise": ("comdefend", {"noise": 0}, "comdefend", 16),
    "sr": ("sr", {}, "imdn", 16),
    "sr without wavelets": ("sr", {"sigma": 0}, "imdn", 16),
    "sr doubled": ("sr", {"output": "doubled"}, "imdn", 16),
    "nrp": ("nrp", {}, "nrp", 6),
}
RANDOM = {"comdefend", "comdefend in patches"}
WITH_WEIGHTS = [key for key, row in VARIANTS.items() if row[2]]

EVERY = pytest.mark.parametrize("key", VARIANTS)


@pytest.fixture(scope="module", autouse=True)
def shallow_nrp():
    """Two of its 23 blocks are enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dipguard.defenses.nrp.BLOCKS", 2)
        yield


@pytest.fixture(scope="module")
def weights(shallow_nrp, tmp_path_factory):
    """Random weights of each network: what the architecture does with them is as real as with trained ones."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for name, network in NETWORKS.items():
            state = network().state_dict()
            if name == "nrp":  # else what it makes of noise would drown in black and white
                state["trunk_conv.weight"] *= 0.01
                state["trunk_conv.bias"].fill_(0.5)
            torch.save(state, folder / f"{name}.pt")
    return {name: folder / f"{name}.pt" for name in NETWORKS}


def built(key, victim, weights, *, seed=0):
    name, options, network, _ = VARIANTS[key]
    return build_defense(name, victim, seed=seed, **({"weights": weights[network]} if network else {}), **options)


@pytest.fixture(scope="module")
def make(weights, victim):
    """Builds a variant; built ones are kept, since nothing may change them."""
    return cache(lambda key, seed=0: built(key, victim, weights, seed=seed))


def crops(images, key):
    side = VARIANTS[key][3]
    return images[:2, :, :side, :side].clone()


def test_every_defence_without_a_fit_has_a_variant_here(victim):
    here = {row[0] for row in VARIANTS.values()}
    for name in set(DEFENSES) - here:
        assert build_defense(name, victim).steps_per_image > 0, f"{name} needs a variant"


@EVERY
def test_result_keeps_dtype_range_and_the_given_images(make, images, key):
    given = crops(images, key)
    before = given.clone()
    defense = make(key)
    purified = defense.purify(given)
    assert isinstance(defense, Defense)
    assert purified.shape == (2, 3, *defense.output_size(*given.shape[-2:]))
    assert purified.shape == given.shape or "doubled" in key
    assert (purified.dtype, purified.device) == (given.dtype, given.device)
    assert 0 <= purified.min() <= purified.max() <= 1
    assert len(purified.unique()) > 5
    assert not purified.requires_grad
    assert torch.equal(given, before)
    assert purified.data_ptr() != given.data_ptr()
    assert (key == "none") == torch.equal(purified, given)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_come_back_as_they_were(make, images, key, dtype):
    given = crops(images, key)[:1]
    purified = make(key).purify(given.to(dtype))
    assert purified.dtype == dtype
    if key not in RANDOM | {"comdefend without noise", "bit_depth", "jpeg", "sr", "sr without wavelets", "sr doubled"}:
        # (thresholds and rounding to levels may flip where float16 differs in the last digits)
        assert torch.allclose(purified.float(), make(key).purify(given), atol=2e-2)


@EVERY
def test_an_image_does_not_depend_on_its_batch_mates(make, images, key):
    given = crops(images, key)
    whole = make(key).purify(given, indices=torch.tensor([4, 9]))
    assert torch.equal(make(key).purify(given[[1, 1, 0]], indices=torch.tensor([9, 9, 4])), whole[[1, 1, 0]])


@EVERY
def test_draws_depend_on_seed_and_index_alone(make, images, key):
    given = crops(images, key)[:1]
    first = make(key).purify(given)
    assert torch.equal(make(key).purify(given, indices=torch.tensor([0])), first)
    assert make(key).random == (key in RANDOM)
    for other in (make(key).purify(given, indices=torch.tensor([1])), make(key, seed=1).purify(given)):
        assert torch.equal(other, first) == (key not in RANDOM)


@pytest.mark.parametrize(
    ("key", "mode"),
    [*((key, torch.inference_mode) for key in VARIANTS), ("sr", torch.no_grad), ("sr", torch.enable_grad)],
)
def test_grad_modes_change_nothing(make, victim, images, key, mode):
    given = crops(images, key)[:1]
    expected = make(key).purify(given)
    with mode(), all_stays(victim):
        purified = make(key).purify(given.clone())
    assert torch.equal(purified, expected)
    assert torch.equal(make(key).purify(given), expected)
    purified.clone().requires_grad_().sum().backward()  # an inference tensor would refuse


@pytest.mark.parametrize("key", ["comdefend", "sr", "nrp"])
def test_built_in_inference_mode_or_under_autocast_it_is_the_same(make, weights, victim, images, key):
    given = crops(images, key)[:1]
    with torch.inference_mode():
        defense = built(key, victim, weights)
    assert not any(value.is_inference() for value in defense.network.state_dict().values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        purified = defense.purify(given)
    assert torch.equal(purified, make(key).purify(given))


@EVERY
def test_the_victim_and_the_callers_random_state_are_left_alone(weights, victim, images, key):
    results = []
    for seed in (1, 2):
        with all_stays(victim, seed=seed):
            results.append(built(key, victim, weights).purify(crops(images, key)[:1]))
    assert torch.equal(*results)


@EVERY
def test_settings_hold_everything_and_are_json(make, key):
    name, options, network, _ = VARIANTS[key]
    defense = make(key)
    settings = defense.settings
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings
    assert settings["name"] == name == defense.name
    assert settings.items() >= options.items()
    assert ("seed" in settings) == defense.random
    assert ("weights" in settings) == (network is not None)
    assert "versions" in settings or name in ("none", "bit_depth")
    assert (defense.steps_per_image, defense.unavailable) == (0, None)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("jpeg", {"quality": 75}, {"quality": 74}),
        ("median", {"size": 3}, {"size": 2}),
        ("total_variation", {"weight": 0.1}, {"weight": 0.2}),
        ("bit_depth", {"bits": 3}, {"bits": 4}),
        ("comdefend", {"noise": 1}, {"noise": 0.5}),
        ("comdefend", {"noise": 1, "patches": True}, {"noise": 1, "patches": False}),
        ("sr", {"sigma": 0.01}, {"sigma": 0.04}),
        ("sr", {"quality": 95}, {"quality": 90}),
    ],
)
def test_each_option_changes_result_and_settings(weights, victim, images, name, one, other):
    trained = {"weights": weights["imdn" if name == "sr" else name]} if name in ("sr", "comdefend") else {}
    pair = [build_defense(name, victim, **trained, **options) for options in (one, other)]
    assert pair[0].settings != pair[1].settings
    assert not torch.equal(*(defense.purify(images[:1]) for defense in pair))


def test_settings_know_weights_by_what_they_hold(weights, victim, tmp_path):
    state = torch.load(weights["imdn"], weights_only=True)
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "same.pth")
    state["fea_conv.bias"][0] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    paths = (weights["imdn"], tmp_path / "same.pth", str(tmp_path / "other.pth"))
    first, same, other = (build_defense("sr", victim, weights=path).settings for path in paths)
    assert first == same
    assert first != other


@pytest.mark.parametrize("key", WITH_WEIGHTS)
def test_without_weights_it_says_so_and_makes_up_nothing(victim, images, key):
    name, options, _, _ = VARIANTS[key]
    defense = build_defense(name, victim, **options)
    assert defense.unavailable.startswith("weights not supplied. Give `weights`")
    assert "github.com" in defense.unavailable
    assert defense.settings["weights"] is None
    with pytest.raises(RuntimeError, match=f"defence '{name}' cannot run: weights not supplied.*github.com"):
        defense.purify(crops(images, key))


@pytest.mark.parametrize("key", ["comdefend", "sr", "nrp"])
def test_weights_of_another_network_are_refused(weights, victim, key):
    name, options, network, _ = VARIANTS[key]
    wrong = weights["nrp" if network == "imdn" else "imdn"]
    with pytest.raises(ValueError, match=f"`weights`.*{wrong.name} does not hold the weights of this.*missing"):
        build_defense(name, victim, weights=wrong, **options)
    with pytest.raises(FileNotFoundError, match="`weights` must name an existing weights file"):
        build_defense(name, victim, weights="nowhere.pth", **options)


@pytest.mark.parametrize("key", ["none", "comdefend", "paper"])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, r"must be floats in \[0, 1\], got torch.uint8.*255"),
        (torch.full((2, 3, 32, 32), 1.5), ValueError, r"must lie in \[0, 1\], got values from 1.5 to 1.5"),
        (torch.full((2, 3, 32, 32), -0.5), ValueError, r"must lie in \[0, 1\], got values from -"),
        (torch.full((2, 3, 32, 32), float("nan")), ValueError, "must be finite, got NaN"),
        (torch.tensor([0.5, float("inf")]).expand(2, 3, 32, 2), ValueError, "must be finite"),
        (torch.zeros(3, 32, 32), ValueError, r"must have 4 dimensions \[B, 3, H, W\], got shape \(3, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32), ValueError, "must have 3 channels"),
        (torch.zeros(2, 32, 32, 3), ValueError, "must have 3 channels"),
        (torch.zeros(0, 3, 32, 32), ValueError, "must hold at least one image"),
        (np.zeros((2, 3, 32, 32)), TypeError, r"must be a torch.Tensor \[B, 3, H, W\], got ndarray"),
    ],
)
def test_bad_images_are_refused(make, victim, key, given, error, message):
    defense = build_defense(key, victim) if key == "paper" else make(key)
    for call in (defense.purify, defense.defend, defense.intermediates):
        with pytest.raises(error, match=f"`images` {message}"):
            call(given)


@pytest.mark.parametrize("name", DEFENSES)
def test_bad_common_options_are_refused(victim, name):
    with pytest.raises(ValueError, match="`seed`"):
        build_defense(name, victim, seed=-1)
    with pytest.raises(TypeError, match=f"the defence '{name}' takes no option 'colour'"):
        build_defense(name, victim, colour="red")
    with pytest.raises(TypeError, match=r"`victim` must be a torch\.nn\.Module"):
        build_defense(name, victim.forward)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("none", {"weights": "x.pt"}, TypeError, "'none' takes no option 'weights'; its options are: none"),
        ("jpeg", {"weights": "x.pt"}, TypeError, "'weights'; its options are: quality"),
        ("jpeg", {"quality": 0}, ValueError, "`quality` must be from 1 to 100"),
        ("jpeg", {"quality": 75.0}, TypeError, "`quality`"),
        ("median", {"size": 1}, ValueError, "`size` must be at least 2"),
        ("total_variation", {"weight": 0}, ValueError, "`weight` must be above 0"),
        ("total_variation", {"weight": float("nan")}, ValueError, "`weight`"),
        ("bit_depth", {"bits": 9}, ValueError, "`bits` must be from 1 to 8"),
        ("comdefend", {"noise": -1}, ValueError, "`noise`"),
        ("comdefend", {"patches": 32}, TypeError, "`patches`"),
        ("sr", {"sigma": -0.1}, ValueError, "`sigma`"),
        ("sr", {"quality": 101}, ValueError, "`quality`"),
        ("sr", {"output": "nearest"}, ValueError, "`output` must be one of bicubic, doubled"),
    ],
)
def test_bad_options_are_refused(victim, name, options, error, message):
    with pytest.raises(error, match=message):
        build_defense(name, victim, **options)


def test_an_unknown_defence_is_refused(victim):
    with pytest.raises(ValueError, match=r"`defense` must be one of none, jpeg, .*'magic'"):
        build_defense("magic", victim)


@pytest.mark.parametrize(
    ("name", "module"),
    [("jpeg", "PIL"), ("median", "scipy"), ("total_variation", "skimage"), ("sr", "pywt"), ("sr", "PIL")],
)
def test_without_the_library_it_says_what_to_install(victim, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"'{name}' needs {module}, .*pip install 'dipguard\[defenses\]'"):
        build_defense(name, victim)
    build_defense("bit_depth", victim)


class _Careless(Defense):
    """A defence as a user might add it, that breaks a promise in the way it is told to."""

    name = "careless"

    def __init__(self, victim, change):
        super().__init__(victim)
        self.change = change

    def purify_image(self, image, index):
        return self.change(image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x + 1, r"left \[0, 1\]: its values go from 1.25"),
        (lambda x: x - 0.5, r"left \[0, 1\]: its values go from -0.25"),
        (lambda x: x * float("nan"), r"left \[0, 1\]: its values go from nan"),
        (lambda x: x[:, :16], r"returned \(2, 3, 16, 32\).*not \(2, 3, 32, 32\)"),
        (lambda x: x.double(), r"returned.*of torch\.float64 on cpu, not.*of torch\.float32"),
    ],
)
def test_a_careless_defence_is_caught(victim, change, message):
    with pytest.raises(RuntimeError, match=f"'careless' {message}"):
        _Careless(victim, change).purify(torch.full((2, 3, 32, 32), 0.25))


def test_a_defence_may_change_its_own_copy(victim, images):
    given = images[:2].clone()
    _Careless(victim, lambda x: x.zero_()).purify(given)
    assert torch.equal(given, images[:2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@EVERY
def test_networks_follow_the_victim_to_the_gpu(make, victim, images, key):
    given = crops(images, key)
    try:
        victim.cuda()
        before = torch.cuda.get_rng_state()
        assert make(key).purify(given).device == given.device
        assert make(key).purify(given.cuda()).device.type == "cuda"
        assert torch.equal(torch.cuda.get_rng_state(), before)
    finally:
        victim.cpu()


@EVERY
def test_defend_returns_the_images_of_purify_and_the_victims_decisions(weights, victim, images, key):
    given = crops(images, key)
    sized = nn.Sequential(nn.AdaptiveAvgPool2d(32), victim)
    defense = built(key, sized, weights)
    result = defense.defend(given, indices=[4, 9])
    assert isinstance(result, DefenseResult)
    assert torch.equal(result.reconstructions, defense.purify(given, indices=torch.tensor([4, 9])))
    with eval_mode(sized), torch.no_grad():
        assert torch.equal(result.decisions_before, sized(given).argmax(1))
        assert torch.equal(result.decisions_after, sized(result.reconstructions).argmax(1))
        torch.testing.assert_close(defense(given), sized(defense.purify(given)))
    assert (result.traces, result.reasons, result.used) == ([], ["purified"] * 2, [0, 0])
    assert set(result.seconds) == {"start", "fit", "decide"}
    assert min(result.seconds["fit"], result.seconds["decide"]) > 0
    with pytest.raises(TypeError, match=f"the defence {defense.name!r} leaves no decision traces"):
        defense.rebuild(None)


def test_results_are_joined_in_order(make, images):
    defense = make("bit_depth")
    parts = [defense.defend(images[i : i + 2]) for i in (0, 2)]
    joined = DefenseResult.join(parts)
    assert torch.equal(joined.reconstructions, defense.purify(images[:4]))
    assert joined.reasons == ["purified"] * 4
    assert joined.seconds["fit"] == sum(part.seconds["fit"] for part in parts)


def test_a_defence_that_implements_nothing_says_so(victim, images):
    class Empty(Defense):
        name = "empty"

    with pytest.raises(NotImplementedError, match="Empty implements neither `purify_image` nor `_purify`"):
        Empty(victim).purify(images[:1])


@pytest.mark.parametrize("name", DEFENSES)
def test_the_defaults_read_from_the_source_are_the_constructors(victim, name):
    options = {key: value for key, value in options_of(DEFENSES[name]).items() if key != "seed"}
    plain, spelled_out = build_defense(name, victim), build_defense(name, victim, **options)
    assert spelled_out.settings == plain.settings
    known = set(plain.settings) - {"name", "seed", "versions", "fit", "keep_samples"}
    assert known - {"weights"} <= set(options)
