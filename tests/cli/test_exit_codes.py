import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import pytorch_lightning as pl

from dipguard import DIPGuard
from dipguard.cli import CommandError, exit_codes, locked
from dipguard.cli.main import main
from dipguard.data import load_data

LIBRARY = """
import os, signal, pytorch_lightning as pl, torch
from dipguard import DIPGuard

class Stop(pl.Callback):
    def on_train_batch_end(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)

victim = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
DIPGuard(victim, T=10, progress=False).defend(torch.rand(1, 3, 32, 32), callbacks=[Stop()])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_program_with_its_code_and_a_message(number, code, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def program():
        with exit_codes("program"):
            os.kill(os.getpid(), number)
            time.sleep(1)

    with pytest.raises(SystemExit) as stopped:
        program()
    assert stopped.value.code == code
    assert capsys.readouterr().err.startswith("program: ")
    assert signal.getsignal(signal.SIGTERM) is before


class TerminatedAsItGoes:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_in_a_place_where_python_drops_exceptions_is_not_lost():
    hook = sys.unraisablehook

    def program():
        with exit_codes("program"):
            TerminatedAsItGoes()
            time.sleep(5)
            pytest.fail("it went on")

    with pytest.raises(SystemExit) as stopped:
        program()
    assert stopped.value.code == 143
    assert sys.unraisablehook is hook


def say_something():
    with exit_codes("program"):
        print("something")


@pytest.mark.parametrize("program", [say_something, lambda: main(["list"])], ids=["any", "list"])
@pytest.mark.parametrize("buffering", [-1, 1])
def test_a_pipe_that_nothing_reads_ends_a_program_in_silence(program, buffering, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)

    def unread():
        with os.fdopen(write, "w", buffering=buffering) as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            program()

    with pytest.raises(SystemExit) as stopped:
        unread()
    assert stopped.value.code == 141
    assert capsys.readouterr().err == ""


class Signal(pl.Callback):
    """Sends SIGTERM after the first step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0 and trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_in_a_library_sigterm_is_the_callers(victim):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        guard = DIPGuard(victim, T=4, decisions=2, progress=False)
        result = guard.defend(load_data("digits", limit=1).images, callbacks=[Signal()])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert len(result.reconstructions) == 1


@pytest.mark.slow
def test_in_a_library_without_a_handler_sigterm_kills():
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr


def test_a_folder_is_worked_in_by_one_and_cleaned(tmp_path):
    left = tmp_path / "run" / "deep" / ".0123456789abcdef.part"
    left.parent.mkdir(parents=True)
    left.touch()
    os.utime(left, (0, 0))
    young = left.with_name(".fedcba9876543210.part")  # another run may be writing to a store in this folder
    young.touch()
    with locked(tmp_path / "run"):
        assert not left.exists()
        assert young.exists()
        with pytest.raises(CommandError, match="another process works in"), locked(tmp_path / "run"):
            pass
    with locked(tmp_path / "run"):
        pass


def test_a_folder_can_be_waited_for(tmp_path):
    order = []

    def second():
        with locked(tmp_path, wait=True):
            order.append("second")

    waiting = threading.Thread(target=second)
    with locked(tmp_path):
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
