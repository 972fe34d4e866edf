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
from dipguard.files import file_digest, write_bytes

SOURCES = Path(__file__).parent / "native"
REALS = {"float32": "float", "float64": "double"}
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")


class BuildError(RuntimeError):
    """The native engine could not be compiled or loaded; the message says why."""


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or g++ or c++ from the path; None if there is none."""
    names = [os.environ.get("CXX", ""), "g++", "c++"]  # the sources use __builtin_shuffle, which clang lacks
    return next((path for name in names if name and (path := shutil.which(name))), None)


def library(dtype: str) -> ctypes.CDLL:
    """The engine for float32 or float64, compiled or from the cache; BuildError if it cannot be made or loaded."""
    made = _library(dtype)
    if isinstance(made, str):
        raise BuildError(made)
    return made


def sources_digest(*more: str) -> str:
    """A digest of the C++ sources and of further words."""
    digest = hashlib.sha256("\n".join(more).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _library(dtype: str) -> ctypes.CDLL | str:
    """The engine, or why there is none."""
    try:
        loaded = ctypes.CDLL(str(_built(dtype)))
        loaded.stack_step.restype = None
    except (OSError, BuildError, AttributeError) as error:
        return str(error)
    return loaded


def _built(dtype: str) -> Path:
    if os.name == "nt":
        raise BuildError("the native engine is not for Windows")
    found = compiler()
    if found is None:
        raise BuildError("no C++ compiler was found (g++ or $CXX)")
    command = [found, *FLAGS, f"-DREAL={REALS[dtype]}"]
    version = subprocess.run([found, "--version"], capture_output=True, check=False).stdout
    name = f"stack_step-{dtype}-{sources_digest(*command, repr(version), _processor())}"
    folder = cache_folder("native")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_own(folder):
        raise BuildError(f"the folder of compiled code, {folder}, belongs to another user")
    if os.stat(folder).st_mode & 0o777 != 0o700:  # a read-only cache cannot be changed
        folder.chmod(0o700)
    for path in folder.glob(f"{name}-*.so"):
        if _is_own(path) and not path.lstat().st_mode & 0o022 and path.stem.endswith(file_digest(path)[:16]):
            return path
        path.unlink()  # cut off, or another user could have written it
    with tempfile.TemporaryDirectory(prefix="dipguard-") as temporary:
        made = Path(temporary) / "made.so"
        done = subprocess.run([*command, "-o", str(made), str(SOURCES / "step.cpp")], capture_output=True, check=False)
        if done.returncode != 0 or not made.is_file():
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            line = next((line for line in lines if "error" in line), lines[0])  # above it stands which file it is in
            raise BuildError(f"{found} could not compile the native engine: {line}")
        return write_bytes(folder / f"{name}-{file_digest(made)[:16]}.so", made.read_bytes(), mode=0o600)


def _is_own(path: Path) -> bool:
    return os.name != "posix" or path.lstat().st_uid == os.getuid()


def _processor() -> str:
    """What -march=native depends on: a shared home folder may serve machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in names}))
