import csv
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

from dipguard.classifier import Decider
from dipguard.decision import DecisionTrace
from dipguard.decision.class_scores import class_scores, mirrored, shifted
from dipguard.decision.quality import image_noise
from dipguard.defenses import Defense, MirrorGuard
from dipguard.defenses.mirror import PRESETS
from tests.defenses.test_intermediates import NETWORKS

TINY = {"networks": NETWORKS, "T": 12, "t0": 2, "every": 3, "dtype": "float64"}


OWN = ("T", "t0", "every")


def guard(victim, **options):
    return MirrorGuard(victim, **{**TINY, "progress": False, **options})


def test_it_is_a_defence_with_settings_for_json(small_victim):
    defense = guard(small_victim)
    assert isinstance(defense, Defense)
    settings = json.loads(json.dumps(defense.settings))
    assert (settings["name"], settings["T"], settings["t0"], len(settings["fit"])) == ("mirror", 12, 2, 2)
    assert defense.steps_per_image == 22
    assert defense.windows == 3
    assert guard(small_victim, seed=4).settings != settings


def test_a_small_image_gets_three_networks_of_the_paper_with_weights_of_their_own(small_victim):
    defense = MirrorGuard(small_victim)
    assert [fit.network for fit in defense.dip_fits] == ["medium"] * 3
    other = MirrorGuard(small_victim, seed=1)
    assert len({fit.seed for fit in (*defense.dip_fits, *other.dip_fits)}) == 6
    assert defense.dip_fits[0].seed == 0
    assert all((fit.padding, fit.jitter, fit.optimise_z) == ("zeros", 0.0, False) for fit in defense.dip_fits)
    assert (defense.preset, defense.steps_per_image) == ("cifar10", 510)


