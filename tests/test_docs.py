"""The Python blocks of the documentation run, and its links point at existing files."""

import re
from pathlib import Path

import pytest

from tests.docs_blocks import blocks, run_python

ROOT = Path(__file__).resolve().parents[1]
SHORT = {"T=1000": "T=20, decisions=10, progress=False"}
DOCUMENTS = {
    "docs/quickstart.md": SHORT,
    "docs/integrations.md": SHORT,
    "README.md": {
        'weights="DEFAULT"': "weights=None",
        "224, 224": "40, 40",
        "victim, seed=0": 'victim, preset="cifar10", T=20, t0=5, every=5, progress=False',
    },
}
"""Documents that are run (others by the tests of what they describe), and replacements for downloads and long fits."""
LANGUAGES = {"python", "sh", "yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if document == "docs/integrations.md":
        for library in ("art", "foolbox", "hydra", "torchattacks"):
            pytest.importorskip(library, reason="the guide needs the extras")
    monkeypatch.chdir(tmp_path)
    run_python(ROOT / document, instead=DOCUMENTS[document])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_say_their_language(document: str) -> None:
    found = blocks(ROOT / document)
    assert {block.language for block in found} <= LANGUAGES
    assert any(block.language == "python" for block in found)


ALL = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("document", ALL)
def test_no_line_is_a_comment_on_the_site(document: str) -> None:
    # MyST leaves out lines that begin with a per cent sign, also inside a paragraph.
    assert not re.findall(r"^\s*%.*", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("document", ALL)
def test_what_a_document_links_to_is_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (ROOT / document).parent.joinpath(link).exists()]
