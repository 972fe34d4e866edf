import os
from pathlib import Path

import pytest

from dipguard.evaluation.sweep_job import job_folder, job_key
from tests.tiny_matrix import typed_matrix

LONG = [f"defense.{name}=0.123456789" for name in ("tau", "beta", "lr", "jitter", "z_scale", "K", "t0")]


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["defense.tau=0.5"], "tau=0.5-"),
        (["defenses.paper.tau=0.5"], "tau=0.5-"),
        (["defense={tau:0.5,network:small}"], "tau=0.5,network=small-"),
        (["+defense.every=5", "data=cifar10"], "every=5,data=cifar10-"),
        (["data.path=/somewhere/far/tune.npz"], "path=tune.npz-"),
        (["~defenses.median"], "no_median-"),
        (["~defenses.median=null"], "no_median-"),  # as Hydra's sweeper passes it on
        (["attacks.pgd_8={steps:2}", "seed=1"], "steps=2,seed=1-"),
        (["attack@attacks.clean=fgsm"], "clean=fgsm-"),
        (["data.path='a b/c:d?.npz'"], "path=c_d_.npz_-"),
        (["+trainer.precision=16"], "precision=16-"),
        (["+sweep=smoke", "logger=wandb", "trainer.enable_progress_bar=false"], "job-"),
    ],
)
def test_a_folder_is_named_by_what_was_overridden(overrides: list[str], start: str) -> None:
    name = job_folder(overrides)
    assert name.startswith(start)
    assert len(name) == len(start) + 8


def test_long_overrides_give_a_name_that_can_be_a_folder(tmp_path: Path) -> None:
    names = {job_folder([*LONG, f"seed={seed}"]) for seed in range(5)}
    assert len(names) == 5
    for name in names:
        assert len(name) < 120
        (tmp_path / name).mkdir()


def test_names_tell_keys_of_the_same_ending_apart_and_are_the_same_however_they_are_ordered() -> None:
    assert job_folder(["defenses.paper.T=5"]) != job_folder(["defenses.dip_fixed.T=5"])
    digests = {job_folder(order)[-8:] for order in (["seed=1", "chunk=2"], ["chunk=2", "seed=1"])}
    assert len(digests) == 1


@pytest.mark.parametrize(
    "override",
    [
        "trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "logger=csv", "store=elsewhere", "processes=2",
        "store_T=[30]", "store_samples=true", "rebuild=true", "objective=clean",
    ],
)  # fmt: skip
def test_settings_that_no_result_depends_on_leave_a_job_done(override: str) -> None:
    assert job_key(typed_matrix(override)) == job_key(typed_matrix())
    assert job_folder(["seed=1", override]) == job_folder(["seed=1"])


@pytest.mark.parametrize(
    "override", ["seed=1", "defenses.paper.tau=0.6", "data.limit=3", "figures=1", "+trainer.precision=64"]
)
def test_others_do_not(override: str) -> None:
    assert job_key(typed_matrix(override)) != job_key(typed_matrix())


@pytest.mark.parametrize("given", ["images", "{}/images", "images/deep/1.png"])
def test_what_a_named_file_or_folder_holds_is_a_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "images" / "deep" / "1.png"
    path.parent.mkdir(parents=True)
    keys = []
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        os.utime(path, (0, 0))
        keys.append(job_key(typed_matrix("data=image_folder", f"data.path={given.format(tmp_path)}")))
    assert keys[0] == keys[2] != keys[1]


def test_a_folder_that_is_called_like_a_setting_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = typed_matrix("data=cifar10", "data.split=test")
    assert config.defenses["paper"]["network"] == "cifar10"
    key = job_key(config)
    for name in ("test", "cifar10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tune.npz").write_bytes(b"one")
    assert job_key(config) == key


def test_the_versions_are_a_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = job_key(typed_matrix())
    for name, value in (("version", lambda name: "0"), ("constant_of", lambda path: 0), ("__version__", "0")):
        with monkeypatch.context() as patch:
            patch.setattr(f"dipguard.evaluation.sweep_job.{name}", value)
            assert job_key(typed_matrix()) != key


def test_the_code_of_others_is_a_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path, keys = tmp_path / "their_victim.py", []
    for body in ("x = 1", "x = 2", "x = 1"):
        path.write_text(f"{body}\nclass Theirs:\n    def __init__(self, depth=2): ...\n")
        keys.append(job_key(typed_matrix("~victim", "+victim._target_=their_victim.Theirs", "+victim.depth=3")))
    assert keys[0] == keys[2] != keys[1]


def test_what_a_sweep_writes_is_no_part_of_its_jobs_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"one")
    config, sweep = typed_matrix("data=image_folder", "data.path=."), tmp_path / "outputs" / "sweep"
    key = job_key(config, sweep=sweep)
    (sweep / "job").mkdir(parents=True)
    (sweep / "job" / "log").write_bytes(b"more")
    assert job_key(config, sweep=sweep) == key
    (tmp_path / "images" / "2.png").write_bytes(b"two")
    assert job_key(config, sweep=sweep) != key
