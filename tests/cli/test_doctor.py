import re
import sys

import pytest

import dipguard
from dipguard.cli.main import main


def _findings(capsys):
    lines = capsys.readouterr().out.splitlines()
    return {
        subject: (state, text) for state, subject, text in (re.split(r"\s{2,}", line, maxsplit=2) for line in lines)
    }


def test_a_sound_installation(capsys, victim):
    assert main(["doctor"]) == 0
    found = _findings(capsys)
    assert found["dipguard"][1].startswith(dipguard.__version__)
    assert found["torch"][0] == "ok"
    assert found["cache"][0] == "ok"
    state, text = found["self-test"]
    assert state == "ok"
    step = float(re.search(r"([\d.]+) ms a step and image", text).group(1))
    assert 0.01 < step < 1000
    assert "victim digits_cnn" in text


def test_without_scikit_learn_the_self_test_takes_another_victim(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("dipguard.cli.doctor.STEPS", 100)
    assert main(["doctor"]) == 0
    assert "victim an untrained network" in _findings(capsys)["self-test"][1]


def test_a_cache_that_cannot_be_written_is_broken(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DIPGUARD_CACHE", str(tmp_path / "file"))
    assert main(["doctor", "--no-self-test"]) == 1
    found = _findings(capsys)
    assert found["cache"][0] == "BROKEN"
    assert "DIPGUARD_CACHE" in found["cache"][1]
    assert "self-test" not in found


@pytest.mark.parametrize(
    ("key", "mode", "runs"), [("", "", "offline"), ("0123abcd", "", "online"), ("0123abcd", "disabled", "disabled")]
)
def test_the_key_is_told_of_and_never_shown(capsys, monkeypatch, key, mode, runs):
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", mode)
    main(["doctor", "--no-self-test"])
    _, text = _findings(capsys)["W&B"]
    assert text.endswith(f"runs are {runs}")
    assert ("is set" in text) == bool(key)
    assert "0123abcd" not in text


def test_a_missing_compiler_is_a_note(capsys, monkeypatch, tmp_path):
    from dipguard.engines.native_build import _library as library

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    library.cache_clear()
    assert main(["doctor", "--no-self-test"]) == 0
    state, text = _findings(capsys)["native engine"]
    library.cache_clear()
    assert state == "note"
    assert "no C++ compiler" in text
