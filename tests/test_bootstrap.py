"""The script that sets up the environment; setting one up is CI's own beginning."""

import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.tiny_run import ROOT


def command(place: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, str(ROOT / "bootstrap.py"), *arguments], {**os.environ, "DIPGUARD_VENV": str(place)}


@pytest.mark.parametrize("name", ["", "thesis.tex"])
def test_a_folder_of_other_files_and_a_file_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    arguments, environment = command(tmp_path / name, "-V")
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, [path.name for path in tmp_path.iterdir()]) == (2, ["thesis.tex"])
    assert f"{tmp_path / name} must be an environment or an empty folder" in done.stderr


def test_a_python_without_pip_is_told_what_is_missing(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    (_, *rest), environment = command(tmp_path / "new", "-V")
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = subprocess.run([str(python), *rest], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{python} needs pip 22.3 or newer" in done.stderr
    assert "found none" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_program(tmp_path: Path, sent: signal.Signals) -> None:
    """In an environment that is up to date, as its stamp says."""
    place = tmp_path / "venv"
    (place / "bin").mkdir(parents=True)
    (place / "pyvenv.cfg").touch()
    (place / "bin" / "python").symlink_to(sys.executable)
    stamp = "import bootstrap; bootstrap.STAMP.write_text(bootstrap.fingerprint())"
    arguments, environment = command(place, "-c", "import time\nprint('began', flush=True)\ntime.sleep(60)")
    subprocess.run([sys.executable, "-c", stamp], env=environment, cwd=ROOT, check=True)
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "began\n"
        run.send_signal(sent)
        _, errors = run.communicate(timeout=20)
    assert run.returncode in (-sent, 1)
    assert ("KeyboardInterrupt" in errors) == (sent is signal.SIGINT)
