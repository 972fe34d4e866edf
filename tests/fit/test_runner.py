"""What a stacked fit does to the program around it."""

import gc
import logging
import os
import signal
import threading
import time
import warnings
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint, Timer
from pytorch_lightning.plugins.environments import SLURMEnvironment
from torch import Tensor, nn

from dipguard.checks import check_images
from dipguard.classifier import Decider
from dipguard.fit import (
    DecideOptions,
    FitOptions,
    StackResult,
    StitchOptions,
    fit_stack,
    isolated_trainer,
    run_fit,
)
from tests.fit.conftest import WORKING, At

CPU = torch.device("cpu")


def run(images: Tensor, victim: nn.Module, *callbacks: pl.Callback) -> StackResult:
    decide, stitch = DecideOptions(T=8, decisions=4), StitchOptions(tau=0.7, t0=50, K=15, beta=0.5)
    how = {"indices": [0], "fit": FitOptions(network="small"), "device": CPU, "callbacks": callbacks}
    return fit_stack(images[:1], victim=victim, decide=decide, stitch=stitch, **how)


def press_ctrl_c(trainer: pl.Trainer) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stays_ctrl_c_and_can_be_pressed_again(images: Tensor, victim: nn.Module) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(images, victim, At(3, press_ctrl_c))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(run(images, victim).traces) == 1


@pytest.mark.parametrize("error", [SystemExit, RuntimeError])
def test_other_errors_pass(images: Tensor, victim: nn.Module, error: type[BaseException]) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def fail(trainer: pl.Trainer) -> None:
        torch.rand(1)
        raise error("stop")

    with pytest.raises(error, match="stop"):
        run(images, victim, At(3, fail))
    assert torch.equal(torch.get_rng_state(), state)


def test_runs_in_a_thread(images: Tensor, victim: nn.Module) -> None:
    results: list[StackResult] = []
    thread = threading.Thread(target=lambda: results.append(run(images, victim)))
    thread.start()
    thread.join()
    expected = run(images, victim)
    assert torch.equal(results[0].reconstructions[0].image, expected.reconstructions[0].image)


