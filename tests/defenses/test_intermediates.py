"""The intermediates of defences, which adaptive attacks use."""

import pytest
import torch

from dipguard.decision import stitch
from dipguard.decision.class_scores import class_scores, mirrored, shifted
from dipguard.defenses import build_defense
from dipguard.networks.presets import hourglass

EXACT = {"padding": "zeros", "dtype": "float64"}
NETWORKS = tuple(hourglass((channels,), skips=0, input_depth=1) for channels in (2, 3))
TINY = {
    "paper": {"network": "small", "T": 12, "t0": 2, "tau": 0.0, "K": 3, "decisions": 12, "lr": 0.05, **EXACT},
    "mirror": {"networks": NETWORKS, "T": 7, "t0": 1, "every": 1, "dtype": "float64"},
    "dip_fixed": {"network": "small", "step": 3, "T": 5},
    "jpeg": {},
}
NAMES = {
    "paper": {"last", "on_boundary", "stitched"},
    "mirror": {"last", "mean", "class_scores", "stitched"},
    "dip_fixed": {"stitched"},
    "jpeg": {"stitched"},
}
FITS = {"paper": 1, "mirror": 2, "dip_fixed": 1, "jpeg": 0}


def defended(name, victim, **options):
    quiet = {} if name == "jpeg" else {"progress": False}
    return build_defense(name, victim, **{**TINY[name], **quiet, **options})


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, torch.inference_mode) for name in TINY), ("jpeg", torch.enable_grad)]
)
def test_the_answer_is_among_them_and_is_what_purify_returns(small_images, small_victim, name, mode):
    defense, indices = defended(name, small_victim), torch.tensor([4, 2, 2**35 + 7])
    expected = defense.purify(small_images[:3], indices=indices)
    state = torch.get_rng_state()
    with mode():
        made = defense.intermediates(small_images[:3], indices=indices)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made["stitched"].views[0], expected)
    assert set(made) == set(defense.intermediate_views) == NAMES[name]
    assert len(defense.dip_fits) == FITS[name]
    for key, intermediate in made.items():
        assert intermediate.readings == defense.intermediate_views[key]
        assert intermediate.views.shape[1:] == (3, 3, 16, 16)
        assert (intermediate.views.dtype, intermediate.views.requires_grad) == (torch.float32, False)
        assert 0 <= intermediate.views.min() <= intermediate.views.max() <= 1
        intermediate.views.clone().requires_grad_().sum().backward()  # an inference tensor would refuse


@pytest.mark.parametrize("name", ["paper", "mirror"])
def test_stacks_change_nothing_and_neither_do_neighbours(small_images, small_victim, name):
    defense, small = defended(name, small_victim), defended(name, small_victim, stack_size=2)
    indices = torch.tensor([4, 2, 7])
    whole, parts = (d.intermediates(small_images[:3], indices=indices) for d in (defense, small))
    alone = defense.intermediates(small_images[1:2], indices=indices[1:2])
    for key in whole:
        assert torch.allclose(whole[key].views, parts[key].views, atol=1e-5)
        assert torch.allclose(whole[key].views[:, 1:2], alone[key].views, atol=1e-5)


def test_the_papers_are_those_of_its_traces(small_images, small_victim):
    defense = defended("paper", small_victim)
    made, result = defense.intermediates(small_images[:4]), defense.defend(small_images[:4])
    crossed = 0
    for i, trace in enumerate(result.traces):
        assert torch.equal(made["last"].views[0, i], trace.last[-1].float())
        used = stitch(trace, tau=0.0, t0=2, K=3, beta=0.5).used
        crossed += len(used) > 0
        expected = trace.on_boundary[used].mean(0) if len(used) else result.reconstructions[i]
        assert torch.allclose(made["on_boundary"].views[0, i], expected.float(), atol=1e-6)
    assert crossed > 0
    assert made["last"].scores is made["on_boundary"].scores is None


def test_class_scores_are_those_of_its_windows(small_images, small_victim):
    defense = defended("mirror", small_victim)
    made = defense.intermediates(small_images[:2])
    samples = torch.stack([trace.samples for trace in defense.defend(small_images[:2]).traces], dim=1).float()
    assert len(samples) == 12
    assert torch.equal(made["last"].views, samples[[5, 11]])
    assert torch.allclose(made["mean"].views[0], samples.mean(0), atol=1e-6)
    scored = made["class_scores"]
    assert torch.equal(scored.views, samples[[0, 2, 3, 5, 6, 8, 9, 11]])
    readings = torch.stack([defense.decide(mirrored(view)) for view in scored.views])
    at, given = scored.views.clone().requires_grad_(), small_images[:2].clone().requires_grad_()
    got = scored.scores(at, given)
    for i in range(2):
        elsewhere = torch.stack([defense.decide(copy)[i] for copy in shifted(given)])
        expected = class_scores(readings[:, i], defense.decide(given)[i], elsewhere, beta=1.5)
        assert torch.allclose(got[i], expected, atol=1e-5)
    assert all(gradient.any() for gradient in torch.autograd.grad(got[:, 0].sum(), [at, given]))


def test_few_windows_are_all_shown(small_images, small_victim):
    defense = defended("mirror", small_victim, T=3)
    assert defense.intermediate_views["class_scores"] == 4 + 5
    (trace,) = defense.defend(small_images[:1]).traces
    assert torch.equal(defense.intermediates(small_images[:1])["class_scores"].views[:, 0], trace.samples.float())
