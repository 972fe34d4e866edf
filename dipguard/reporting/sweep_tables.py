"""A sweep's tables: the long CSV, two parameters together (Table 3), best settings, what matters, what is missing."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from dipguard.reporting.matrix_tables import NONE, aligned, escaped
from dipguard.reporting.paper_figures import SOURCE, head_of
from dipguard.reporting.stored_results import ResultRow
from dipguard.reporting.sweep_folder import STATES, Sweep, text_of
from dipguard.reporting.sweep_grid import MEAN, Share, Slice, accuracy_of, ranking, sensitivities, table_of

BEST = 5
"""Settings that the report names."""
PAPER_TABLE_3: Mapping[str, Mapping[int, int]] = {
    "small": {500: 76, 750: 74, 1000: 74, 1250: 72, 1500: 69},
    "medium": {500: 75, 750: 79, 1000: 79, 1250: 75, 1500: 74},
    "large": {500: 71, 750: 73, 1000: 71, 1250: 69, 1500: 67},
}
"""Accuracy, %, CIFAR-10, PGD at 8/255, the paper's own ResNet-50."""


def long_csv(sweep: Sweep) -> str:
    """A line a job, row and column; jobs without results have one line, which says why."""
    cell_fields = [field.name for field in fields(ResultRow)]
    labels = [
        name if name not in {*cell_fields, "job", "state", "problem"} else key for key, name in sweep.labels.items()
    ]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["job", "state", *labels, *cell_fields, "problem"])
    for job in sweep.jobs:
        start = [job.folder, job.state, *(_csv_value(job.values.get(key)) for key in sweep.parameters)]
        for cell in job.cells:
            writer.writerow([*start, *(_csv_value(getattr(cell, name)) for name in cell_fields), job.problem])
        if not job.cells:
            writer.writerow([*start, *[""] * len(cell_fields), job.problem])
    return buffer.getvalue()


def _csv_value(value: Any) -> Any:
    return "" if value is None else value


def state_section(sweep: Sweep) -> str:
    """How many jobs are done, and for the others what is missing or went wrong."""
    counts = {state: sum(job.state == state for job in sweep.jobs) for state in STATES}
    head = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state] or state == "done")
    lines = [f"{len(sweep.jobs)} jobs: {head}."]
    rest = [job for job in sweep.jobs if job.state != "done"]
    if rest:
        lines += [
            "",
            *(f"- {escaped(f'{job.state}: {sweep.setting(job)} ({job.folder}): {job.problem}')}" for job in rest),
        ]
    fits = {name: sum(job.store.get(name, 0) for job in sweep.jobs) for name in ("fitted", "replayed", "decided")}
    if any(fits.values()):
        spared = fits["replayed"] + fits["decided"]
        lines += ["", f"Fits, in images: {fits['fitted']} made, {spared} taken from the store."]
    if sweep.others:
        lines += ["", f"{sweep.others} more of earlier starts, not in this grid, are left out (sweeps.collect --all)."]
    return "\n".join(lines)


def best_section(sweep: Sweep, *, row: str) -> str:
    """The best settings by their mean over the columns."""
    ranked = ranking(sweep, row=row)
    if not ranked:
        return "No job has all columns yet."
    best = ranked[0][1]
    near = sum(share.high >= best.value for _, share in ranked)
    lines = [
        f"Best mean over {_columns(sweep)}: {_percent(best)} % at {sweep.setting(ranked[0][0])}. "
        f"{near} of {len(ranked)} settings have this figure within their own 95 % interval."
        + " These images cannot tell them apart."
        * (near > 1),
        "",
    ]
    rows = [
        [
            str(i),
            *(text_of(job.values.get(key)) for key in sweep.parameters),
            *_shares(sweep, job, row),
            _interval(share),
        ]
        for i, (job, share) in enumerate(ranked[:BEST], start=1)
    ]
    return "\n".join([*lines, aligned(["", *sweep.labels.values(), *map(head_of, sweep.columns), "mean"], rows)])


def _shares(sweep: Sweep, job: Any, row: str) -> Iterator[str]:
    for column in sweep.columns:
        share = accuracy_of(sweep, job, row=row, column=column)
        yield NONE if share is None else _percent(share)


def sensitivity_section(sweep: Sweep, *, row: str) -> str:
    """Best and worst value of each parameter and the points between them."""
    rows = [
        [sweep.labels[one.key], text_of(one.best), _interval(one.best_share), text_of(one.worst),
         _interval(one.worst_share), f"{100 * one.range:.1f}", str(one.lines)]
        for one in sensitivities(sweep, row=row)
    ]  # fmt: skip
    if not rows:
        return "No parameter was varied alone yet."
    head = ["parameter", "best value", "mean accuracy, %", "worst value", "mean accuracy, %", "range, points", "lines"]
    note = (
        "Accuracy with its 95 % interval; the range is between the best and the worst value while all other parameters "
        "stay, in the mean over so many lines. A parameter's best value is the best of this grid, on these images."
    )
    return f"{note}\n\n{aligned(head, rows)}"


def pair_section(sweep: Sweep, pair: tuple[str, str], tables: Sequence[Slice], *, row: str) -> str:
    """A table of two parameters for each column, accuracy in percent with 95 % intervals."""
    parts = []
    for column in [*sweep.columns, *([MEAN] if len(sweep.columns) > 1 else [])]:
        shares = table_of(tables, sweep, row=row, column=column)
        across, down = (
            [v for v in sweep.parameters[key] if any(v == s[i] for s in shares)] for i, key in enumerate(pair)
        )
        head = [f"{sweep.labels[pair[1]]} / {sweep.labels[pair[0]]}", *map(text_of, across)]
        rows = [[text_of(o), *(_interval(shares[a, o]) if (a, o) in shares else NONE for a in across)] for o in down]
        title = f"mean over {_columns(sweep)}" if column == MEAN else head_of(column)
        over = f", mean over {len(tables)} settings of the others" if len(tables) > 1 else ""
        parts.append(f"Accuracy, %, {title}{over}:\n\n{aligned(head, rows)}" if rows else f"{title}: nothing yet.")
    if is_table_3(sweep, pair):
        steps = list(PAPER_TABLE_3["small"])
        printed = [[name, *(str(line[T]) for T in steps)] for name, line in PAPER_TABLE_3.items()]
        parts.append(
            f"The paper's Table 3 ({SOURCE}; CIFAR-10, PGD at 8/255, its own ResNet-50, other images):\n\n"
            f"{aligned(['network / T', *map(str, steps)], printed)}"
        )
    return "\n\n".join(parts)


def is_table_3(sweep: Sweep, pair: tuple[str, str]) -> bool:
    """Whether these are the parameters of the paper's Table 3."""
    return {sweep.labels[key] for key in pair} == {"T", "network"}


def _columns(sweep: Sweep) -> str:
    return f"{len(sweep.columns)} column{'s' * (len(sweep.columns) != 1)}"


def _percent(share: Share) -> str:
    return f"{100 * share.value:.1f}"


def _interval(share: Share) -> str:
    return f"{100 * share.value:.1f} ({100 * share.low:.0f}{NONE}{100 * share.high:.0f})"


def pair_stem(sweep: Sweep, pair: tuple[str, str]) -> str:
    """A file's name for a table of two parameters."""
    names = "_".join("".join(c if c.isalnum() else "_" for c in sweep.labels[key]) for key in pair)
    return f"table3_{names}" if is_table_3(sweep, pair) else f"map_{names}"