def test_a_fit_inside_a_slurm_job_is_no_task_of_it(images, victim, monkeypatch) -> None:
    """Lightning would take the job's tasks for processes of this Trainer, and refuse them."""
    for name, value in {"NTASKS": "2", "PROCID": "1", "LOCALID": "1", "JOB_ID": "1", "JOB_NAME": "mine"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert SLURMEnvironment.detect()
    assert run(images, victim).traces


def test_what_threads_share_is_put_back_by_the_last_of_them() -> None:
    def state() -> list[Any]:
        levels = [logging.getLogger(name).level for name in ("pytorch_lightning", "lightning.fabric")]
        random, precision = torch.get_rng_state().tolist(), torch.backends.cudnn.conv.fp32_precision
        return [levels, list(warnings.filters), random, precision]

    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with isolated_trainer(CPU):
            inside.set()
            leave.wait(10)

    logging.getLogger("pytorch_lightning").setLevel(logging.DEBUG)
    before, thread = state(), threading.Thread(target=other)
    with isolated_trainer(CPU):
        thread.start()
        assert inside.wait(10)
        torch.rand(1)
    assert logging.getLogger("pytorch_lightning").level == logging.ERROR, "the other fit goes on"
    leave.set()
    thread.join()
    assert state() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize(("threads", "expected"), [(2, 3), (1, 0)])
def test_a_forked_process_that_would_hang_is_told_so(victim: nn.Module, threads: int, expected: int) -> None:
    torch.set_num_threads(2)
    with isolated_trainer(CPU):
        pass
    if (child := os.fork()) == 0:
        torch.set_num_threads(threads)
        told = 0
        image = torch.zeros(1, 3, 32, 32)
        for ask in (isolated_trainer(CPU).__enter__, partial(Decider(victim), image), partial(check_images, image)):
            try:
                ask()
            except RuntimeError as error:
                told += "'spawn' or 'forkserver'" in str(error) and "torch.set_num_threads(1)" in str(error)
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected


class Remember(pl.Callback):
    """Weak references to the parts of a fit."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.parts = [weakref.ref(part) for part in (trainer, pl_module, pl_module.engine, trainer.optimizers[0])]


@pytest.mark.parametrize("engine", WORKING)
@pytest.mark.parametrize("fails", [False, True])
def test_a_fit_leaves_nothing_to_the_garbage_collector(images: Tensor, engine: str, fails: bool) -> None:
    def fail(trainer: pl.Trainer) -> None:
        raise KeyError

    remember = Remember()
    fit = FitOptions(network="small", engine=engine, jitter=0.1)
    callbacks = [remember, At(3, fail)] if fails else [remember]
    gc.disable()
    try:
        with pytest.raises(KeyError) if fails else nullcontext():
            run_fit(images[:1], T=5, indices=[0], fit=fit, device=CPU, callbacks=callbacks)
        assert [part() for part in remember.parts] == [None] * 4
    finally:
        gc.enable()


def test_timers_and_checkpoints_start_afresh_with_each_fit(images: Tensor, tmp_path: Path) -> None:
    timer, checkpoint = Timer(duration={"seconds": 60}), ModelCheckpoint(tmp_path, filename="net")
    how = {"T": 3, "fit": FitOptions(network="small"), "device": CPU, "callbacks": [timer, checkpoint]}
    for index in range(3):
        start = time.monotonic()
        run_fit(images[:1], indices=[index], **how)
        assert timer.time_elapsed() < time.monotonic() - start
        timer._start_time["train"] -= 61  # as if the fit had taken that long
        name = "net.ckpt" if index == 0 else f"net-v{index}.ckpt"
        assert Path(checkpoint.best_model_path).name == name
    assert len(list(tmp_path.iterdir())) == 3


def test_a_fit_without_a_step_is_an_error(images: Tensor) -> None:
    how = {"T": 3, "indices": [0], "fit": FitOptions(network="small"), "device": CPU}
    with pytest.raises(RuntimeError, match="ended before its first step, by a callback or by `max_time`"):
        run_fit(images[:1], trainer={"max_time": {"seconds": 0}}, **how)


@pytest.mark.parametrize("strict", [False, True])
def test_flags_that_a_trainer_sets_for_the_process_are_put_back(images: Tensor, strict: bool) -> None:
    torch.use_deterministic_algorithms(strict, warn_only=strict)
    try:
        flags = {"deterministic": not strict, "benchmark": True}
        seen: list[bool] = []
        how = {"T": 2, "indices": [0], "fit": FitOptions(network="small"), "device": CPU, "trainer": flags}
        look = At(1, lambda trainer: seen.append(torch.are_deterministic_algorithms_enabled()))
        run_fit(images[:1], callbacks=[look], **how)
        assert seen == [not strict]
        assert torch.are_deterministic_algorithms_enabled() is strict
        assert torch.is_deterministic_algorithms_warn_only_enabled() is strict
        assert torch.backends.cudnn.benchmark is False
    finally:
        torch.use_deterministic_algorithms(False)


def test_seconds_are_counted_by_part(images: Tensor, victim: nn.Module) -> None:
    start, slow_start = time.perf_counter(), LambdaCallback(on_fit_start=lambda *about: time.sleep(0.1))
    seconds = run(images, victim, slow_start, At(3, lambda trainer: time.sleep(0.1))).seconds
    assert seconds.keys() == {"start", "fit", "decide"}
    assert min(seconds.values()) > 0
    assert seconds["start"] >= 0.1
    assert seconds["fit"] >= 0.1
    assert sum(seconds.values()) <= time.perf_counter() - start


def test_nothing_is_printed(images: Tensor, victim: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    run(images, victim)
    assert capfd.readouterr() == ("", "")


def test_a_fit_in_another_thread_does_not_repeat_the_main_threads_draws() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with isolated_trainer(CPU):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    first = torch.rand(3)
    leave.set()
    thread.join()
    assert not torch.equal(torch.rand(3), first)
