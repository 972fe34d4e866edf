"""The wheel in an environment of its own, without the source tree."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str | Path], folder: Path) -> str:
    """Run a command in a folder; its output."""
    given = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and sees the other packages of the running one."""
    if find_spec("uv") is None or find_spec("hatchling") is None:
        pytest.skip("needs uv and hatchling, which bootstrap.py installs")
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist"], ROOT)
    venv.create(folder / "env", with_pip=False, symlinks=os.name != "nt")
    python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    own = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    # A plain line of a .pth file: the .pth files of that folder, such as our own editable one, are not read.
    (own / "others.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = (folder / "dist").glob("*.whl")
    run([sys.executable, "-m", "uv", "pip", "install", "--offline", "--no-deps", "--python", python, wheel], folder)
    assert Path(run([python, "-c", "import dipguard; print(dipguard.__file__)"], folder)).is_relative_to(own)
    return python.parent


@pytest.mark.slow
def test_train_runs_from_an_empty_folder(bin_folder: Path, tmp_path: Path) -> None:
    tiny = ["data.limit=2", "defense=paper", "defense.T=20", "defense.decisions=10", "defense.t0=2"]
    run([bin_folder / "dipguard", "train", *tiny, "processes=2", "hydra.run.dir=run"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["n"] == 2
    assert {"train.log", "report.md", "reconstructions.npz", "figures"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }


@pytest.mark.slow
def test_sweeps_and_configs_are_there(bin_folder: Path, tmp_path: Path) -> None:
    program = bin_folder / "dipguard"
    one = ["data.limit=1", "attack=fgsm", "defense=jpeg", "figures=0", "trainer.enable_progress_bar=false"]
    assert "2 jobs: 2 done." in run([program, "sweep", *one, "defense.quality=30,90"], tmp_path)
    shown = run([program, "evaluate", "experiment=table1_cifar10", "--cfg", "job", "-p", "victim"], tmp_path)
    assert "cifar10_resnet" in shown
    assert "# Quality threshold" in run([program, "train", "defense=paper", "--help"], tmp_path)


@pytest.mark.slow
def test_its_groups_are_there_in_other_applications(bin_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("own: 1\n")
    code = (
        "from hydra import compose, initialize_config_dir\n"
        f"with initialize_config_dir({str(tmp_path)!r}, version_base='1.3'):\n"
        "    print(compose('config', ['+dipguard/defense@d=paper', '+dipguard/victim@victim=digits_cnn']).d.name)\n"
    )
    assert run([bin_folder / "python", "-c", code], tmp_path).strip() == "paper"
