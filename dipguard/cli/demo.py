"""``dipguard demo``: a photograph that scikit-image ships is attacked and defended, and one picture shows it."""

from __future__ import annotations

import argparse
import time
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dipguard.attacks import DefendedVictim, build_attack
from dipguard.cli import CommandError, command_errors
from dipguard.cli.job import choose_size, make_defense, make_victim
from dipguard.cli.pictures import read_picture
from dipguard.cli.purify import read_by_victim
from dipguard.defenses import Defense, build_defense
from dipguard.registry import import_extra
from dipguard.reporting.canvas import class_name, save_figure
from dipguard.reporting.trace_figure import draw_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPS_255 = 8


def run(args: argparse.Namespace) -> int:
    """Carry out the command; return its exit code."""
    start, out = time.perf_counter(), Path(args.output).expanduser()
    if out.suffix.lower() != ".png" or out.exists():
        raise CommandError(f"OUT must be a new file whose name ends in .png, got {out}")
    with command_errors():
        for library in ("matplotlib", "skimage"):
            import_extra(library, owner="dipguard demo", extra="app")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    victim = make_victim("efficientnet_lite0", weights=None, options={}, device=device)
    size = choose_size(victim, None)
    guard = make_defense("mirror", victim, seed=0, options={"progress": True}, size=size)
    coffee = Path(str(files("skimage"))) / "data" / "coffee.png"
    pixels = read_picture(coffee, size=size, resize="crop", interpolation=str(victim.interpolation))
    print(f"a fit of {guard.steps_per_image} steps: two minutes on two cores, seconds on a GPU", flush=True)
    save_figure(attack_and_defend(pixels, guard), out)
    print(f"{out} shows it; {time.perf_counter() - start:.0f} s")
    return 0


def attack_and_defend(pixels: Tensor, guard: Defense) -> Figure:
    """Attack a photograph, uint8 [3, H, W], and defend it; print what the victim reads, and draw the decision trace."""
    victim, clean = guard.victim, pixels[None] / 255
    name_of = partial(class_name, classes=tuple(getattr(victim, "classes", ())))
    readings = list[str]()

    def read(what: str, images: Tensor) -> int:
        ((decision, confidence),) = read_by_victim(victim, (images * 255).round().to(torch.uint8))
        readings.append(f"{what}: {name_of(decision)} {confidence:.0%}")
        print(readings[-1], flush=True)
        return decision

    label = read("clean", clean)
    undefended = DefendedVictim(victim, build_defense("none", victim))
    attack = build_attack("adaptive_pgd", undefended, eps_255=EPS_255, steps=10)
    attacked = (attack(clean, torch.tensor([label])) * 255).round() / 255
    read(f"attacked (PGD, {EPS_255}/255)", attacked)
    made = guard.defend(attacked)
    decision = read("defended", made.reconstructions)
    how = {"decision": decision, "label": label, "clean": clean[0]}
    figure = draw_trace(made.traces[0], guard.rebuild(made.traces[0]), name_of=name_of, **how)
    figure.suptitle("      ".join(readings), fontsize=12, fontweight="bold")
    return figure
