"""The command line, and what the programs ``train.py`` and ``evaluate.py`` do."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_log = logging.getLogger(__name__)
LOCK = ".lock"
"""The file in a run folder that is locked while a process works there."""
STALE_AFTER = 3600
"""Seconds after which a half-written file belongs to no living process: no write takes longer."""


OPTIONS = {
    r"victim\.weights": "--weights",
    r"victim\.arch": "--victim NAME:MODEL",
    r"victim\.(\w+)": r"--victim-option \1",
    r"data\.size": "--size",
}
"""Keys of the programs, in messages, as options of the commands."""


class CommandError(Exception):
    """The command cannot be carried out as given. The message is shown to the user without a traceback."""


class _TerminatedError(BaseException):
    """SIGTERM."""


@contextmanager
def command_errors(prefix: str = "") -> Iterator[None]:
    """Turn errors of arguments, files and missing libraries into a `CommandError`, whose message ``prefix`` begins."""
    try:
        yield
    except (TypeError, ValueError, OSError, RuntimeError, ImportError) as error:
        text = prefix + str(error)
        for key, option in OPTIONS.items():
            text = re.sub(f"`{key}`", option, text)
        raise CommandError(text) from error


@contextmanager
def exit_codes(program: str) -> Iterator[None]:
    """End without a traceback, as a shell expects: 130 after Ctrl-C, 143 after SIGTERM, 141 for a closed pipe."""

    def terminate(number: int, frame: object) -> None:
        raise _TerminatedError

    def swallowed(unraisable: sys.UnraisableHookArgs) -> None:
        # Python drops what is raised in a `__del__` or an import lock; the signal comes once, so it is sent again.
        if not isinstance(unraisable.exc_value, _TerminatedError):
            return said(unraisable)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if main else None
    said = sys.unraisablehook
    if main:
        sys.unraisablehook = swallowed
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{program}: interrupted; finished work is kept", file=sys.stderr)
        raise SystemExit(130) from None
    except _TerminatedError:
        print(f"{program}: terminated by SIGTERM; finished work is kept", file=sys.stderr)
        raise SystemExit(143) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(141) from None
    finally:
        if main:
            sys.unraisablehook = said
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Work in a run folder as its only process; half-written files that a killed one left there are removed.

    Only those older than an hour are: a store in this folder may be in use by another run. If another process works in
    the folder, CommandError, or wait until it has ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise CommandError(f"another process works in {folder}; wait for its end, or take another folder") from None
        _log.info("waiting for the end of another process that works in %s", folder)
        lock.acquire()
    try:
        for path in folder.rglob(".*.part"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE_AFTER:
                    path.unlink()
        yield
    finally:
        lock.release()
