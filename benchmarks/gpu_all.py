"""What a GPU does with dipguard: one table, in minutes, for whatever card is at hand. Started by ``gpu_all.sh``.

    python benchmarks/gpu_all.py [--device cuda] [--budget 420] [--images 256] [--side 224] [--json FILE]

Needs this folder, torch (with Triton), Lightning, torchmetrics and safetensors; no data and no weights: images and
victims are drawn at random, which costs as much. Every part stands alone: one that fails is a row with its error, and a
part is not begun when the time is up. On a CPU, with few images and small sides, it only shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for torch.use_deterministic_algorithms

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a GPU machine may hold this folder without installing it

from benchmarks.conv_forms import Clock
from benchmarks.fit_speed import matmul_rate, plain_step, time_plain, time_stack
from benchmarks.profile_fit import copy_rate
from dipguard import DIPGuard, MirrorGuard
from dipguard.defenses import build_defense
from dipguard.engines.cuda_graph import engine_times
from dipguard.networks import build
from dipguard.victims.base import Normalised
from dipguard.victims.cifar import CifarResNet

ROOT = Path(__file__).resolve().parents[1]
Row = tuple[str, str, str]
"""What was measured, the figure, and what it can be compared with."""
SEEN = {32: (353, 78), 128: (143, 43), 512: (83, 41), 1024: (77, 43)}
"""us an image-step of torch's engine and of the CUDA graph on an H200 (torch 2.11), by stack."""


def ceilings(device: torch.device) -> Iterator[Row]:
    """What the card can do at most."""
    side = 8192 if device.type == "cuda" else 1024
    yield "matrix product, float32", f"{matmul_rate(device, side=side) / 1e12:.2f} TFLOP/s", "H200 46-51"
    yield "copy, read and written", f"{copy_rate(device) / 1e9:.0f} GB/s", "H200 3,900"