def test_the_presets_numbers(small_victim):
    small, photograph = (MirrorGuard(small_victim, preset=name) for name in ("cifar10", "imagenet"))
    assert [(d.T, d.t0, d.every) for d in (small, photograph)] == [(170, 50, 20), (250, 100, 25)]
    (spec,) = (fit.network for fit in photograph.dip_fits)
    assert (spec.n_d, spec.n_u, spec.n_s, spec.input_depth) == ((16, 32, 64, 64, 64),) * 2 + ((4,) * 5, 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_values_stand_where_nothing_is_given(small_victim, preset):
    defense, wanted = MirrorGuard(small_victim, preset=preset), PRESETS[preset]
    assert [fit.network for fit in defense.dip_fits] == list(wanted["networks"])
    assert {name: getattr(defense, name) for name in OWN}.items() <= wanted.items()
    assert {(fit.optimise_z, fit.dead_zone) for fit in defense.dip_fits} == {(wanted["optimise_z"], 2.5)}
    changed = MirrorGuard(small_victim, preset=preset, T=360, t0=None, optimise_z=None)
    assert (changed.T, changed.t0, changed.dip_fits[0].optimise_z) == (360, defense.t0, preset == "imagenet")
    fit = MirrorGuard(small_victim, preset=preset, optimise_z=False, dead_zone=1.0).dip_fits[0]
    assert (fit.optimise_z, fit.dead_zone) == (False, 1.0)


def test_a_trace_of_other_windows_is_not_stitched(small_images, small_victim):
    defense = guard(small_victim)
    result = defense.defend(small_images[:1])
    assert torch.equal(defense.rebuild(result.traces[0]).image.float(), result.reconstructions[0])
    with pytest.raises(ValueError, match=r"`trace` must have the windows of this defence, 4 to step 15, got 6 windows"):
        guard(small_victim, T=8).rebuild(result.traces[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clip": 2.0}, "clip=2.0, got clip=6.0"), ({"mirror": False}, "mirror=False, got mirror=True")],
)
def test_a_trace_of_other_samples_is_not_stitched(small_images, small_victim, options, message):
    (trace,) = guard(small_victim).defend(small_images[:1]).traces
    with pytest.raises(ValueError, match=f"`trace` must be of a defence with {message}"):
        guard(small_victim, **options).rebuild(trace)


def test_samples_are_clipped_to_a_few_times_the_noise(small_images, small_victim):
    plain, near = (guard(small_victim, clip=clip).defend(small_images[:3]) for clip in (0.0, 3.0))
    for before, after in zip(plain.traces, near.traces, strict=True):
        most = 3 * float(image_noise(before.given[None]))
        further = (before.samples - before.given).abs() > most + 1e-6
        assert further.any()
        assert float((after.samples - after.given).abs().max()) <= most + 1e-6
        assert torch.allclose(after.samples[~further], before.samples[~further])
        decide = Decider(small_victim)
        assert torch.allclose(after.scores, decide(after.samples), atol=1e-5)
        assert torch.allclose(after.mirrored_logits, decide(mirrored(after.samples)), atol=1e-5)
        assert not torch.allclose(after.scores, before.scores)


def test_the_image_is_what_its_trace_says(small_images, small_victim):
    defense = guard(small_victim)
    part, indices = small_images[:3], [5, 0, 9]
    result = defense.defend(part, indices=indices)
    assert torch.equal(defense.purify(part, indices=torch.tensor(indices)), result.reconstructions)
    decide = Decider(small_victim)
    own, elsewhere = decide(part), torch.stack([decide(copy) for copy in shifted(part)])
    for i, trace in enumerate(result.traces):
        assert trace.samples.shape == (6, 3, 16, 16)
        scores = class_scores(trace.mirrored_logits, own[i], elsewhere[:, i], beta=1.5)
        target = int(scores.argmax())
        read = trace.scores.argmax(-1) == target
        assert result.used[i] == (int(read.sum()) or len(read))
        mean = trace.samples[read if read.any() else slice(None)].mean(0)
        agrees = int(decide(mean[None]).argmax()) == target
        assert (result.reasons[i] == "class_scores") == agrees
        change = float((result.reconstructions[i].double() - mean).abs().max())
        assert change < 1e-6 if agrees else 0.4 / 255 < change < 8.1 / 255
        assert (int(result.decisions_after[i]) == target) == (result.reasons[i] != "not_reached")


def test_an_image_does_not_depend_on_its_neighbours_or_on_the_callers_mode(small_images, small_victim):
    defense = guard(small_victim, stack_size=2)
    alone = torch.cat([defense.purify(small_images[i : i + 1], indices=torch.tensor([i])) for i in range(3)])
    state = torch.get_rng_state()
    with torch.inference_mode():
        together = defense.purify(small_images[:3])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.equal(guard(small_victim, seed=1).purify(small_images[:1]), alone[:1])


def test_progress_counts_the_steps_of_all_networks(small_images, small_victim, capsys):
    guard(small_victim, progress=True, stack_size=2).purify(small_images[:3])
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert "100%" in last
    assert "66.0/66.0" in last  # 3 images, 2 networks, t0 and 3 windows of 3 steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ()}, "`networks` must list at least one"),
        ({"networks": "medium"}, "`networks` must list at least one"),
        ({"networks": NETWORKS[0]}, "`networks` must list at least one"),
        ({"networks": ("huge",)}, "`network` must be one of"),
        ({"preset": "photo"}, "`preset` must be one of cifar10, imagenet, got 'photo'"),
        ({"T": 1}, "`T` must be at least 2, got 1"),
        ({"t0": 12}, "`t0` must be from 0 to 11"),
        ({"every": 11}, "`every` must be from 1 to 10"),
        ({"beta": -0.5}, "`beta` must be finite and at least 0"),
        ({"clip": -0.1}, "`clip` must be"),
        ({"tau": 0.5}, "takes no option 'tau'"),
        ({"network": "small"}, r"'mirror' takes no option 'network' \(did you mean 'networks'\?\)"),
    ],
)
def test_bad_options_are_refused(small_victim, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        guard(small_victim, **options)


def test_images_that_are_too_small_are_refused(small_victim):
    defense = MirrorGuard(small_victim)
    for call in (defense.purify, defense.intermediates):
        with pytest.raises(ValueError, match="at least 9x9 pixels"):
            call(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("mirror", [True, False])
def test_traces_say_why_and_give_the_image_again(small_images, small_victim, tmp_path, mirror):
    options = {"T": 8, "t0": 2, "every": 2, "engine": "torch", "stack_size": 2, "mirror": mirror}
    defense, order = guard(small_victim, **options), [4, 0, 7]
    result = defense.defend(small_images[:3], indices=order)
    assert torch.equal(result.reconstructions, defense.purify(small_images[:3], indices=torch.tensor(order)))
    decide = Decider(small_victim)
    for i, trace in enumerate(result.traces):
        assert trace.index == order[i]
        assert trace.steps.tolist() == [3, 5, 7, 11, 13, 15]
        loaded = DecisionTrace.load(trace.save(tmp_path / f"{i}.safetensors"))
        assert loaded.equals(trace)
        with torch.inference_mode():
            rebuilt = defense.rebuild(loaded)
        assert (rebuilt.reason, len(rebuilt.used)) == (result.reasons[i], result.used[i])
        assert torch.equal(rebuilt.image.to(small_images), result.reconstructions[i])
        assert torch.allclose(trace.scores, decide(trace.samples).cpu(), atol=1e-5)
        copies = mirrored(trace.samples, flip=mirror)
        assert torch.allclose(trace.mirrored_logits, decide(copies).cpu(), atol=1e-5)
        assert torch.equal(trace.last, trace.samples[[2, 5]])
        assert int(trace.given_scores.argmax()) == int(decide(small_images[i : i + 1]).argmax())
    assert min(result.seconds["fit"], result.seconds["decide"]) > 0
    assert set(result.reasons) <= {"class_scores", "moved", "not_reached"}
    assert torch.equal(result.decisions_after, decide(result.reconstructions).argmax(1))


def test_a_trace_without_mirrored_logits_is_refused(small_images, small_victim):
    defense = guard(small_victim)
    (trace,) = defense.defend(small_images[:1]).traces
    tensors = {**trace.tensors(), "index": trace.index, "settings": trace.settings}
    for name in ("mirrored_logits", "samples"):
        less = DecisionTrace(**{key: value for key, value in tensors.items() if key != name})
        with pytest.raises(ValueError, match="trace must hold its `samples` and `mirrored_logits`"):
            defense.rebuild(less)


def test_the_logger_gets_the_means_of_each_window(small_images, small_victim, tmp_path):
    logger = CSVLogger(tmp_path)
    guard(small_victim, stack_size=2).defend(small_images[:4], logger=logger)
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["fit/quality"]]
    assert [int(row["step"]) for row in rows] == [4, 7, 10, 15, 18, 21, 26, 29, 32, 37, 40, 43]


class Watched(MirrorGuard):
    """Counts, whenever a stack is begun, the traces of stacks before it that are still held."""

    def _purify_stack(self, *args, **options):
        self.held.append(sum(trace() is not None for trace in self.seen))
        made = super()._purify_stack(*args, **options)
        self.seen += [weakref.ref(trace) for trace in made.traces]
        return made


def test_what_a_subclass_makes_of_the_images_is_what_purify_returns(small_images, small_victim):
    class Black(MirrorGuard):
        def _purify(self, *args, **options):
            made = super()._purify(*args, **options)
            return replace(made, reconstructions=torch.zeros_like(made.reconstructions))

    assert not Black(small_victim, **TINY, progress=False).purify(small_images[:1]).any()


@pytest.mark.parametrize(("call", "held"), [("purify", [0, 0, 0]), ("defend", [0, 2, 4])])
def test_traces_are_held_only_where_they_are_asked_for(small_images, small_victim, call, held):
    watched = Watched(small_victim, **TINY, progress=False, stack_size=2)
    watched.held, watched.seen = [], []
    getattr(watched, call)(small_images[:5])
    assert watched.held == held


def test_the_network_that_needs_most_memory_bounds_the_stack(small_images, small_victim, monkeypatch):
    sizes, seen = dict(zip(NETWORKS, (3, 2), strict=True)), []

    class Seen(MirrorGuard):
        def _purify_stack(self, images, *args, **options):
            seen.append(len(images))
            return super()._purify_stack(images, *args, **options)

    monkeypatch.setattr("dipguard.defenses.dip.stack_size_for", lambda count, *, fit, **how: sizes[fit.network])
    Seen(small_victim, **TINY, progress=False).purify(small_images[:3])
    assert seen == [2, 1]
