"""The command line of ``dipguard purify``, checked: victim and defence are built before anything is written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import nn

from dipguard.classifier import class_names, input_size
from dipguard.cli import LOCK, CommandError, command_errors
from dipguard.cli.pictures import Source, find_pictures
from dipguard.config import names_of
from dipguard.data.image_folder import EXTENSIONS
from dipguard.defenses import Defense, build_defense
from dipguard.defenses.dip import preset_for
from dipguard.registry import lookup, options_of
from dipguard.store import Store
from dipguard.store.keys import numerics, victim_digest
from dipguard.victims import build_victim, check_victim

NO_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")
"""What file managers leave in a folder that is empty to its user."""
MARK = "dipguard.json"
"""The file that marks a folder as ours: the settings of its last run."""
_PAPER_ON_IMAGENET: dict[str, Any] = {"network": "imagenet", "T": 3000}
"""The paper's settings for photographs: appendix B and section 4.1."""
_OF_THE_VICTIM = {"name": "--victim", "weights": "--weights"}
_OF_THE_DEFENSE = {"name": "--defense", "victim": "--victim", "seed": "--seed", "progress": "--no-progress"}
"""Options that have an argument of their own."""
_PIXELS_AT_ONCE, _PIXELS_ON_A_GPU = 64 * 32 * 32, 64 * 224 * 224


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of ``dipguard purify`` that has passed all checks.

    ``settings`` are everything that a result depends on besides the picture, as JSON values; ``batch`` is the number of
    pictures that are purified, and saved, together.
    """

    sources: Sequence[Source]
    out: Path
    store: Store
    victim: nn.Module
    defense: Defense
    settings: dict[str, Any]
    batch: int
    figures: int
    progress: bool

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the victim; empty if unknown."""
        return class_names(self.victim)


