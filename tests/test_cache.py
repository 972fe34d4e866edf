from pathlib import Path

import pytest

from dipguard.cache import cache_folder


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        ("/one", "/two", "/one/victims"),
        (None, "/two", "/two/dipguard/victims"),
        ("", "", "/home/someone/.cache/dipguard/victims"),
        ("~/kept", None, "/home/someone/kept/victims"),
    ],
)
def test_the_first_that_is_set_counts(monkeypatch, own, xdg, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in (("DIPGUARD_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder("victims") == Path(expected)


def test_asking_creates_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("DIPGUARD_CACHE", str(tmp_path / "cache"))
    cache_folder("victims")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("own", ["", "~/kept"])
def test_without_a_home_folder_nothing_can_be_written(monkeypatch, own):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setenv("DIPGUARD_CACHE", own)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(OSError, match="set DIPGUARD_CACHE"):
        cache_folder("victims").mkdir(parents=True)
    monkeypatch.setenv("DIPGUARD_CACHE", "/kept")
    assert cache_folder() == Path("/kept")