def kernels(device: torch.device) -> Iterator[Row]:
    """Whether the Triton kernels agree with torch's operations."""
    program = [sys.executable, str(ROOT / "tests" / "engines" / "triton_cases.py"), device.type]
    # Without a GPU, in Triton's interpreter.
    env = {**os.environ, **({"TRITON_INTERPRET": "1"} if device.type == "cpu" else {})}
    done = subprocess.run(program, capture_output=True, text=True, timeout=150, check=False, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found = json.loads(done.stdout)
    for kind, bound in (("float64", 1e-12), ("float32", 1e-4)):
        cases = {case: differences for case, differences in found.items() if case.startswith(kind)}
        off = {case: d for case, d in cases.items() if not all(v <= bound for v in d)}  # `max` would overlook a NaN
        text = f"off: {off}" if off else f"agree, {max(map(max, cases.values())):.1e} apart at most"
        yield f"Triton's kernels beside torch's, {kind}", text[:300], f"at most {bound:.0e}"


def steps(device: torch.device, *, stacks: list[int]) -> Iterator[Row]:
    """The medium network at 32x32 in the Lightning loop, by engine and stack."""
    plain = time_plain(plain_step("medium", 32, device)[0], device, steps=24)
    yield "plain loop, one image", f"{1e6 * plain:.0f} us a step", "H200 8,523"
    graph = "cuda_graph" if device.type == "cuda" else "native"
    for stack, (number, engine) in product(stacks, enumerate(("torch", graph))):
        start = time.perf_counter()
        each = time_stack("medium", 32, device, engine=engine, stack=stack, steps=40 if device.type == "cuda" else 4)
        seen = SEEN.get(stack, (0, 0))[number]
        yield (
            f"engine {engine}, stack {stack}",
            f"{1e6 * each:.1f} us an image-step, {plain / each:.0f} times the plain loop, "
            f"{time.perf_counter() - start:.1f} s with its start",
            f"H200 {seen}" if seen else "",
        )


def choice(device: torch.device, *, images: int) -> Iterator[Row]:
    """What ``engine=auto`` takes, and what finding out costs."""
    start = time.perf_counter()
    net = build("medium", stack_size=images, padding="zeros").to(device)
    times = engine_times(net, torch.rand(images, 3, 32, 32, device=device))
    text = ", ".join(f"{name} {1000 * seconds:.2f} ms a step" for name, seconds in times.items())
    yield f"auto, {images} images", f"{min(times, key=times.__getitem__)} ({text})", ""
    yield "auto, time to find out", f"{time.perf_counter() - start:.1f} s", "once a machine"


def photographs(device: torch.device, *, side: int) -> Iterator[Row]:
    """One photograph, and four, by the default defence."""
    victim = Normalised(_small_victim(), mean=(0.5,) * 3, std=(0.5,) * 3, size=(side, side)).to(device)
    for count in (1, 4):
        start = time.perf_counter()
        seconds = MirrorGuard(victim, progress=False).defend(_images(count, side, device)).seconds
        text = f"{time.perf_counter() - start:.1f} s ({_parts(seconds)})"
        yield f"mirror, {count} of {side}x{side}", text, "asked: 5 s for one, the choice of kernels aside"


def column(device: torch.device, *, images: int) -> Iterator[Row]:
    """One column of a table: a ResNet-56 behind each of three defences."""
    victim = Normalised(CifarResNet(9), mean=(0.5,) * 3, std=(0.5,) * 3, size=(32, 32)).to(device).eval()
    made: dict[str, Callable[[], Any]] = {
        "paper": lambda: DIPGuard(victim, progress=False),
        "mirror": lambda: MirrorGuard(victim, progress=False),
        "dipdefend": lambda: build_defense("dipdefend", victim, T=1200, progress=False),
    }
    total = 0.0
    for name, make in made.items():
        start = time.perf_counter()
        seconds = make().defend(_images(images, 32, device)).seconds
        total += time.perf_counter() - start
        yield f"{name}, {images} images", f"{time.perf_counter() - start:.1f} s ({_parts(seconds)})", ""
    yield f"a column, {images} images", f"{total:.1f} s", "H200 40; asked: 15"


def same_bits(device: torch.device) -> Iterator[Row]:
    """Whether one seed gives one result, also where torch is told to be deterministic."""
    victim = _small_victim().to(device)
    for strict in (False, True):
        torch.use_deterministic_algorithms(strict)
        try:
            once, again = (MirrorGuard(victim, progress=False).purify(_images(8, 32, device)) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        name = "the same bits twice" + (", deterministic algorithms" if strict else "")
        yield name, "yes" if torch.equal(once, again) else f"no: {float((once - again).abs().max()):.1e} apart", "yes"


def _parts(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())


def _small_victim() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 10))


def _images(count: int, side: int, device: torch.device) -> Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").to(device)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no part is begun")
    parser.add_argument("--images", type=int, default=256, help="of a column")
    parser.add_argument("--side", type=int, default=224, help="of a photograph; one of 512 follows if there is time")
    parser.add_argument("--stacks", type=int, nargs="+", default=list(SEEN))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    device, clock = torch.device(args.device), Clock(args.budget)
    parts: list[tuple[str, Callable[[torch.device], Iterator[Row]]]] = [
        ("ceilings", ceilings),
        ("choice", partial(choice, images=args.images)),
        ("column", partial(column, images=args.images)),
        ("same bits", same_bits),
        ("photographs", partial(photographs, side=args.side)),
        ("kernels", kernels),
        ("steps", partial(steps, stacks=args.stacks)),
        ("larger photographs", partial(photographs, side=512 if args.side == 224 else args.side)),
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    rows: list[Row] = []
    for label, part in parts:
        try:
            for row in part(device) if clock.say(label) else [(label, "not begun: the time was up", "")]:
                rows.append(row)
                print("{:<46} {:<90} {}".format(*row), flush=True)
        except Exception as problem:  # a part that this machine cannot run is a finding, not the end
            rows.append((label, f"failed: {type(problem).__name__}: {problem}"[:300], ""))
            print("{:<46} {}".format(*rows[-1]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if args.json is not None:  # after each part: the time may be up
            args.json.write_text(json.dumps({"card": name, "torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