def prepare(args: argparse.Namespace) -> Job:
    """Check the whole command line, and build victim and defence; CommandError if something is wrong with it."""
    if find_spec("PIL") is None:
        raise CommandError("pictures need pillow, which is not installed: pip install 'dipguard[vision]'")
    for name, low in (("seed", 0), ("figures", 0), ("batch", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise CommandError(f"--{name} must be at least {low}, got {value}")
    given, out = Path(args.input).expanduser(), Path(args.output).expanduser()
    if not given.exists():
        raise CommandError(f"IN: {given} does not exist")
    beside = ""  # the purified picture, if OUT names it: all else then goes to a folder of the same name
    if out.suffix.lower() == ".png" and given.is_file() and not out.is_dir():
        out, beside = out.with_suffix(""), f"../{out.name}"
    if out.suffix.lower() in EXTENSIONS or (out.exists() and not out.is_dir()):
        raise CommandError(f"OUT must be a folder or, for one picture, a name that ends in .png, got {out}")
    if out.is_dir() and {path.name for path in out.iterdir()} - {LOCK, *NO_FILES} and not (out / MARK).is_file():
        raise CommandError(f"OUT: {out} holds files that this command did not write; take a new or an empty folder")
    sources = find_pictures(given, out, output=beside)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no GPU here; `dipguard doctor` says more")
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    options = parse_options(args.victim_option, argument="--victim-option", own=_OF_THE_VICTIM)
    victim = make_victim(args.victim, weights=args.weights, options=options, device=device)
    size = choose_size(victim, args.size)
    options = parse_options(args.option, argument="--option", own=_OF_THE_DEFENSE)
    defense = make_defense(args.defense, victim, seed=args.seed, options=options, size=size)
    with command_errors(f"--defense {args.defense}: the victim cannot read the pictures that it makes: "):
        check_victim(victim, torch.full((1, 3, *defense.output_size(*size)), 0.5))
    # On a CPU so few that an interrupted run loses minutes only.
    pixels, least = (_PIXELS_ON_A_GPU, 1) if device.type == "cuda" else (_PIXELS_AT_ONCE, torch.get_num_threads())
    batch = max(least, pixels // (size[0] * size[1]))
    return Job(
        sources=sources,
        out=out,
        store=Store(out / ".store"),
        victim=victim,
        defense=defense,
        settings={
            "versions": numerics(),
            "victim": {"name": args.victim, "digest": victim_digest(victim), "options": args.victim_option},
            "device": device.type,
            "defense": defense.settings,
            "size": list(size),
            "resize": args.resize,
            "interpolation": str(getattr(victim, "interpolation", "bilinear")),
        },
        batch=batch if args.batch is None else args.batch,
        figures=args.figures,
        progress=not args.no_progress,
    )


def parse_options(pairs: Sequence[str], *, argument: str, own: Mapping[str, str]) -> dict[str, Any]:
    """Return ``["T=500", "rule=above"]`` as ``{"T": 500, "rule": "above"}``; values are JSON, or YAML's bool or map.

    ``own`` maps options that have an argument of their own to that argument; CommandError for one of them.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if key in own:
            raise CommandError(f"{argument}: {pair!r} has an argument of its own, {own[key]}")
        if not equals or not key or key in options:
            problem = "given twice" if key in options else "not of the form KEY=VALUE"
            raise CommandError(f"{argument}: {pair!r} is {problem}")
        try:
            options[key] = json.loads(text)
        except json.JSONDecodeError:
            options[key] = _from_yaml(text, f"{argument}: {pair!r}")
    return options


def _from_yaml(text: str, where: str) -> Any:
    """What Hydra would make of it too: ``{pad_type: same}``, ``[1, a]``, ``True``, ``null``; all else is a string."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        if text[:1] in "{[":
            raise CommandError(f"{where} is neither JSON nor YAML: {str(error).splitlines()[0]}") from error
        return text
    return value if value is None or isinstance(value, (bool, dict, list)) else text


def make_victim(name: str, *, weights: str | None, options: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Return the victim ``NAME`` or ``NAME:MODEL``; MODEL is its ``arch`` if it has that option, else ``weights``."""
    key, colon, model = name.partition(":")
    given = dict(options)
    with command_errors():
        if colon:
            table = names_of("victim")
            lookup(table, key, argument="--victim")
            by_arch = "arch" in options_of(table[key])
            if ("arch" in given) if by_arch else (weights is not None):
                raise CommandError(f"--victim {name}: the model is given twice")
            if by_arch:
                given["arch"] = model
            else:
                weights = model
        return build_victim(key, weights=weights, **given).to(device)


def choose_size(victim: nn.Module, size: int | None) -> tuple[int, int]:
    """Return height and width of the victim's input, after a test with a grey image."""
    if size is not None and size < 1:
        raise CommandError(f"--size must be at least 1, got {size}")
    own = input_size(victim) if size is None else (size, size)
    if own is None:
        raise CommandError("--size: this victim does not say which size it reads, so it must be given")
    height, width = own
    asked = "--victim" if size is None else "--size"
    with command_errors(f"{asked}: the victim cannot read {height}x{width} pixels: "):
        check_victim(victim, torch.full((1, 3, height, width), 0.5))
    return height, width


def make_defense(
    name: str, victim: nn.Module, *, seed: int, options: Mapping[str, Any], size: tuple[int, int]
) -> Defense:
    """Return the defence for images of ``size``; large images change the defaults of some options."""
    with command_errors():
        table = names_of("defense")
        lookup(table, name, argument="--defense")
        preset = preset_for(size)
        defaults: dict[str, Any] = {"preset": preset, "progress": False}  # the command has a bar of its own
        if (name, preset) == ("paper", "imagenet"):
            defaults |= _PAPER_ON_IMAGENET
        known = options_of(table[name])
        given = {key: value for key, value in defaults.items() if key in known} | dict(options)
        defense = build_defense(name, victim, seed=seed, **given)
        if defense.unavailable is not None:
            raise CommandError(f"--defense {name} cannot run: {defense.unavailable}; give --option weights=PATH")
        defense.output_size(*size)
    return defense
