"""``dipguard doctor``: what is installed, what can be used, and whether a short fit works."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dipguard.version import __version__

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

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
IMAGES, STEPS = 4, 200
"""Size of the self-test."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: ``ok``, ``note`` (something optional is missing) or ``BROKEN`` (something essential is).
        subject: What it is about.
        text: What was found.
    """

    state: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:6}  {self.subject:17}  {self.text}"


def run(args: argparse.Namespace) -> int:
    """Print all findings; return 1 if something essential is broken, 0 otherwise."""
    checks = [versions, pair_of_builds, device, compiler, caches, optional_libraries, wandb]
    if not args.no_self_test:
        checks.append(self_test)
    broken = 0
    for check in checks:
        for finding in _guarded(check):
            broken += finding.state == "BROKEN"
            print(finding, flush=True)
    print("something essential is broken" if broken else "all is well", file=sys.stderr)
    return 1 if broken else 0


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    # Any error is a finding: the other checks must still run.
    try:
        yield from check()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        yield Finding("BROKEN", check.__name__.replace("_", " "), f"{type(error).__name__}: {lines[0]}")


def versions() -> Iterator[Finding]:
    """Versions of dipguard, Python and the required libraries."""
    yield Finding("ok", "dipguard", f"{__version__}, {Path(__file__).parents[1]}")
    yield Finding("ok", "python", f"{platform.python_version()}, {platform.platform()}")
    for name in CORE:
        found = _version(name)
        yield Finding("ok" if found else "BROKEN", name, found or "not installed")


def pair_of_builds() -> Iterator[Finding]:
    """Whether torch and torchvision are of the same build; if not, torchvision cannot be imported."""
    if _version("torchvision") is None:
        return
    import_module("torchvision")
    yield Finding("ok", "torch's pair", f"torchvision {_version('torchvision')} is of the same build")


def device() -> Iterator[Finding]:
    """GPUs, and threads of the CPU."""
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
    """Whether the native engine can be built with the C++ compiler."""
    from dipguard.engines.native_build import BuildError, library
    from dipguard.engines.native_build import compiler as find_compiler

    start = time.perf_counter()
    try:
        library("float32")
        yield Finding("ok", "native engine", f"{find_compiler()}, ready in {time.perf_counter() - start:.1f} s")
    except BuildError as error:
        yield Finding("note", "native engine", f"{error}; torch takes its place on a CPU, 2 to 3 times slower")


def caches() -> Iterator[Finding]:
    """Folders for downloads, trained victims and compiled code."""
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
    """Libraries of the extras."""
    for extra, names in OPTIONAL.items():
        found = {name: _version(name) for name in names}
        text = ", ".join(f"{name} {number}" if number else f"{name} missing" for name, number in found.items())
        yield Finding("ok" if all(found.values()) else "note", f"[{extra}]", text)


def wandb() -> Iterator[Finding]:
    """How a run with ``logger=wandb`` would log; the key itself is never shown."""
    if _version("wandb") is None:
        return
    mode, key = os.environ.get("WANDB_MODE"), "set" if os.environ.get("WANDB_API_KEY") else "not set"
    effect = mode or ("online" if key == "set" else "offline")
    yield Finding("ok", "W&B", f"WANDB_API_KEY is {key}, WANDB_MODE is {mode or 'not set'}: runs are {effect}")


def self_test() -> Iterator[Finding]:
    """A short fit of four digits: whether it approaches its images, and the time of one step of one image."""
    import torch

    from dipguard.defenses import DIPGuard

    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    victim, images, name = _victim_and_images()
    guard = DIPGuard(victim.to(device), T=STEPS, decisions=20, seed=0, stack_size=IMAGES, progress=False)
    result = guard.defend(images)
    if not bool(torch.isfinite(result.reconstructions).all()):
        raise ArithmeticError("the reconstructions hold NaN or infinite values")
    first, last = (torch.stack([trace.quality[at] for trace in result.traces]).mean() for at in (0, -1))
    rise = float(last - first)
    if not math.isfinite(rise) or rise < 0.1:
        text = f"the fit did not approach its images (SSIM rose by {rise:.3f} in {STEPS} steps)"
        yield Finding("BROKEN", "self-test", text)
        return
    engine, milliseconds = _engine(device), 1000 * result.seconds["fit"] / (STEPS * IMAGES)
    yield Finding(
        "ok",
        "self-test",
        f"{IMAGES} images, {STEPS} steps, {engine} engine on {device}, victim {name}: {milliseconds:.2f} ms a step and "
        f"image, SSIM +{rise:.2f}, {time.perf_counter() - start:.1f} s",
    )


def _engine(device: torch.device) -> str:
    from dipguard.engines.native_build import BuildError, library

    if device.type != "cpu":
        return "torch"
    try:
        library("float32")
    except BuildError:
        return "torch"
    return "native"


def _victim_and_images() -> tuple[nn.Module, Tensor, str]:
    import torch

    from dipguard.victims import build_victim

    if find_spec("sklearn") is not None:
        from dipguard.data import load_data

        return build_victim("digits_cnn", progress=False), load_data("digits", limit=IMAGES).images, "digits_cnn"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.nn.functional.interpolate(torch.rand(IMAGES, 3, 4, 4), size=(32, 32), mode="bilinear")
        victim = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    return victim, images, "an untrained network"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
