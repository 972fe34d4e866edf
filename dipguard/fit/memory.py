"""Memory of a fit: what it needs, what is free, keeping freed blocks, and telling that it has run out."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dipguard.engines import TorchEngine
from dipguard.engines.native_plan import make_plan
from dipguard.fit.module import StackedDIP
from dipguard.fit.options import FitOptions

OURS = 0.5
"""Share of the free memory that a fit may take: the victim and other programs need some too."""
COPIES = 4  # weights, their gradient, and Adam's two moments
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's numbers for them
KEEP = 2**31 - 1
# What the C library's own adaptation arrives at, at most, in a program that handles large blocks.
ADAPTED_MMAP, ADAPTED_TRIM = 32 * 2**20, 64 * 2**20


@contextmanager
def kept_memory(device: torch.device) -> Iterator[bool]:
    """Let the C library hold on to freed blocks while a fit runs on the CPU; give them back at the end.

    A step of 32 images allocates and frees some hundred megabytes in blocks of a few. The C library hands such blocks
    back to the system at once, which then maps and clears every page anew: some 10,000 page faults a step, a tenth to
    a fifth of the fit's time (benchmarks/README.md). Only glibc has the switch; elsewhere, and on a GPU, nothing is
    done. The switch is the whole process's; afterwards it stands where glibc's own adaptation would have put it.

    Yields:
        Whether memory is kept.
    """
    libc = _glibc(device)
    if libc is None:
        yield False
        return
    libc.mallopt(M_MMAP_THRESHOLD, KEEP)
    libc.mallopt(M_TRIM_THRESHOLD, KEEP)
    try:
        yield True
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, ADAPTED_MMAP)
        libc.mallopt(M_TRIM_THRESHOLD, ADAPTED_TRIM)
        libc.malloc_trim(0)


def trim(device: torch.device) -> None:
    """Return the blocks that a CPU fit has freed to the system, if the C library can."""
    libc = _glibc(device)
    if libc is not None:
        libc.malloc_trim(0)


TOLD = (
    "DefaultCPUAllocator",  # torch's on a CPU
    "could not create a primitive",  # oneDNN's convolutions
    "not enough memory",
    "Cannot allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What errors of other types than torch.OutOfMemoryError say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in TOLD)


def free(device: torch.device) -> None:
    """Return unused memory. A Trainer and its module refer to each other, so the garbage collector must run."""
    gc.collect()
    trim(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def images_in_memory(
    size: tuple[int, int], *, fit: FitOptions, kept: int, engine: str, device: torch.device
) -> int | None:
    """Images of ``size`` (H, W) that can be fitted at once, at least 1; None if the free memory is not known.

    The other arguments are those of :func:`memory_need`.
    """
    free = free_memory(device)
    if free is None:
        return None
    shared, each = memory_need(size, fit=fit, kept=kept, engine=engine)
    return max(1, int(OURS * free - shared) // each)


def memory_need(size: tuple[int, int], *, fit: FitOptions, kept: int, engine: str) -> tuple[int, int]:
    """Bytes that a fit needs whatever the number of images, and bytes that each image needs.

    An image needs its weights with their gradient and Adam's moments, its activations with the torch engine (with the
    native engine, each thread needs a workspace instead), and the images that are kept.

    Args:
        size: Height and width, pixels.
        fit: How the images are fitted.
        kept: Images that are kept in memory for each image.
        engine: Name of the engine.
    """
    image = torch.full((1, 3, *size), 0.5)
    module = StackedDIP(image, options=fit)
    bytes_of = module.given.element_size()
    if engine == "native":
        plan = make_plan(module.net.spec, padding=fit.padding, height=size[0], width=size[1])
        shared = torch.get_num_threads() * plan.room * bytes_of
        each = COPIES * plan.parameters * bytes_of
    else:
        shared = 0
        each = COPIES * module.net.parameters_per_image() * bytes_of + _activations(module)
    # Besides those kept: x0, x and what SSIM makes of them; z, and its jitter for eight steps.
    images = kept + 20 + 10 * module.z.shape[1] // 3
    return shared, each + images * image.numel() * bytes_of


def _activations(module: StackedDIP) -> int:
    """Bytes at the peak of one image's step: what is kept for the backward pass (measured), and as much again."""
    engine = TorchEngine(module.net, module.given)
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step = engine.step(module.z)
    assert step.loss.requires_grad  # held until here, so that no storage was freed and counted twice
    return 2 * sum(kept.values())


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, or on this machine for this program; None if not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    found = [value for value in (available_memory(), *cgroup_memory()) if value is not None]
    return max(0, min(found)) if found else None


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that Linux reports as available without swapping; None on other systems."""
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def cgroup_memory(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that each limit on this program's control group (of a container or a batch job) leaves.

    Cached files that could be dropped count as free.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        old = "memory" in controllers.split(",")  # version 1: a tree for each controller
        if controllers and not old:
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if old else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
        here = mount / group.lstrip("/")
        # Every group around ours has a limit too. Inside a container ours may not be visible under its own name.
        for folder in {mount, here, *(p for p in here.parents if p.is_relative_to(mount))}:
            limit, usage = (next(_lines(folder / name), "") for name in names)
            if limit.isdigit() and usage.isdigit():
                droppable = (v for k, v in map(str.split, _lines(folder / "memory.stat")) if k == "inactive_file")
                yield int(limit) - int(usage) + int(next(droppable, 0))


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return


def _glibc(device: torch.device) -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
