"""DIPGuard, the method of the paper, through its public methods."""

import csv
import json
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.profilers import SimpleProfiler
from torch import nn
from tqdm import tqdm

from dipguard import DIPGuard
from dipguard.classifier import eval_mode
from dipguard.decision import stitch
from dipguard.defenses import Defense, build_defense
from dipguard.fit import FitProgress
from dipguard.store import Store
from tests.defenses.conftest import all_stays

QUICK = {"network": "small", "T": 12, "decisions": 6, "tau": 0.0, "t0": 0, "K": 3, "progress": False}


def test_purify_defend_and_forward_agree(small_images, small_victim):
    guard = DIPGuard(small_victim, **QUICK)
    assert isinstance(guard, Defense)
    result = guard.defend(small_images[:3])
    assert torch.equal(result.reconstructions, guard.purify(small_images[:3]))
    with eval_mode(small_victim), torch.no_grad():
        torch.testing.assert_close(guard(small_images[:3]), small_victim(result.reconstructions))
        assert torch.equal(result.decisions_before, small_victim(small_images[:3]).argmax(1))
        assert torch.equal(result.decisions_after, small_victim(result.reconstructions).argmax(1))
    assert result.reconstructions.shape == (3, 3, 16, 16)
    assert 0 <= float(result.reconstructions.min()) <= float(result.reconstructions.max()) <= 1
    assert set(result.reasons) <= {"crossings", "no_crossing"}
    for trace, image, used in zip(result.traces, result.reconstructions, result.used, strict=True):
        rebuilt = stitch(trace, tau=0.0, t0=0, K=3, beta=0.5)
        assert torch.equal(rebuilt.image, image)
        assert len(rebuilt.used) == used
    assert min(result.seconds.values()) > 0


class Stacks(pl.Callback):
    """How many images each stack has, and the loggers of its Trainer."""

    def __init__(self):
        self.sizes, self.loggers = [], []

    def on_fit_start(self, trainer, pl_module):
        self.sizes.append(len(pl_module.given))
        self.loggers.extend(trainer.loggers)


def test_the_stack_size_is_chosen_or_given_and_does_not_change_an_image(small_images, small_victim):
    results = []
    for options, sizes in (({}, [5]), ({"stack_size": 2}, [2, 2, 1])):
        guard, stacks = DIPGuard(small_victim, dtype="float64", **QUICK, **options), Stacks()
        results.append(guard.defend(small_images[:5].double(), callbacks=[stacks]))
        assert stacks.sizes == sizes
        assert "stack_size" not in guard.settings
        assert [trace.index for trace in results[-1].traces] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(*(result.reconstructions for result in results), rtol=0, atol=1e-9)


def test_the_logger_gets_the_means_of_each_stack(small_images, small_victim, tmp_path):
    logger, stacks = CSVLogger(tmp_path), Stacks()
    DIPGuard(small_victim, stack_size=2, **QUICK).defend(small_images[:4], logger=logger, callbacks=[stacks])
    assert stacks.loggers == [logger, logger]
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["fit/mse"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]
    assert all(row["fit/quality"] and row["fit/crossings"] for row in rows)


def test_arguments_of_the_trainer_reach_it(small_images, small_victim):
    profiler = SimpleProfiler()
    guard = DIPGuard(small_victim, trainer={"profiler": profiler}, **QUICK)
    expected = DIPGuard(small_victim, **QUICK).purify(small_images[:2])
    assert torch.equal(guard.purify(small_images[:2]), expected)
    assert any("training_step" in action for action in profiler.recorded_durations)
    assert guard.settings["trainer"] == {"profiler": "SimpleProfiler"}


def test_each_setting_of_the_trainer_is_one_of_the_defence(small_victim):
    several = {"max_time": timedelta(seconds=60), "detect_anomaly": False, "profiler": None, "min_epochs": 1}
    for name, changed in [("max_time", timedelta(seconds=1)), ("max_time", {"seconds": 60}), ("min_epochs", 2)]:
        made = [DIPGuard(small_victim, trainer=given, **QUICK) for given in (several, {**several, name: changed})]
        assert json.dumps(made[0].settings) != json.dumps(made[1].settings)
    several["max_time"] = {"seconds": 60}
    made = [DIPGuard(small_victim, trainer={"max_time": {"seconds": n}}, **QUICK).settings for n in (1, 60)]
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("16-mixed", TypeError, "`trainer` must be a mapping of arguments of pl.Trainer or None, got '16-mixed'"),
        ({"presicion": 16}, TypeError, "`trainer` must hold arguments of pl.Trainer, got presicion=16"),
    ],
)
def test_arguments_that_a_trainer_cannot_have_are_refused_at_once(small_victim, given, error, message):
    with pytest.raises(error, match=message):
        DIPGuard(small_victim, trainer=given, **QUICK)


def test_a_trace_is_stitched_again_with_other_parameters(small_images, small_victim):
    result = DIPGuard(small_victim, **QUICK).defend(small_images[:3])
    other = DIPGuard(small_victim, **{**QUICK, "K": 2, "beta": 0.0})
    expected = other.defend(small_images[:3])
    for trace, image in zip(result.traces, expected.reconstructions, strict=True):
        assert torch.equal(other.rebuild(trace).image, image)


