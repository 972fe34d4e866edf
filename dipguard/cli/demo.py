"""``dipguard demo``: a photograph that scikit-image ships is attacked and defended, and one picture shows it."""

from __future__ import annotations

import argparse
import os
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dipguard.attacks import DefendedVictim, build_attack
from dipguard.classifier import class_names
from dipguard.cli import CommandError, command_errors
from dipguard.cli.job import choose_size, make_defense, make_victim
from dipguard.cli.pictures import read_picture
from dipguard.cli.purify import draw_picture, read_by_victim
from dipguard.defenses import Defense, build_defense
from dipguard.registry import import_extra
from dipguard.reporting.canvas import class_name

EPS_255 = 8


def run(args: argparse.Namespace) -> int:
    """Carry out the command; return its exit code."""
    start, out = time.perf_counter(), Path(args.output).expanduser()
    if out.suffix.lower() != ".png" or out.exists():
        raise CommandError(f"OUT must be a new file whose name ends in .png, got {out}")
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"OUT: no file can be written in {out.parent}")
    with command_errors():
        for library in ("matplotlib", "skimage"):
            import_extra(library, owner="dipguard demo", extra="app")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    victim = make_victim(args.victim, weights=None, options={}, device=device)
    size = choose_size(victim, None)
    guard = make_defense("mirror", victim, seed=0, options={"progress": True}, size=size)
    coffee = Path(str(files("skimage"))) / "data" / "coffee.png"
    print(f"a fit of {guard.steps_per_image} steps: a quarter of a minute on two idle cores, less on a GPU", flush=True)
    attack_and_defend(read_picture(coffee, size=size, resize="crop", interpolation="bicubic"), guard, out)
    print(f"{out} shows it; {time.perf_counter() - start:.0f} s")
    return 0


def attack_and_defend(pixels: Tensor, guard: Defense, out: Path) -> None:
    """Attack a photograph, uint8 [3, H, W], and defend it; print the victim's readings, and draw them as ``out``."""
    victim, clean, readings = guard.victim, pixels[None] / 255, list[str]()
    classes = class_names(victim)

    def read(what: str, images: Tensor) -> int:
        ((decision, confidence),) = read_by_victim(victim, (images * 255).round().to(torch.uint8))
        readings.append(f"{what}: {class_name(decision, classes)} {confidence:.0%}")
        print(readings[-1], flush=True)
        return decision

    label = read("clean", clean)
    undefended = DefendedVictim(victim, build_defense("none", victim))
    attack = build_attack("adaptive_pgd", undefended, eps_255=EPS_255, steps=10)
    attacked = (attack(clean, torch.tensor([label])) * 255).round() / 255
    given = read(f"attacked (PGD, {EPS_255}/255)", attacked)
    made = guard.defend(attacked)
    decisions = given, read("defended", made.reconstructions)
    how: dict[str, Any] = {"trace": made.traces[0], "defense": guard, "label": label, "clean": clean[0]}
    title = "      ".join(readings)
    draw_picture(out, attacked[0], made.reconstructions[0], decisions, classes=classes, title=title, **how)
