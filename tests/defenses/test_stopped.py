"""The DIP fits that are stopped at some step."""

import json

import pytest
import torch
from torch.nn import functional as F

from dipguard.attacks import build_attack
from dipguard.data import load_data
from dipguard.decision.stopping import FixedStep
from dipguard.defenses.base import Defense
from dipguard.defenses.stopped import PRESETS, DIPDefend, FixedStepDIP
from dipguard.evaluation.matrix import Curves
from dipguard.fit import FitOptions
from dipguard.networks import build
from dipguard.victims import build_victim
from tests.defenses.conftest import all_stays
from tests.fit.conftest import fit_rule

T = 6
DEFENSES = {
    "dip_fixed": (FixedStepDIP, {"step": T - 1, "network": "small", "engine": "torch"}),
    "dipdefend": (DIPDefend, {"smoothing": 0.3, "engine": "torch"}),
}
EVERY = pytest.mark.parametrize("name", DEFENSES)


def build_stopped(name, victim, **change):
    kind, options = DEFENSES[name]
    return kind(victim, **{**options, "T": T, "progress": False, **change})


def stop(defense, images, rule=None):
    """What the defence's rule, or another, chooses of the same fit."""
    return fit_rule(
        images,
        rule=defense.make_rule() if rule is None else rule,
        indices=list(range(len(images))),
        fit=defense.fit_options,
        T=defense.T,
        device=torch.device("cpu"),
    )


@EVERY
def test_images_come_back_chosen_and_in_their_dtype(small_images, small_victim, name):
    defense = build_stopped(name, small_victim)
    assert isinstance(defense, Defense)
    before = small_images[:2].clone()
    for dtype in (torch.float64, torch.float16) if name == "dip_fixed" else (torch.float64,):
        purified = defense.purify(small_images[:2].to(dtype))
        assert (purified.shape, purified.dtype) == ((2, 3, 16, 16), dtype)
        assert 0 <= float(purified.min()) < float(purified.max()) <= 1
    assert torch.equal(small_images[:2], before)
    stopped = stop(defense, small_images[:2])
    assert torch.equal(stopped.images, defense.purify(small_images[:2]))
    assert stopped.steps.dtype == torch.int64
    assert 0 <= int(stopped.steps.min()) <= int(stopped.steps.max()) < T
    assert name != "dip_fixed" or stopped.steps.tolist() == [T - 1] * 2
    start = stop(defense, small_images[:2], FixedStep(0)).images
    errors = [float((images - small_images[:2]).square().mean()) for images in (stopped.images, start)]
    assert errors[0] < errors[1]


@EVERY
def test_draws_depend_on_seed_and_index_and_chunks_do_not_matter(small_images, small_victim, name):
    plain, single, other = (
        build_stopped(name, small_victim, dtype="float64", **change) for change in ({}, {"stack_size": 1}, {"seed": 1})
    )
    order = torch.tensor([5, 0])
    whole = plain.purify(small_images[:2], indices=order)
    parts = single.purify(small_images[:2], indices=order)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert not torch.equal(plain.purify(small_images[:2])[0], whole[0])
    assert not torch.equal(other.purify(small_images[:2], indices=order)[0], whole[0])


@EVERY
def test_defend_gives_the_images_of_purify(small_images, small_victim, name):
    defense = build_stopped(name, small_victim)
    result = defense.defend(small_images[:2], indices=[3, 1])
    assert torch.equal(result.reconstructions, defense.purify(small_images[:2], indices=[3, 1]))
    assert (result.traces, result.reasons, result.used) == ([], ["purified"] * 2, [0, 0])
    assert min(result.seconds["fit"], result.seconds["decide"]) > 0
    assert len(result.decisions_after) == 2


@EVERY
def test_settings_are_json_and_hold_each_option(small_victim, name):
    defense = build_stopped(name, small_victim)
    assert json.loads(json.dumps(defense.settings, allow_nan=False)) == defense.settings
    assert (defense.name, defense.settings["name"], defense.random, defense.unavailable) == (name, name, True, None)
    assert defense.steps_per_image == T
    changes = {
        "dip_fixed": [{"step": T - 2}],
        "dipdefend": [{"smoothing": 0.1}, {"tile": 16}, {"preset": "imagenet"}],
    }
    for change in [{"seed": 1}, {"lr": 0.02}, *changes[name]]:
        assert build_stopped(name, small_victim, **change).settings != defense.settings
    assert build_stopped(name, small_victim, stack_size=7).settings == defense.settings
    # A fixed step ends the fit, whatever T is.
    assert (build_stopped(name, small_victim, T=T + 1).settings == defense.settings) == (name == "dip_fixed")


@pytest.mark.parametrize(("name", "around"), [("dipdefend", torch.inference_mode), ("dip_fixed", torch.no_grad)])
def test_the_caller_finds_all_as_it_was(small_images, small_victim, name, around):
    expected = build_stopped(name, small_victim).purify(small_images[:1])
    with around(), all_stays(small_victim):
        assert torch.equal(build_stopped(name, small_victim).purify(small_images[:1].clone()), expected)


def test_the_bar_ends_full(small_images, small_victim, capsys):
    build_stopped("dip_fixed", small_victim, progress=True, stack_size=2).purify(small_images[:3])
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "18.0/18.0" in shown


