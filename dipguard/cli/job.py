"""What ``dipguard purify`` was asked to do, checked before anything is written."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dipguard.cli.choices import choose_device, choose_size, make_defense, make_victim, parse_options
from dipguard.cli.errors import CommandError, at_the_door
from dipguard.cli.pictures import Source, find_pictures
from dipguard.data.image_folder import EXTENSIONS
from dipguard.defenses import DIPGuard, Purifier
from dipguard.defenses.mirror_guard import MirrorGuard
from dipguard.defenses.mirror_stacks import MirrorStacks
from dipguard.files import tensor_digest
from dipguard.version import __version__
from dipguard.victims import check_victim

MARK = "dipguard.json"
"""The file that says that a folder is ours: the settings of its last run."""
_PIXELS_AT_ONCE = 64 * 32 * 32


@dataclass(frozen=True)
class Job:
    """A run of ``dipguard purify`` that has passed every check.

    Attributes:
        sources: The given pictures.
        out: The folder for the results.
        victim: The classifier, on its device.
        classes: Its classes' names; empty where they have none.
        defense: The defence.
        size: Height and width to which pictures are brought, pixels.
        resize: ``crop`` or ``stretch``.
        interpolation: How they are resized.
        settings: All that a result depends on besides the picture, as JSON can hold it.
        batch: Pictures purified, and saved, together; None leaves it to the defence.
        figures: How many decision traces are to be drawn.
        redo: Whether finished pictures are done again.
        progress: Whether a bar is shown.
    """

    sources: Sequence[Source]
    out: Path
    victim: nn.Module
    classes: tuple[str, ...]
    defense: Purifier
    size: tuple[int, int]
    resize: str
    interpolation: str
    settings: dict[str, Any]
    batch: int | None
    figures: int
    redo: bool
    progress: bool

    @property
    def guard(self) -> DIPGuard | MirrorStacks | None:
        """The guard inside the defence, which leaves decision traces; None for another defence."""
        if isinstance(self.defense, MirrorGuard):
            return MirrorStacks(self.defense)
        guard = getattr(self.defense, "guard", None)
        return guard if isinstance(guard, DIPGuard) else None

    def key(self, pixels: str) -> str:
        """What a result is known by: changes with the settings and the digest of the picture's ``pixels``."""
        text = json.dumps([self.settings, pixels], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare(args: argparse.Namespace) -> Job:
    """Check all of the command line, and build victim and defence.

    Raises:
        CommandError: Something is not as it must be.
    """
    if find_spec("PIL") is None:
        raise CommandError("pictures need pillow, which is not installed: pip install 'dipguard[vision]'")
    for name, low in (("seed", 0), ("figures", 0), ("batch", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise CommandError(f"--{name} must be at least {low}, got {value}")
    given, out = Path(args.input).expanduser(), Path(args.output).expanduser()
    check_out(out)
    sources = find_pictures(given, out)
    device = choose_device(args.device)
    options = parse_options(args.victim_option, argument="--victim-option")
    victim = make_victim(args.victim, weights=args.weights, options=options, device=device)
    size = choose_size(victim, args.size)
    options = parse_options(args.option, argument="--option")
    progress = not args.no_progress
    defense = make_defense(args.defense, victim, seed=args.seed, options=options, size=size, progress=progress)
    with at_the_door(f"--defense {args.defense}: the victim cannot read the pictures that it makes: "):
        check_victim(victim, torch.full((1, 3, *defense.output_size(*size)), 0.5))
    interpolation = str(getattr(victim, "interpolation", "bilinear"))
    return Job(
        sources=sources,
        out=out,
        victim=victim,
        classes=tuple(getattr(victim, "classes", ())),
        defense=defense,
        size=size,
        resize=args.resize,
        interpolation=interpolation,
        settings={
            "dipguard": __version__,
            "victim": {"name": args.victim, "weights": tensor_digest(victim.state_dict().values())},
            "defense": defense.settings,
            "size": list(size),
            "resize": args.resize,
            "interpolation": interpolation,
            "seed": args.seed,
        },
        batch=default_batch(size, device) if args.batch is None else args.batch,
        figures=args.figures,
        redo=args.redo,
        progress=progress,
    )


def check_out(out: Path) -> None:
    """Refuse a file, and a folder that holds what this command did not write.

    Raises:
        CommandError: As said.
    """
    if out.suffix.lower() in EXTENSIONS or (out.exists() and not out.is_dir()):
        raise CommandError(f"OUT must be a folder, got {out}")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise CommandError(f"OUT: {out} holds files that this command did not write; take a new or an empty folder")


def default_batch(size: tuple[int, int], device: torch.device) -> int | None:
    """Pictures at once: on a CPU few enough that a stopped run loses minutes; on a GPU the defence knows better."""
    if device.type == "cuda":
        return None
    return max(torch.get_num_threads(), _PIXELS_AT_ONCE // (size[0] * size[1]))
