"""Compiles the native engine on first use with the system's C++ compiler, for this machine's processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from dipguard.cache import cache_folder
from dipguard.files import write_bytes

SOURCES = Path(__file__).parent / "native"
REALS = {"float32": "float", "float64": "double"}
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")


class BuildError(RuntimeError):
    """The native engine could not be compiled or loaded; the message says why."""


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or g++, clang++ or c++ from the path; None if there is none."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


@cache
def library(dtype: str) -> ctypes.CDLL:
    """The engine for float32 or float64, compiled unless an earlier run left it in the cache.

    Raises:
        BuildError: No compiler, or it failed.
    """
    path = _built(dtype)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled native engine cannot be loaded: {error}") from error
    loaded.stack_step.restype = None
    return loaded


def _built(dtype: str) -> Path:
    found = compiler()
    if found is None:
        raise BuildError("no C++ compiler was found (g++, clang++ or $CXX)")
    command = [found, *FLAGS, f"-DREAL={REALS[dtype]}"]
    path = cache_folder("native", f"stack_step-{dtype}-{_key(command)}.so")
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory(prefix="dipguard-") as folder:
        made = Path(folder) / path.name
        try:
            done = subprocess.run(
                [*command, "-o", str(made), str(SOURCES / "step.cpp")], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise BuildError(f"the compiler {found} could not be run: {error}") from error
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise BuildError(f"{found} could not compile the native engine: {lines[0]}")
        return write_bytes(path, made.read_bytes())


def _key(command: list[str]) -> str:
    """Changes with the sources, the command, the compiler and the processor (-march=native)."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    digest.update("\n".join([*command, version, _processor()]).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: a shared home folder may serve machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in names}))
