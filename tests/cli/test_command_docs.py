"""The commands in docs/command.md parse, and name victims, defences and options that exist."""

import re
import shlex
from pathlib import Path

import pytest

from dipguard.cli.job import parse_options
from dipguard.cli.main import make_parser
from dipguard.defenses import DEFENSES
from dipguard.registry import check_options, lookup
from dipguard.victims import VICTIMS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if " -m dipguard " in line])
def test_lines_of_the_command(line):
    args = make_parser().parse_args(shlex.split(line)[3:])
    if "purify" not in line:
        return
    assert args.victim.partition(":")[0] in VICTIMS
    options = parse_options(args.option, argument="--option")
    check_options(lookup(DEFENSES, args.defense, argument="defense"), options, owner=args.defense)


def test_every_option_of_purify_stands_in_its_help_and_the_usual_ones_in_the_page():
    parser = make_parser()
    parsed = vars(parser.parse_args(["purify", "a", "b", "--victim", "digits_cnn"]))
    for name in ("weights", "defense", "option", "victim_option", "size", "resize", "figures", "seed", "batch"):
        assert name in parsed
        assert f"--{name.replace('_', '-')}" in TEXT
