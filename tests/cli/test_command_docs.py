"""The commands in docs/command.md parse, and name victims, defences and options that exist."""

import shlex
from pathlib import Path

import pytest

from dipguard.cli.job import _OF_THE_DEFENSE, parse_options
from dipguard.cli.main import make_parser
from dipguard.defenses import DEFENSES
from dipguard.registry import check_options, lookup
from dipguard.victims import VICTIMS
from tests.docs_blocks import blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "command.md"
LINES = [line for block in blocks(PAGE) if block.language == "sh" for line in block.code.splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if " -m dipguard " in line])
def test_lines_of_the_command(line):
    args = make_parser().parse_args(shlex.split(line)[3:])
    if "purify" not in line:
        return
    assert args.victim.partition(":")[0] in VICTIMS
    options = parse_options(args.option, argument="--option", own=_OF_THE_DEFENSE)
    check_options(lookup(DEFENSES, args.defense, argument="defense"), options, owner=args.defense)


def test_every_option_of_purify_stands_in_its_help_and_the_usual_ones_in_the_page():
    parsed, text = vars(make_parser().parse_args(["purify", "a", "b"])), PAGE.read_text(encoding="utf-8")
    for name in ("weights", "defense", "option", "victim_option", "size", "resize", "figures", "seed", "batch"):
        assert name in parsed
        assert f"--{name.replace('_', '-')}" in text
