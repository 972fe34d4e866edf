"""Set up ``.venv`` from ``requirements.lock`` once, then run Python in it: ``python3 bootstrap.py train.py seed=1``.

Needs nothing but Python 3.11-3.13 and pip 22.3 or newer. A second call, with nothing changed, starts at once.
The folder of the environment can be named by the variable ``DIPGUARD_VENV``; delete the folder to start afresh.
"""

import hashlib
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("DIPGUARD_VENV") or ROOT / ".venv").absolute()
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "dipguard.lock.sha256"
UV = "uv>=0.6,<1"
# In the activated environment, the Python that it was made with: the environment may lack pip.
OUTER = getattr(sys, "_base_executable", sys.executable) if Path(sys.prefix) == VENV else sys.executable


def fingerprint() -> str:
    """What decides whether the environment is up to date: the lock, the metadata, this script and where it stands."""
    parts = [(ROOT / name).read_bytes() for name in ("requirements.lock", "pyproject.toml", "bootstrap.py")]
    return hashlib.sha256(b"\0".join([*parts, str(ROOT).encode()])).hexdigest()


def install() -> None:
    """Fill the environment with what the lock names, hashes checked, and this package in editable form."""
    if not PYTHON.exists():
        # The outer pip fills it, so machines that lack ensurepip work too.
        venv.create(VENV, clear=VENV.exists(), with_pip=False, symlinks=os.name != "nt")
    outer_pip = [OUTER, "-m", "pip", "--python", str(PYTHON), "install", "--quiet"]
    locked = ["--no-deps", "--require-hashes", "-r", str(ROOT / "requirements.lock")]
    editable = ["--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    # uv takes half a minute where pip takes minutes. It is told to trust the certificates of the operating system, as
    # pip does (the name of that setting changed with the version of uv).
    os.environ.update({name: os.environ.get(name, "1") for name in ("UV_SYSTEM_CERTS", "UV_NATIVE_TLS")})
    os.environ.setdefault("UV_HTTP_TIMEOUT", "300")
    uv = [str(PYTHON), "-m", "uv", "pip", "install", "--quiet", "--python", str(PYTHON)]
    # --no-deps: the lock is complete, and torchattacks' pin on an old `requests` must not be read (docs/installing.md).
    # pip is for the user, who may want to add a package in the activated environment.
    if subprocess.call([*outer_pip, UV, "pip"]) or subprocess.call([*uv, *locked]):
        print("bootstrap: uv cannot do it, so pip does; this takes some minutes", file=sys.stderr)
        subprocess.run([*outer_pip, *locked], check=True)
    # The wheel of torchattacks holds an old copy of robustbench; where it came last, the real one is put back.
    pinned = re.findall(r"^robustbench==[^#]+", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    (VENV / "robustbench.lock").write_text("".join(pinned), encoding="utf-8")
    last = ["--force-reinstall", "--no-deps", "--require-hashes", "-r", str(VENV / "robustbench.lock")]
    subprocess.run([*outer_pip, *last], check=True)
    subprocess.run([*outer_pip, *editable], check=True)


def main() -> int:
    """Install if need be, then hand the arguments over to the environment's Python."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print(f"dipguard needs Python 3.11, 3.12 or 3.13; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    ours = (VENV / "pyvenv.cfg").is_file() or PYTHON.exists()
    if not ours and (VENV.is_file() or any(VENV.glob("*"))):
        print(f"bootstrap: {VENV} must be an environment or an empty folder; or set DIPGUARD_VENV", file=sys.stderr)
        return 2
    wanted = fingerprint()
    if not (PYTHON.exists() and STAMP.exists() and STAMP.read_text(encoding="utf-8") == wanted):
        pip = subprocess.run([OUTER, "-m", "pip", "--version"], capture_output=True, text=True, check=False).stdout
        number = re.match(r"pip (\d+)\.(\d+)", pip)
        if number is None or (int(number[1]), int(number[2])) < (22, 3):
            advice = "apt install python3-pip on Debian and Ubuntu, else python3 -m ensurepip --upgrade"
            found = number[0] if number else "none"
            print(f"bootstrap: {OUTER} needs pip 22.3 or newer ({advice}); found {found}", file=sys.stderr)
            return 2
        print(f"bootstrap: setting up {VENV} (some GB of packages, once) ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            install()
        except subprocess.CalledProcessError as error:
            print(f"bootstrap: set-up failed (exit status {error.returncode}); see the lines above", file=sys.stderr)
            return 1
        STAMP.write_text(wanted, encoding="utf-8")
        print(f"bootstrap: ready after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if not sys.argv[1:]:
        return 0
    command = [str(PYTHON), *sys.argv[1:]]
    if os.name == "nt":
        return subprocess.call(command)
    os.execv(PYTHON, command)  # so that signals reach it


if __name__ == "__main__":
    sys.exit(main())
