"""``dipguard doctor``: what is installed, what can be used, and whether a short fit works."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dipguard.version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn

CORE = ("torch", "pytorch-lightning", "torchmetrics", "numpy", "safetensors", "tqdm")
OPTIONAL = {
    "vision": ("torchvision", "pillow"),
    "defenses": ("scipy", "scikit-image", "pywavelets"),
    "attacks": ("torchattacks", "foolbox"),
    "app": ("hydra-core", "omegaconf", "matplotlib", "scikit-learn", "tensorboard", "wandb"),
    "timm": ("timm",),
    "huggingface": ("transformers",),
    "art": ("adversarial-robustness-toolbox",),
}
"""Distributions by the extra of dipguard that brings them."""
IMAGES, STEPS = 4, 200
"""Size of the self-test."""
Finding = tuple[str, str, str]
"""``ok``, ``note`` (something optional is missing) or ``BROKEN``; the subject; what was found."""


def run(args: argparse.Namespace) -> int:
    """Print all findings; return 1 if something essential is broken, 0 otherwise."""
    checks = [versions, pair_of_builds, device, compiler, caches, optional_libraries, wandb]
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


def versions() -> Iterator[Finding]:
    """Versions of dipguard, Python and the required libraries."""
    yield "ok", "dipguard", f"{__version__}, {Path(__file__).parents[1]}"
    yield "ok", "python", f"{platform.python_version()}, {platform.platform()}"
    for name in CORE:
        found = _version(name)
        yield "ok" if found else "BROKEN", name, found or "not installed"


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
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU, or no driver"
        yield "note", "gpu", f"none ({why})"
    yield "ok", "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} at once"


def compiler() -> Iterator[Finding]:
    """Whether the native engine can be built with the C++ compiler."""
    from dipguard.engines.native_build import BuildError, library
    from dipguard.engines.native_build import compiler as find_compiler

    start = time.perf_counter()
    try:
        library("float32")
        yield "ok", "native engine", f"{find_compiler()}, ready in {time.perf_counter() - start:.1f} s"
    except BuildError as error:
        yield "note", "native engine", f"{error}; torch takes its place on a CPU, 2 to 3 times slower"


def caches() -> Iterator[Finding]:
    """Folders for downloads, trained victims and compiled code."""
    import torch

    from dipguard.cache import cache_folder

    folder = cache_folder()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    usable = parent.is_dir() and os.access(parent, os.W_OK)
    text = f"{folder}, {size / 2**20:.1f} MiB" + ("" if usable else "; cannot be written: set DIPGUARD_CACHE")
    yield "ok" if usable else "BROKEN", "cache", text
    yield "ok", "torch's cache", torch.hub.get_dir()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    yield "ok", "the hub's cache", str(home)


def optional_libraries() -> Iterator[Finding]:
    """Libraries of the extras."""
    for extra, names in OPTIONAL.items():
        found = {name: _version(name) for name in names}
        text = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
        yield "ok" if all(found.values()) else "note", f"[{extra}]", text


def wandb() -> Iterator[Finding]:
    """How a run with ``logger=wandb`` would log; the key itself is never shown."""
    if _version("wandb") is not None:
        mode, key = os.environ.get("WANDB_MODE"), os.environ.get("WANDB_API_KEY")
        text = f"WANDB_API_KEY is {'set' if key else 'not set'}, WANDB_MODE is {mode or 'not set'}"
        yield "ok", "W&B", f"{text}: runs are {mode or ('online' if key else 'offline')}"


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
    if not rise >= 0.1:
        yield "BROKEN", "self-test", f"the fit did not approach its images (SSIM rose by {rise:.3f} in {STEPS} steps)"
        return
    milliseconds = 1000 * result.seconds["fit"] / (STEPS * IMAGES)
    yield (
        "ok",
        "self-test",
        f"{IMAGES} images, {STEPS} steps on {device}, victim {name}: {milliseconds:.2f} ms a step and image, "
        f"SSIM +{rise:.2f}, {time.perf_counter() - start:.1f} s",
    )


def _victim_and_images() -> tuple[nn.Module, Tensor, str]:
    import torch

    from dipguard.data import load_data
    from dipguard.victims import build_victim

    if find_spec("sklearn") is not None:
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
