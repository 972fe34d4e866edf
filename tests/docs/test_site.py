"""The site builds without a warning: all pages, the reference from the docstrings, the equations with their code."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_site_builds_and_the_links_of_its_equations_lead_somewhere(tmp_path):
    pytest.importorskip("sphinx", reason="the site needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    pages = {path.stem for path in tmp_path.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    equations = html.unescape((tmp_path / "equations.html").read_text(encoding="utf-8"))
    assert re.findall(r"\\tag\{(\d)\}", equations) == list("1234567")
    links = re.findall(r'href="(reference/[^"]+)"', equations[equations.index("An attack (1)") :])
    assert len([link for link in links if "#" in link]) >= 9
    for link in links:
        page, _, anchor = link.partition("#")
        assert not anchor or f'id="{anchor}"' in (tmp_path / page).read_text(encoding="utf-8"), link

    boundary = html.unescape((tmp_path / "reference/dipguard.decision.boundary.html").read_text(encoding="utf-8"))
    for function, formula in (("crosses", r"\wedge v^{(t)} > \tau"), ("localise", r"\arg\min_\alpha")):
        assert formula in boundary[boundary.index(f'id="dipguard.decision.boundary.{function}"') :]
    shown = {path.stem for path in tmp_path.glob("reference/*.html")}
    modules = [path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "dipguard").rglob("*.py")]
    public = [parts for parts in modules if not any(part.startswith("_") for part in parts)]
    assert {".".join(parts) for parts in public} <= shown
