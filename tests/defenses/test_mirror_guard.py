import json

import pytest
import torch

from dipguard.defenses import Defense, build_defense
from dipguard.defenses.mirror_guard import NETWORKS, MirrorGuard
from dipguard.fit import Decider, FitOptions
from dipguard.networks.presets import hourglass

TINY = {
    "networks": (hourglass((2,), skips=0, input_depth=1), hourglass((3,), skips=0, input_depth=1)),
    "T": 12,
    "t0": 2,
    "every": 3,
    "fit": {"dtype": "float64"},
    "progress": False,
}


def guard(victim, **options):
    return build_defense("dipguard", victim, **{**TINY, **options})


def test_it_is_a_defence_with_settings_for_json(victim):
    row = guard(victim)
    assert isinstance(row, MirrorGuard)
    assert isinstance(row, Defense)
    settings = json.loads(json.dumps(row.settings))
    assert (settings["name"], settings["T"], settings["t0"], len(settings["fit"])) == ("dipguard", 12, 2, 2)
    assert row.steps_per_image == 22
    assert row.windows == 3
    assert guard(victim, seed=4).settings != settings


def test_its_networks_are_dipdefends_and_one_twice_as_wide(victim):
    row = MirrorGuard(victim)
    assert [tuple(fit.network.n_d) for fit in row.fits] == [(4, 8, 16), (8, 16, 32)]
    assert [fit.network for fit in row.fits] == list(NETWORKS)
    assert all((fit.padding, fit.jitter, fit.optimise_z) == ("zeros", 0.0, True) for fit in row.fits)
    assert row.betas == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]


def test_the_image_is_what_its_readings_say(images, victim):
    row = guard(victim, beta=0.2)
    part, indices = images[:3], [5, 0, 9]
    purified = row.purify(part, indices=torch.tensor(indices))
    readings = row.read(part, indices)
    assert readings.samples.shape == (6, 3, 3, 32, 32)
    made = row.stitch(readings, part)
    decide = Decider(victim)
    own = decide(part).argmax(-1)
    for i, stitched in enumerate(made):
        assert torch.equal(purified[i], stitched.image.to(part))
        mean = readings.turned[:, i].softmax(-1).mean(0)
        mean[own[i]] *= 0.5
        assert stitched.target == int(mean.argmax())
        right = readings.samples[:, i][readings.straight[:, i].argmax(-1) == stitched.target]
        assert stitched.readers == len(right)
        base = (right if len(right) else readings.samples[:, i]).mean(0)
        expected = (base + stitched.beta * (base - part[i].double())).clamp(0, 1)
        assert torch.allclose(stitched.image, expected)
        if int(decide(base[None]).argmax()) == stitched.target:
            assert stitched.beta == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_image_does_not_depend_on_its_neighbours_or_on_the_callers_mode(images, victim, mode):
    row = guard(victim, stack_size=2)
    alone = torch.cat([row.purify(images[i : i + 1], indices=torch.tensor([i])) for i in range(3)])
    state = torch.get_rng_state()
    with mode():
        together = row.purify(images[:3])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.equal(guard(victim, seed=1).purify(images[:1]), alone[:1])


def test_progress_counts_the_steps_of_all_networks(images, victim, capsys):
    guard(victim, progress=True, stack_size=2).purify(images[:3])
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert "100%" in last
    assert "66.0/66.0" in last  # 3 images, 2 networks, t0 and 3 windows of 3 steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ()}, "`networks` must list at least one"),
        ({"networks": "medium"}, "`networks` must list at least one"),
        ({"networks": ("huge",)}, "`network` must be one of"),
        ({"t0": 12}, "`t0` must be from 0 to 11"),
        ({"every": 11}, "`every` must be from 1 to 10"),
        ({"trust": 2.0}, "`trust`"),
        ({"beta": -1.0}, "`beta`"),
        ({"beta_step": 0.0}, "`beta_step`"),
        ({"stack_size": 0}, "`stack_size`"),
        ({"fit": {"seed": 3}}, "takes no 'seed'"),
        ({"fit": FitOptions(seed=3)}, "`fit` must leave the seed to `seed`"),
    ],
)
def test_bad_options_are_refused(victim, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        guard(victim, **options)


def test_images_that_are_too_small_are_refused(victim):
    with pytest.raises(ValueError, match="at least 9x9 pixels"):
        MirrorGuard(victim).purify(torch.rand(1, 3, 8, 8))
