"""What the jobs of a sweep say about its parameters: lines of one, tables of two, and how much each matters.

Jobs are compared only where they agree in all other parameters. So a grid of one parameter at a time gives one line a
parameter through the common point, a full grid gives many, and a mixture of both what there is of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from dipguard.evaluation.statistics import wilson
from dipguard.reporting.stored_results import ResultRow
from dipguard.reporting.sweep_folder import Job, Sweep, Value

MEAN = "mean"
"""Stands for the mean over all columns, the paper's averaged accuracy."""


@dataclass(frozen=True)
class Share:
    """An accuracy in [0, 1] with its 95 % interval, of ``n`` images."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, eq=False)
class Slice:
    """Jobs that differ in some parameters alone.

    Attributes:
        fixed: The values of the others, by key.
        jobs: By the values of those that differ, in their order.
    """

    fixed: Mapping[str, Value]
    jobs: Mapping[tuple[Value, ...], Job]


def share_of(cells: Sequence[ResultRow]) -> Share | None:
    """The mean accuracy over cells that are all of the same images; None unless all have figures.

    The columns of an image go up and down together, so they do not count as so many images more: the interval is
    Wilson's for ``n`` images, which holds however strongly they do.
    """
    counts = [(cell.correct, cell.n) for cell in cells if cell.correct is not None and cell.n is not None]
    if not counts or len(counts) < len(cells):
        return None
    n = min(n for _, n in counts)
    value = sum(correct / n for correct, n in counts) / len(counts)
    whole = round(value * n, 9)
    below, above = int(whole), int(whole) + (whole > int(whole))
    return Share(value, wilson(below, n)[0], wilson(above, n)[1], n)


def accuracy_of(sweep: Sweep, job: Job, *, row: str, column: str) -> Share | None:
    """A job's accuracy in a column, or its mean over all columns of the sweep (``MEAN``)."""
    cells = [cell for cell in job.cells if cell.row == row and column in (cell.column, MEAN)]
    if column == MEAN and len(cells) < len(sweep.columns):
        return None
    return share_of(cells)


def mean_share(shares: Sequence[Share | None]) -> Share | None:
    """The mean over jobs on the same images, value and bounds alike; None unless all have one."""
    known = [share for share in shares if share is not None]
    if not known or len(known) < len(shares):
        return None
    value, low, high = (sum(getattr(s, name) for s in known) / len(known) for name in ("value", "low", "high"))
    return Share(value, low, high, min(s.n for s in known))


def slices(sweep: Sweep, *keys: str) -> list[Slice]:
    """The sets of done jobs that differ in these parameters alone, those with one job left out."""
    groups: dict[tuple[Value, ...], dict[tuple[Value, ...], Job]] = {}
    others = [key for key in sweep.parameters if key not in keys]
    for job in sweep.done:
        group = groups.setdefault(tuple(job.values[key] for key in others), {})
        group.setdefault(tuple(job.values[key] for key in keys), job)
    orders = [{value: i for i, value in enumerate(sweep.parameters[key])} for key in keys]
    found = []
    for fixed, jobs in groups.items():
        if len(jobs) > 1:
            ordered = sorted(jobs, key=lambda values: [o.get(v, -1) for o, v in zip(orders, values, strict=True)])
            found.append(Slice(dict(zip(others, fixed, strict=True)), {values: jobs[values] for values in ordered}))
    return found


def is_numeric(values: Sequence[Value]) -> bool:
    """Whether all values are numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def profile(sweep: Sweep, key: str, *, row: str, column: str) -> dict[Value, Share]:
    """Accuracy by the value of a parameter: the mean over the lines that have most values of it."""
    lines = slices(sweep, key)
    if not lines:
        return {}
    most = max(len(line.jobs) for line in lines)
    full = [line for line in lines if len(line.jobs) == most]
    wanted = max((tuple(line.jobs) for line in full), key=[tuple(line.jobs) for line in full].count)
    full = [line for line in full if tuple(line.jobs) == wanted]
    shares = {}
    for values in wanted:
        share = mean_share([accuracy_of(sweep, line.jobs[values], row=row, column=column) for line in full])
        if share is not None:
            shares[values[0]] = share
    return shares


def table_of(tables: Sequence[Slice], sweep: Sweep, *, row: str, column: str) -> dict[tuple[Value, ...], Share]:
    """Accuracy by the values of two parameters: the mean over tables; only cells that all of them have."""
    common = set.intersection(*(set(table.jobs) for table in tables))
    shares = {}
    for values in (values for values in tables[0].jobs if values in common):
        share = mean_share([accuracy_of(sweep, table.jobs[values], row=row, column=column) for table in tables])
        if share is not None:
            shares[values] = share
    return shares


def crossed_pairs(sweep: Sweep) -> dict[tuple[str, str], list[Slice]]:
    """Pairs of parameters that were varied together, with the tables that they span; numbers come before names.

    A cross (each varied while the other stays) is no table: it has at most a + b - 1 jobs for a and b values.
    """
    pairs = {}
    for one, other in combinations(sorted(sweep.parameters, key=lambda key: not is_numeric(sweep.parameters[key])), 2):
        tables = []
        for table in slices(sweep, one, other):
            a, b = ({values[i] for values in table.jobs} for i in (0, 1))
            if len(table.jobs) > len(a) + len(b) - 1:
                tables.append(table)
        if tables:
            pairs[one, other] = tables
    return pairs


@dataclass(frozen=True)
class Sensitivity:
    """How much a parameter matters: its best and worst value, and the points of accuracy between them."""

    key: str
    best: Value
    best_share: Share
    worst: Value
    worst_share: Share
    lines: int

    @property
    def range(self) -> float:
        """Best minus worst accuracy, in [0, 1]."""
        return self.best_share.value - self.worst_share.value


def sensitivities(sweep: Sweep, *, row: str, column: str = MEAN) -> list[Sensitivity]:
    """One for each parameter that a line was made of, the most important first."""
    found = []
    for key in sweep.parameters:
        shares = profile(sweep, key, row=row, column=column)
        if len(shares) > 1:
            best, worst = (pick(shares, key=lambda value: shares[value].value) for pick in (max, min))
            found.append(Sensitivity(key, best, shares[best], worst, shares[worst], len(slices(sweep, key))))
    return sorted(found, key=lambda one: -one.range)


def ranking(sweep: Sweep, *, row: str, column: str = MEAN) -> list[tuple[Job, Share]]:
    """Done jobs with their accuracy, the best first."""
    shares = [(job, accuracy_of(sweep, job, row=row, column=column)) for job in sweep.done]
    return sorted(((job, share) for job, share in shares if share is not None), key=lambda entry: -entry[1].value)
