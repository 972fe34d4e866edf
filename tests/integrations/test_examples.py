"""The Lightning example, run as its reader runs it."""

import ast
import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "lightning_project.py"
QUICK = ["--steps", "8", "--epochs", "1"]


@pytest.mark.slow
def test_the_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("pytorch_lightning").level
    try:
        found = runpy.run_path(str(EXAMPLE))["main"]([*QUICK, "--images", "3"])
    finally:
        logging.getLogger("pytorch_lightning").setLevel(level)
    assert set(found) == {"test_accuracy", "test_accuracy_defended", "test_accuracy_undefended", "module"}
    assert found["test_accuracy"] == found["test_accuracy_defended"]
    assert all(0 <= value <= 1 for value in found.values())
    shown = capsys.readouterr().out
    told = re.findall(r"^(callback|classifier|module): ", shown, flags=re.MULTILINE)
    assert told == ["callback", "classifier", "module"]


def test_the_project_itself_knows_nothing_of_dipguard() -> None:
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    project = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert [node.name for node in project] == ["Digits", "Classifier"]
    assert not any("dipguard" in ast.unparse(node).lower() or "Purify" in ast.unparse(node) for node in project)


@pytest.mark.slow
def test_two_processes_started_by_lightning_itself() -> None:
    """Plain DDP: Lightning starts the script a second time; training, callback and defended module run in both."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), *QUICK, "--images", "3", "--devices", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("callback: ") == 1
    assert "accuracy_defended" in done.stdout
