"""The commands, their arguments, and their exit codes.

Exit codes: 0 success; 1 some pictures could not be purified, or the installation is broken; 2 the command cannot be
carried out as given, or a file cannot be written; 130 Ctrl-C, 143 SIGTERM, 141 the output was not read to its end. The
Hydra programs end with 1 after any error, as Hydra does.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from dipguard.cli import CommandError, command_errors, exit_codes
from dipguard.registry import import_extra
from dipguard.version import __version__

PROGRAMS = {
    "train": "run one attack and one defence, with pictures",
    "evaluate": "run attacks x defences, and write the tables",
    "sweep": "run `evaluate` for many settings, such as defense.tau=0.5,0.7",
}
"""Commands that are Hydra programs, with their help; all that follows on the command line is Hydra's."""
VICTIM = "efficientnet_lite0"
"""The default victim: its weights come with the extra ``photos``."""
_SEE = "`dipguard list` names them and their options"


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command; return its exit code. ``argv`` are arguments without the program's name."""
    given = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a picture's name may have letters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    args = None if given[:1] and given[0] in (*PROGRAMS, "-sc") else make_parser().parse_args(given)
    with exit_codes("dipguard"):
        try:
            if args is None:
                return _run_program(*given)
            # Imported only now, so that --help does not load torch.
            code: int = import_module(f"dipguard.cli.{args.module}").run(args)
        except BrokenPipeError:
            raise
        except (CommandError, OSError) as error:
            print(f"dipguard: error: {error}", file=sys.stderr)
            return 2
    return code


def _run_program(command: str, *arguments: str) -> int:
    """Run one of `PROGRAMS`, or answer a shell that completes the arguments of one (``-sc``)."""
    with command_errors():
        import_extra("hydra", owner=f"dipguard {command}", extra="app")
    from dipguard.cli.programs import main as run

    if command == "-sc":
        arguments = (command, *arguments)
        command, space, rest = os.environ.get("COMP_LINE", "").partition(" ")[2].partition(" ")
        if command and not (space and command in PROGRAMS):
            print(*PROGRAMS)
            return 0
        os.environ["COMP_LINE"] = f"dipguard {rest}"
    # Hydra refuses --multirun beside the flags that only show the config, or complete a command line.
    shows = any(argument.split("=")[0] in ("--cfg", "-c", "--info", "-i", "-sc") for argument in arguments)
    flags = ["--multirun"] * (command == "sweep" and not shows)
    sys.path.insert(0, os.getcwd())  # a `_target_` may be in the current folder
    run("train" if command == "train" else "evaluate", [*flags, *arguments])
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="dipguard", description="Deep-image-prior purification of adversarial pictures, for any classifier."
    )
    parser.add_argument("--version", action="version", version=f"dipguard {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_purify(commands)
    demo = commands.add_parser("demo", help="attack and defend a photograph, and draw it")
    demo.add_argument("output", metavar="OUT", nargs="?", default="demo.png", help="a new PNG file (demo.png)")
    demo.set_defaults(module="demo", victim=VICTIM)
    doctor = commands.add_parser("doctor", help="check the installation, with a short self-test")
    doctor.add_argument("--no-self-test", action="store_true", help="leave out the fit")
    doctor.set_defaults(module="doctor")
    collect = commands.add_parser("collect", help="write the report of a sweep, finished or not")
    collect.add_argument("folder", metavar="FOLDER", nargs="+", help="a sweep's folder, such as outputs/sweeps/smoke")
    collect.set_defaults(module="collect")
    listing = commands.add_parser("list", help="name the victims and the defences, with their options")
    listing.set_defaults(module="listing")
    for name, what in PROGRAMS.items():
        commands.add_parser(name, help=f"{what} (its own --help)")
    return parser


def _add_purify(commands: Any) -> None:
    purify = commands.add_parser(
        "purify",
        help="purify a picture or a folder of pictures",
        description="Purify pictures: OUT gets a PNG for each, figures/ and the table decisions.csv. The same "
        "command, given again, resumes where it was stopped.",
    )
    purify.set_defaults(module="purify")
    purify.add_argument("input", metavar="IN", help="a picture, or a folder that is searched for pictures")
    folder = "a folder: new, empty, or of an earlier run; for one picture also NAME.png, beside the folder NAME"
    purify.add_argument("output", metavar="OUT", help=folder)
    which = purify.add_argument_group("victim and defence")
    which.add_argument("--victim", default=VICTIM, metavar="NAME[:MODEL]", help=f"default: {VICTIM}; {_SEE}")
    which.add_argument("--weights", metavar="PATH", help="the victim's weights; by default its own")
    which.add_argument("--defense", default="mirror", metavar="NAME", help=f"default: mirror; {_SEE}")
    for option, what in (("--option", "defence, such as T=500"), ("--victim-option", "victim, such as num_classes=10")):
        pairs = {"nargs": "+", "action": "extend", "default": [], "metavar": "KEY=VALUE"}
        which.add_argument(option, help=f"options of the {what}", **pairs)
    pictures = purify.add_argument_group("pictures")
    pictures.add_argument("--size", type=int, metavar="N", help="side of the square, pixels; default: the victim's")
    resize = "keep the shape and cut out the middle (crop), or keep all of it and change the shape (stretch)"
    pictures.add_argument("--resize", choices=("crop", "stretch"), default="crop", help=resize)
    pictures.add_argument("--figures", type=int, default=8, metavar="N", help="draw figures of the first N (8)")
    work = purify.add_argument_group("work")
    work.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random draws (0)")
    work.add_argument("--batch", type=int, metavar="N", help="pictures that are purified, and saved, together")
    work.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    work.add_argument("--no-progress", action="store_true", help="no progress bar")
