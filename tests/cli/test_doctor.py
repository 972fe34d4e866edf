import re
from importlib.metadata import metadata
from urllib.parse import urlsplit

import pytest

import dipguard
from dipguard.cli import doctor
from dipguard.cli.main import main


def _findings(capsys):
    lines = capsys.readouterr().out.splitlines()
    return {
        subject: (state, text) for state, subject, text in (re.split(r"\s{2,}", line, maxsplit=2) for line in lines)
    }


@pytest.mark.slow
def test_a_sound_installation(capsys):
    assert main(["doctor"]) == 0
    found = _findings(capsys)
    assert found["dipguard"][1].startswith(dipguard.__version__)
    assert found["libraries"][0] == "ok"
    assert "torch 2" in found["libraries"][1]
    assert found["cache"][0] == "ok"
    state, text = found["self-test"]
    assert state == "ok"
    step = float(re.search(r"([\d.]+) ms a step and image", text).group(1))
    assert 0.01 < step < 1000


def test_extras_are_those_of_the_package(capsys):
    main(["doctor", "--no-self-test"])
    extras = set(metadata("dipguard").get_all("Provides-Extra")) - {"dev"}
    assert {subject.strip("[]") for subject in _findings(capsys) if subject.startswith("[")} == extras


def test_a_cache_that_cannot_be_written_is_broken(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DIPGUARD_CACHE", str(tmp_path / "file"))
    assert main(["doctor", "--no-self-test"]) == 1
    found = _findings(capsys)
    assert found["cache"][0] == "BROKEN"
    assert "DIPGUARD_CACHE" in found["cache"][1]
    assert "self-test" not in found


@pytest.mark.parametrize(
    ("key", "mode", "login", "runs"),
    [
        ("", "", False, "offline"),
        ("", "", True, "online"),
        ("0123abcd", "", False, "online"),
        ("0123abcd", "disabled", False, "disabled"),
    ],
)
def test_what_wandb_would_do_is_told_and_the_key_never_shown(capsys, monkeypatch, tmp_path, key, mode, login, runs):
    wandb = pytest.importorskip("wandb")
    server = urlsplit(wandb.Settings().base_url).hostname
    (tmp_path / "netrc").write_text(f"machine {server} login user password 0123abcd\n" if login else "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", mode)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # so that it reads the environment again
    assert [text.partition(",")[0] for _, _, text in doctor.wandb()] == [f"runs are {runs}"]
    assert "0123abcd" not in str(list(doctor.wandb()))
    wandb.teardown()


def test_a_missing_compiler_is_a_note(capsys, monkeypatch, tmp_path):
    from dipguard.engines.native_build import _library

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    _library.cache_clear()
    assert main(["doctor", "--no-self-test"]) == 0
    state, text = _findings(capsys)["native engine"]
    _library.cache_clear()
    assert state == "note"
    assert "no C++ compiler" in text