def test_curves_of_stacks_follow_each_other(small_images, small_victim):
    curves = Curves()
    defense = FixedStepDIP(small_victim, network="small", T=20, step=9, stack_size=1, progress=False)
    defense.defend(small_images[:2], logger=curves)
    assert [step for step, _ in curves.rows] == list(range(20))  # ten steps, twice


def test_without_options_the_fit_is_the_official_code_s_for_denoising(small_victim):
    defense = FixedStepDIP(small_victim, seed=3)
    assert defense.fit_options == FitOptions(seed=3, jitter=1 / 30, padding="reflect")
    assert (defense.T, defense.step) == (1000, 500)
    assert FixedStepDIP(small_victim, jitter=0.0, padding="zeros").fit_options == FitOptions()


def test_none_takes_the_presets_value(small_victim):
    nothing = dict.fromkeys(("network", "T", "jitter", "padding", "z_scale"))
    spelled_out = DIPDefend(small_victim, preset="imagenet", **nothing)
    assert spelled_out.settings == DIPDefend(small_victim, preset="imagenet").settings
    assert DIPDefend(small_victim, preset="imagenet", jitter=0.0).fit_options.jitter == 0.0
    assert DIPDefend(small_victim, network="small", T=7).fit_options == FitOptions(network="small", optimise_z=True)


def test_dipdefend_is_its_authors_configuration(small_victim):
    cifar, imagenet = (DIPDefend(small_victim, preset=preset) for preset in PRESETS)
    assert (cifar.T, imagenet.T) == (4000, 2400)
    assert build(cifar.fit_options.network, stack_size=2).parameters_per_image() == 9_011
    for defense, depth, upsample, padding, jitter in (
        (cifar, 1, "bilinear", "zeros", 0.0),
        (imagenet, 3, "nearest", "reflect", 1 / 30),
    ):
        fit = defense.fit_options
        net = build(fit.network, stack_size=1).spec
        assert (fit.padding, fit.jitter, fit.lr, fit.optimise_z, fit.z) == (padding, jitter, 0.01, True, "uniform")
        assert (net.input_depth, net.z_scale, net.upsample) == (depth, 0.1, upsample)
        assert defense.settings["z_scale"] == 0.1
    assert imagenet.fit_options.network.n_d == (16, 32, 64, 128, 128)
    assert cifar.settings["smoothing"] == 0.002
    assert cifar.settings["tile"] == 32


def test_dipdefend_fits_z_and_its_imagenet_network_runs(small_images, small_victim):
    larger = F.interpolate(small_images[:1], size=(33, 34))
    defense = DIPDefend(small_victim, preset="imagenet", T=3, progress=False)
    assert defense.purify(larger).shape == (1, 3, 33, 34)
    options = {"T": 6, "smoothing": 1.0, "progress": False}
    both, network = (DIPDefend(small_victim, optimise_z=z, **options).purify(small_images[:1]) for z in (True, False))
    assert not torch.equal(both, network)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("dip_fixed", {"T": 0}, ValueError, "`T` must be at least 1, got 0"),
        ("dip_fixed", {"step": T}, ValueError, f"`step` must be from 0 to {T - 1}, got {T}"),
        ("dipdefend", {"smoothing": 2.0}, ValueError, "`smoothing` must be from 0 to 1"),
        ("dipdefend", {"tile": 0}, ValueError, "`tile` must be at least 1"),
        ("dipdefend", {"preset": "mnist"}, ValueError, "`preset` must be one of cifar10, imagenet, got 'mnist'"),
    ],
)
def test_bad_options_are_named(small_victim, name, change, error, message):
    with pytest.raises(error, match=message):
        build_stopped(name, small_victim, **change)


def test_what_cannot_be_fitted_is_refused_before_the_fit(small_images, small_victim):
    with pytest.raises(ValueError, match="`images` must be at least 5x5 pixels"):
        build_stopped("dip_fixed", small_victim).purify(small_images[:1, :, :4])
    with pytest.raises(ValueError, match="`images` must be at least 6 pixels a side for SSIM, got 5x16"):
        build_stopped("dip_fixed", small_victim).purify(small_images[:1, :, :5])
    native = DIPDefend(small_victim, preset="imagenet", T=3, engine="native", progress=False)
    with pytest.raises(ValueError, match=r"`engine` 'native' cannot be used here: upsampling is bilinear"):
        native.purify(torch.rand(1, 3, 33, 33))


@pytest.mark.slow
def test_dipdefend_peaks_near_650_and_brings_attacked_images_back(real_data):
    data = load_data("arrays", path=real_data / "cifar10" / "tune.npz", limit=8)
    victim = build_victim("cifar10_resnet56", weights=real_data / "weights" / "resnet56-4bfd9763.th")
    attacked = build_attack("pgd", victim, steps=20, random_start=False)(data.images, data.labels)

    def right(x):
        with torch.no_grad():
            return int((victim(x).argmax(dim=1) == data.labels).sum())

    assert (right(data.images), right(attacked)) == (8, 0)
    stopped = stop(DIPDefend(victim, T=1200), attacked)
    assert 600 < float(stopped.steps.median()) < 750
    assert right(stopped.images) >= 4
