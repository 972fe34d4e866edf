"""Text from outside (names of pictures and classes, messages) in the formats of the reports: one function for each.

Figures need none: `dipguard.reporting.canvas.save_figure` reads no text as a formula.
"""

from __future__ import annotations

NONE = "\N{EN DASH}"
"""Stands for a missing figure; the reason is given below the table."""
_MARKDOWN = str.maketrans({"<": "&lt;", **{c: f"\\{c}" for c in "\\|[]*"}})
_LATEX = {NONE: "--", "\N{HORIZONTAL ELLIPSIS}": r"\dots{}", **{c: f"\\{c}" for c in "&%$#_{}"}}
_NAMES = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar"}
_LATEX |= {c: rf"\text{name}{{}}" for c, name in _NAMES.items()}


def escape_csv(text: str) -> str:
    """Text that a spreadsheet does not take for a formula: a leading =, +, -, @ or control character gets a quote."""
    return f"'{text}" if text and (text[0] in "=+-@" or text[0] < " ") else text


def escape_markdown(text: str) -> str:
    """Text that Markdown prints as it is, on one line: no HTML, link, emphasis or end of a table's cell."""
    return " ".join(text.split()).translate(_MARKDOWN).replace("__", r"\_\_")


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it, on one line; control characters are left out."""
    return "".join(_LATEX.get(c, c) for c in " ".join(text.split()) if c.isprintable())
