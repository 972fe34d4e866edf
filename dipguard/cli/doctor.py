"""``dipguard doctor``: what is installed, what can be used, and whether a short fit works."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from dipguard.version import __version__

IMAGES, STEPS = 4, 200  # of the self-test
Finding = tuple[str, str, str]
"""``ok``, ``note`` (something optional is missing) or ``BROKEN``; the subject; what was found."""


def run(args: argparse.Namespace) -> int:
    """Print all findings; return 1 if something essential is broken, 0 otherwise."""
    checks = [libraries, pair_of_builds, device, compiler, gpu_engine, caches, wandb]
    broken = False
    for check in checks if args.no_self_test else [*checks, self_test]:
        try:
            found = list(check())
        except Exception as error:  # the other checks must still run
            text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            found = [("BROKEN", check.__name__.replace("_", " "), text)]
        for state, subject, text in found:
            broken |= state == "BROKEN"
            print(f"{state:6}  {subject:17}  {text}", flush=True)
    print("something essential is broken" if broken else "all is well", file=sys.stderr)
    return int(broken)


def libraries() -> Iterator[Finding]:
    """Versions of dipguard, Python, the required libraries and those of the extras."""
    yield "ok", "dipguard", f"{__version__}, {Path(__file__).parents[1]}"
    yield "ok", "python", f"{platform.python_version()}, {platform.platform()}"
    required: dict[str, list[Requirement]] = {}
    for text in requires("dipguard") or ():
        extra = re.search(r"extra == ['\"]([\w-]+)", text)
        required.setdefault(extra[1] if extra else "", []).append(Requirement(text))
    for name, requirements in required.items():
        found = {one: _version(one.name) for one in requirements}
        wrong = {one: not (v and one.specifier.contains(v, prereleases=True)) for one, v in found.items()}
        text = ", ".join(
            f"{one.name} {number or 'missing'}" + (f" (needs {one.specifier})" if number and wrong[one] else "")
            for one, number in found.items()
        )
        if name != "dev":
            missing = "note" if name else "BROKEN"
            yield missing if any(wrong.values()) else "ok", f"[{name}]" if name else "libraries", text


def pair_of_builds() -> Iterator[Finding]:
    """Whether torch and torchvision are of the same build; if not, torchvision cannot be imported."""
    if _version("torchvision") is not None:
        import_module("torchvision")
        yield "ok", "torch's pair", f"torchvision {_version('torchvision')} is of the same build"


def device() -> Iterator[Finding]:
    """GPUs, and threads of the CPU."""
    import torch

    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield "ok", f"cuda:{number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch is built without CUDA" if built is None else f"no GPU, or no driver for CUDA {built}"
        yield "note", "gpu", f"none ({why}; docs/installing.md)"
    yield "ok", "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} at once"


def compiler() -> Iterator[Finding]:
    """Whether the native engine can be built with the C++ compiler."""
    from dipguard.engines.native_build import BuildError, library
    from dipguard.engines.native_build import compiler as find_compiler

    try:
        library("float32")
        yield "ok", "native engine", f"compiled by {find_compiler()}"
    except BuildError as error:
        yield "note", "native engine", f"{error}; torch takes its place on a CPU, 2 to 3 times slower"


def gpu_engine() -> Iterator[Finding]:
    """Which engine fits take on a GPU, and how far it is ahead."""
    import torch

    if torch.cuda.is_available():
        from dipguard.engines.cuda_graph import engine_times
        from dipguard.networks import build

        images = torch.rand(IMAGES, 3, 32, 32, device="cuda")
        times = engine_times(build("medium", stack_size=IMAGES, padding="zeros").cuda(), images)
        name = min(times, key=times.__getitem__)
        steps = ", ".join(f"{1000 * seconds:.2f} ms with {engine}" for engine, seconds in times.items())
        yield "ok", "GPU engine", f"{name}; a step of {IMAGES} images takes {steps}"


def caches() -> Iterator[Finding]:
    """Folders for downloads, trained victims and compiled code."""
    from dipguard.cache import cache_folder

    folder = cache_folder()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    usable = parent.is_dir() and os.access(parent, os.W_OK)
    text = f"{folder}, {size / 2**20:.1f} MiB" + ("" if usable else "; cannot be written: set DIPGUARD_CACHE")
    yield "ok" if usable else "BROKEN", "cache", text


def wandb() -> Iterator[Finding]:
    """How a run with ``logger=wandb`` would log; the key itself is never shown."""
    if _version("wandb") is not None:
        try:
            from dipguard.reporting.loggers import wandb_mode
        except ImportError as error:
            yield "note", "W&B", f"runs need the extra 'app' ({error})"
            return
        yield "ok", "W&B", f"runs are {wandb_mode(None)}, unless logger.offline says otherwise"


def self_test() -> Iterator[Finding]:
    """A short fit of smooth images: whether it approaches them, and the time of one step of one image."""
    import torch

    from dipguard.defenses import DIPGuard

    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.nn.functional.interpolate(torch.rand(IMAGES, 3, 4, 4), size=(32, 32), mode="bilinear")
        victim = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    guard = DIPGuard(victim.to(device), T=STEPS, decisions=20, seed=0, stack_size=IMAGES, progress=False)
    result = guard.defend(images)
    first, last = (torch.stack([trace.quality[at] for trace in result.traces]).mean() for at in (0, -1))
    rise = float(last - first)
    if not rise >= 0.1:
        yield "BROKEN", "self-test", f"the fit did not approach its images (SSIM rose by {rise:.3f} in {STEPS} steps)"
        return
    milliseconds = 1000 * result.seconds["fit"] / (STEPS * IMAGES)
    took = f"{milliseconds:.2f} ms a step and image, SSIM +{rise:.2f}, {time.perf_counter() - start:.1f} s"
    yield "ok", "self-test", f"{IMAGES} images, {STEPS} steps on {device}: {took}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
