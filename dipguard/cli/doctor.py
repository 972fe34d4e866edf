"""``dipguard doctor``: what is installed, what can be used, and whether it works."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dipguard.version import __version__

CORE = ("torch", "pytorch-lightning", "torchmetrics", "numpy", "safetensors", "tqdm")
OPTIONAL = {
    "vision": ("torchvision", "pillow"),
    "defenses": ("scipy", "scikit-image", "pywavelets"),
    "attacks": ("torchattacks", "foolbox"),
    "app": ("hydra-core", "omegaconf", "matplotlib", "scikit-learn", "tensorboard", "wandb"),
    "timm": ("timm",),
    "huggingface": ("transformers",),
    "integrations": ("adversarial-robustness-toolbox",),
}
"""Distributions by the extra of dipguard that brings them."""


@dataclass(frozen=True)
class Finding:
    """One line; ``state`` is ``ok``, ``note`` (something optional is missing) or ``BROKEN`` (it is essential)."""

    state: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:6}  {self.subject:17}  {self.text}"


def run(args: argparse.Namespace) -> int:
    """Print all findings; return 1 if something essential is broken, 0 otherwise."""
    checks = [versions, pair_of_builds, device, compiler, caches, optional_libraries, wandb]
    if not args.no_self_test:
        checks.append(tested)
    broken = 0
    for check in checks:
        for finding in _guarded(check):
            broken += finding.state == "BROKEN"
            print(finding, flush=True)
    print("something essential is broken" if broken else "all is well", file=sys.stderr)
    return 1 if broken else 0


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    # A doctor that dies of the illness is of no use: any error is a finding.
    try:
        yield from check()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        yield Finding("BROKEN", check.__name__.replace("_", " "), f"{type(error).__name__}: {lines[0]}")


def versions() -> Iterator[Finding]:
    """dipguard, Python, and what dipguard cannot do without."""
    yield Finding("ok", "dipguard", f"{__version__}, {Path(__file__).parents[1]}")
    yield Finding("ok", "python", f"{platform.python_version()}, {platform.platform()}")
    for name in CORE:
        found = _version(name)
        yield Finding("ok" if found else "BROKEN", name, found or "not installed")


def pair_of_builds() -> Iterator[Finding]:
    """Where torch and torchvision are of different builds, torchvision cannot be imported, nor what imports it."""
    if _version("torchvision") is None:
        return
    import_module("torchvision")
    yield Finding("ok", "torch's pair", f"torchvision {_version('torchvision')} is of the same build")


def device() -> Iterator[Finding]:
    """The GPU, or the CPU's threads."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            yield Finding("ok", f"cuda:{number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU, or no driver"
        yield Finding("note", "gpu", f"none ({why})")
    yield Finding("ok", "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} at once")


def compiler() -> Iterator[Finding]:
    """The C++ compiler of the native engine, and whether the engine can be built."""
    from dipguard.engines.native_build import BuildError, library
    from dipguard.engines.native_build import compiler as find_compiler

    start = time.perf_counter()
    try:
        library("float32")
        yield Finding("ok", "native engine", f"{find_compiler()}, ready in {time.perf_counter() - start:.1f} s")
    except BuildError as error:
        yield Finding("note", "native engine", f"{error}; torch takes its place on a CPU, 2 to 3 times slower")


def caches() -> Iterator[Finding]:
    """The folders that keep what is downloaded, trained or compiled."""
    import torch

    from dipguard.cache import cache_folder

    folder = cache_folder()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    usable = parent.is_dir() and os.access(parent, os.W_OK)
    text = f"{folder}, {size / 2**20:.1f} MiB" + ("" if usable else "; cannot be written: set DIPGUARD_CACHE")
    yield Finding("ok" if usable else "BROKEN", "cache", text)
    yield Finding("ok", "torch's cache", torch.hub.get_dir())
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    yield Finding("ok", "the hub's cache", str(home))


def optional_libraries() -> Iterator[Finding]:
    """What the extras bring."""
    for extra, names in OPTIONAL.items():
        found = {name: _version(name) for name in names}
        text = ", ".join(f"{name} {number}" if number else f"{name} missing" for name, number in found.items())
        yield Finding("ok" if all(found.values()) else "note", f"[{extra}]", text)


def wandb() -> Iterator[Finding]:
    """How a run with logger=wandb would log; the key itself is never shown."""
    if _version("wandb") is None:
        return
    mode, key = os.environ.get("WANDB_MODE"), "set" if os.environ.get("WANDB_API_KEY") else "not set"
    effect = mode or ("online" if key == "set" else "offline")
    yield Finding("ok", "W&B", f"WANDB_API_KEY is {key}, WANDB_MODE is {mode or 'not set'}: runs are {effect}")


def tested() -> Iterator[Finding]:
    """A small real fit."""
    import torch

    from dipguard.cli.self_test import IMAGES, STEPS, self_test

    start = time.perf_counter()
    result = self_test(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    text = (
        f"{IMAGES} images, {STEPS} steps, {result.engine} engine on {result.device}, victim {result.victim}: "
        f"{result.milliseconds:.2f} ms a step and image, SSIM +{result.rise:.2f}, {time.perf_counter() - start:.1f} s"
    )
    yield Finding("BROKEN" if result.problem else "ok", "self-test", result.problem or text)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
