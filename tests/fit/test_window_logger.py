import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping

from dipguard.classifier import Decider
from dipguard.decision import quality
from dipguard.decision.class_scores import mirrored
from dipguard.evaluation.matrix import Curves
from dipguard.fit import FitOptions, StackedDIP, WindowLogger, isolated_trainer, make_trainer
from tests.fit.conftest import Watch

OPTIONS = FitOptions(network="small", dtype="float64", jitter=0.0, optimise_z=True, engine="torch")
CPU = torch.device("cpu")


def fit(images, steps, *callbacks, logger=None):
    with isolated_trainer(CPU):
        made = make_trainer(steps, device=CPU, callbacks=callbacks, logger=logger)
        made.fit(StackedDIP(images, options=OPTIONS))


def test_windows_and_readings_are_those_of_a_slow_form(images, victim):
    log, watch, asked = WindowLogger(victim, warm_up=3, every=2, windows=20), Watch(), []
    with victim.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0]))):
        fit(images[:2], 44, log, watch)
    assert asked == [64, 16]  # of each window 2 images, as they are and mirrored
    assert log.logits.shape == log.mirrored_logits.shape == (20, 2, 10)
    decide, x = Decider(victim), watch.seen
    for window in range(20):
        first = 3 + 2 * window
        mean = (x[first] + x[first + 1]) / 2
        assert torch.allclose(log.samples[window], mean, atol=1e-12)
        assert torch.allclose(log.logits[window], decide(mean), atol=1e-5)
        assert torch.allclose(log.mirrored_logits[window], decide(mirrored(mean)), atol=1e-5)
        given = images[:2].double()
        wrong = sum((x[t] - given).square().flatten(1).mean(1) for t in (first, first + 1)) / 2
        assert torch.allclose(log.errors[window], wrong, atol=1e-12)
        assert torch.allclose(log.quality[window], quality(mean, given), atol=1e-6)
    assert log.samples.shape == (20, 2, 3, 32, 32)
    assert log.seconds > 0


def test_rows_are_logged_while_the_fit_runs(images, victim):
    curves, at = Curves(), []
    given_logits = Decider(victim)(images[:2])
    log = WindowLogger(victim, warm_up=3, every=2, windows=40, given_logits=given_logits, first_step=100)
    curves.row = lambda step, metrics: at.append(log._full)
    fit(images[:2], 84, log, logger=curves)
    assert at == [16] * 16 + [32] * 16 + [40] * 8  # as many windows were full
    assert [step for step, _ in curves.rows] == [100 + 3 + 2 * window + 1 for window in range(40)]
    for window, (_, row) in enumerate(curves.rows):
        assert row["fit/mse"] == pytest.approx(float(log.errors[window].mean()))
        assert row["fit/quality"] == pytest.approx(float(log.quality[window].mean()))
        changed = log.logits[window].argmax(1) != given_logits.argmax(1)
        assert row["fit/decision_changed"] == float(changed.double().mean())


def test_callbacks_can_watch_the_last_step_of_each_epoch(images, victim):
    watch, stop = Watch(), EarlyStopping("fit/quality", mode="max", patience=9)
    fit(images[:2], 60, WindowLogger(victim, warm_up=1, every=1, windows=3), watch, stop)
    wanted = max(float(quality(watch.seen[step], images[:2].double()).mean()) for step in (49, 59))
    assert stop.best_score == pytest.approx(wanted)


def test_a_logger_serves_another_fit(images, victim):
    log, other = (WindowLogger(victim, warm_up=1, every=1, windows=3) for _ in range(2))
    fit(images[:1], 4, log)
    fit(images[1:2], 4, log)
    fit(images[1:2], 4, other)
    assert torch.equal(log.logits, other.logits)
    assert torch.equal(log.mirrored_logits, other.mirrored_logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"warm_up": -1}, "`warm_up`"), ({"every": 0}, "`every`"), ({"windows": 0}, "`windows`")],
)
def test_bad_arguments_are_refused(victim, change, message):
    with pytest.raises(ValueError, match=message):
        WindowLogger(victim, **{"warm_up": 1, "every": 1, "windows": 1, **change})


def test_a_fit_that_ends_before_the_last_window_is_an_error(images, victim):
    log = WindowLogger(victim, warm_up=1, every=2, windows=3)
    with pytest.raises(RuntimeError, match="ended after 6 steps, before the last of 3 windows, which needs 7"):
        fit(images[:1], 6, log)