def test_a_store_gives_the_same_images_without_another_fit(small_images, small_victim, tmp_path):
    plain = DIPGuard(small_victim, **QUICK).defend(small_images[:3])
    store = Store(tmp_path)
    stored = DIPGuard(small_victim, store=store, store_T=(20,), **QUICK)
    for _ in range(2):
        result = stored.defend(small_images[:3])
        torch.testing.assert_close(result.reconstructions, plain.reconstructions, rtol=0, atol=1e-6)
        assert (result.reasons, result.used) == (plain.reasons, plain.used)
    longer = DIPGuard(small_victim, **{**QUICK, "T": 20}, store=store)
    assert longer.defend(small_images[:3]).traces
    assert store.counts["fitted"] == 3


def test_a_fit_with_callbacks_of_the_caller_is_neither_stored_nor_looked_up(small_images, small_victim, tmp_path):
    class Halved(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for number in optimizer.param_groups[0]["params"]:
                number.grad *= torch.linspace(0.5, 1, number.numel()).view_as(number)

    options = {**QUICK, "dtype": "float64"}
    plain = DIPGuard(small_victim, **options).purify(small_images[:1])
    stored = DIPGuard(small_victim, store=tmp_path, **options)
    altered = [stored.defend(small_images[:1], callbacks=[Halved()]).reconstructions]
    assert torch.equal(stored.purify(small_images[:1]), plain)
    altered.append(stored.defend(small_images[:1], callbacks=[Halved()]).reconstructions)
    assert torch.equal(*altered)
    assert not torch.equal(altered[0], plain)


def test_the_bar_ends_full_when_a_store_has_the_fits(small_images, small_victim, tmp_path, capfd):
    DIPGuard(small_victim, store=tmp_path, **QUICK).purify(small_images[:1])
    guard = DIPGuard(small_victim, **{**QUICK, "progress": True, "stack_size": 1}, store=tmp_path)
    capfd.readouterr()
    guard.purify(small_images[:3])
    shown = capfd.readouterr().err
    assert "fit: 100%" in shown
    assert "24.0/24.0" in shown
    guard.purify(small_images[:3])
    assert "fit: 0.00step" in capfd.readouterr().err  # tqdm's way to show that nothing is left of nothing


def test_another_bar_takes_the_place_of_its_own(small_images, small_victim, capfd):
    with tqdm(total=24, disable=False) as bar:
        capfd.readouterr()
        DIPGuard(small_victim, **{**QUICK, "progress": True}).defend(small_images[:2], callbacks=[FitProgress(bar)])
        assert bar.n == 24
    assert "fit:" not in capfd.readouterr().err


def test_a_warm_up_beyond_the_fit_is_warned_of(small_victim, caplog):
    DIPGuard(small_victim, **QUICK)
    assert not caplog.records
    DIPGuard(small_victim, **{**QUICK, "t0": 12})
    assert "`t0`=12 is past the end of the fit (12 steps): no crossing can count" in caplog.text
    DIPGuard(small_victim, **{**QUICK, "t0": 6}, t0_unit="samples")
    assert "`t0`=6 is past the end of the fit (6 samples)" in caplog.text


def test_an_images_index_settles_its_draws(small_images, small_victim):
    guard = DIPGuard(small_victim, **QUICK)
    made = guard.defend(small_images[:2], indices=[7, 3]).reconstructions
    assert torch.equal(guard.purify(small_images[:2], indices=torch.tensor([7, 3])), made)
    assert not torch.equal(guard.purify(small_images[:2], indices=[8, 3])[0], made[0])


BF16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, BF16])
def test_works_under_any_mode_of_torch_and_leaves_the_callers_state(small_images, small_victim, around):
    expected = DIPGuard(small_victim, **QUICK).purify(small_images[:2])
    small_victim.train()
    with around(), all_stays(small_victim):
        purified = DIPGuard(small_victim, **QUICK).purify(small_images[:2].clone())
    assert torch.equal(purified, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_come_back_in_their_dtype(small_images, small_victim, dtype):
    assert DIPGuard(small_victim, **QUICK).purify(small_images[:1].to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"K_max": 2}, ValueError, "`K_max` must be at least 3, got 2"),
        ({"stack_size": 0}, ValueError, "`stack_size` must be at least 1, got 0"),
        ({"stack_size": "all"}, TypeError, "`stack_size` must be an integer, got 'all'"),
        ({"jiter": 0.1}, TypeError, r"the defence 'paper' takes no option 'jiter' \(did you mean 'jitter'\?\)"),
    ],
)
def test_bad_options_are_named(small_victim, options, error, message):
    with pytest.raises(error, match=message):
        DIPGuard(small_victim, **{**QUICK, **options})


@pytest.mark.parametrize(("name", "warned"), [("paper", 1), ("mirror", 1), ("dip_fixed", 0)])
def test_probabilities_are_warned_of_where_logits_decide(small_images, small_victim, name, warned):
    options = {
        "T": 4,
        "progress": False,
        "engine": "torch",
        **({"step": 3} if name == "dip_fixed" else {"t0": 1, "every": 1}),
    }
    for victim, count in ((nn.Sequential(small_victim, nn.Softmax(dim=1)), warned), (small_victim, 0)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            build_defense(name, victim, **options).purify(small_images[:1])
        texts = [str(one.message) for one in told if one.category is UserWarning and "logits" in str(one.message)]
        assert len(texts) == count
        assert all("`victim` must return logits, but its outputs lie in" in text for text in texts)


def test_settings_can_be_written_as_json(small_victim):
    guard = DIPGuard(small_victim, **QUICK)
    settings = guard.settings
    assert guard.steps_per_image == settings["T"] == 12
    assert json.loads(json.dumps(settings)) == settings
    assert settings["z_scale"] == pytest.approx(1 / 30)
    assert {"T", "tau", "t0", "K", "beta", "seed", "network", "decisions", "N", "K_max", "jitter"} <= settings.keys()
