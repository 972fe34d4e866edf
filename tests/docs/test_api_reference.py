"""The API reference builds from the docstrings without a warning, and shows the paper's equations with their code."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_reference_builds_without_warnings_and_its_links_lead_somewhere(tmp_path):
    pytest.importorskip("pdoc", reason="the API reference needs the extra docs")
    command = [sys.executable, str(ROOT / "docs" / "api" / "build.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    first = (tmp_path / "dipguard.html").read_text(encoding="utf-8")
    equations = re.findall(r"\$\$[^$]+\\tag\{(\d)\}\$\$", html.unescape(first))
    assert equations == list("1234567")
    section = first[first.index("The equations of") :]
    links = re.findall(r'href="(dipguard/[^"]+)"', section)
    assert len(links) > 15
    for link in links:
        page, _, anchor = link.partition("#")
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert not anchor or f'id="{anchor}"' in text, link

    for function, formula in (("crosses", r"\wedge v^{(t)} > \tau"), ("localise", r"\arg\min_\alpha")):
        page = html.unescape((tmp_path / "dipguard/decision/boundary.html").read_text(encoding="utf-8"))
        assert formula in page[page.index(f'id="{function}"') :]
    pages = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.html")}
    public = [path for path in (ROOT / "dipguard").rglob("*.py") if not re.search(r"/_", path.as_posix())]
    assert {path.relative_to(ROOT).with_suffix("").as_posix() for path in public} <= pages
