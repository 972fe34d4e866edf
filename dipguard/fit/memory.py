"""Memory of a fit: what it needs, and what is free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dipguard.engines import TorchEngine
from dipguard.engines.native_plan import make_plan
from dipguard.fit.module import StackedDIP
from dipguard.fit.options import FitOptions

COPIES = 4  # weights, their gradient, and Adam's two moments


def memory_need(size: tuple[int, int], *, fit: FitOptions, kept: int, engine: str) -> tuple[int, int]:
    """Bytes that a fit needs whatever the number of images, and bytes that each image of ``size`` (H, W) needs.

    An image needs its weights with their gradient and Adam's moments, its activations with the torch engine (with the
    native engine, each thread needs a workspace instead), and the images that are kept: ``kept`` for each.
    """
    image = torch.full((1, 3, *size), 0.5, dtype=torch.float32, device="cpu")
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
    """Bytes that each limit on this program's control group leaves; cached files that could be dropped are free."""
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
