"""The report of a sweep: the long CSV, and tables and figures of its parameters.

Jobs are compared only where they agree in all other parameters. So a grid that varies one parameter at a time gives one
line per parameter through the common point, and a full grid gives many lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from math import ceil, floor
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dipguard.evaluation.cell import WORST
from dipguard.evaluation.metrics import wilson
from dipguard.files import write_text
from dipguard.reporting.canvas import DPI, line_style, plain_axes, save_figure, short
from dipguard.reporting.escape import NONE, escape_csv, escape_markdown
from dipguard.reporting.paper_figures import SOURCE, TABLE_3, head_of
from dipguard.reporting.results import images_text, interval_text
from dipguard.reporting.sweep_jobs import STATES, Sweep, is_numeric, read_sweep, text_of
from dipguard.reporting.tables import markdown

OFFLINE = "*/logs/wandb/offline-run-*"
MEAN = "mean"
"""Stands for the mean over the attacks, the paper's averaged accuracy; worst case and checks are no part of it."""
SEED = "seed"
ALL, BEST = 12, 5
"""Number of settings up to which the report lists all, and that it lists else."""
TABLE_3_LABELS = {"T", "network"}
SYMBOLS = {"tau": "τ", "t0": "t₀", "beta": "β"}
PANEL, TALL, LEGEND = 3.0, 2.9, 1.5
"""Inches: width and height of a panel, and width of the legend."""
ACROSS = 4
"""Most panels side by side."""


def write_sweep_report(folder: str | Path) -> list[Path]:
    """Write sweep.csv, the figures and report.md into a sweep's folder, finished or not; returns their paths.

    report.md has what is missing or failed; for each defence that the parameters act on the settings and tables with
    intervals; the other defences; the figures. sweep.csv has a row for each job, attack and defence.
    """
    folder = Path(folder)
    sweep = read_sweep(folder)
    made = [write_text(folder / "sweep.csv", long_csv(sweep))]
    parts, figures = [f"# Sweep {escape_markdown(sweep.name)}", state_section(sweep)], []
    swept, fixed = _grids(sweep)
    if seeds := sweep.parameters.get(SEED):
        names = ", ".join(map(text_of, seeds))
        parts.append(f"Figures are means over the seeds {names}, as far as their jobs are done.")
    for grid in swept:
        of = f": {escape_markdown(grid.defense)}" if len(sweep.defenses) > 1 else ""
        parts += [f"## Settings{of}", best_section(grid)]
        for pair, cells in grid.maps():
            parts += [f"## {_title(grid, pair)}{of}", pair_section(grid, pair, cells)]
        for title, name, figure in _figures(grid):
            made.append(save_figure(figure, folder / f"{name}{f'_{grid.defense}' if of else ''}.png"))
            figures += [f"## {title}{of}", f"![{made[-1].stem}]({made[-1].name})"]
    if fixed:
        parts += ["## Defences that the parameters do not act on" if swept else "## Results", fixed_section(fixed)]
    return [write_text(folder / "report.md", "\n\n".join(filter(None, parts + figures)) + "\n"), *made]


def summary(folder: str | Path) -> str:
    """The sweep in some lines, for a terminal: how many jobs are done, what failed, the best setting."""
    sweep = read_sweep(folder)
    lines = [f"sweep {sweep.name}: {state_section(sweep, escape=str)}"]
    swept, fixed = _grids(sweep)
    for grid in swept or fixed:
        for _, best in grid.ranking().head(1).iterrows():
            setting = sweep.setting(best["job"], grid.parameters)
            of = f"mean accuracy of defence {grid.defense}: {best['value']:.1%}"
            lines.append(f"best {of} at {setting}" if setting else of)
    if any(Path(folder).glob(OFFLINE)):
        lines.append(f"W&B runs kept offline; to upload them: wandb sync {Path(folder) / OFFLINE}")
    return "\n".join([*lines, f"report: {Path(folder) / 'report.md'}"])


class Grid:
    """What the jobs of a sweep say about one defence.

    ``parameters`` are those that act on it, but for the seed: of jobs that differ in nothing else, the figures are
    means. ``attacks`` are all of the sweep, and ``count`` the number of those that the mean over attacks is over.
    """

    def __init__(self, sweep: Sweep, defense: str) -> None:
        self.sweep, self.defense, self.attacks = sweep, defense, list(sweep.results["attack"].unique())
        results = sweep.results[(sweep.results["defense"] == defense) & sweep.results["accuracy"].notna()]
        own = {sweep.jobs[name].values.get("defense") for name in results["job"]}
        apart = {SEED} if len(own) > 1 else {SEED, "defense"}  # `defense=paper,mirror` says only which defence it is
        acting = {key: values for key, values in sweep.parameters.items() if _acts_on(key, defense)}
        self.parameters = {key: values for key, values in acting.items() if key not in apart}
        results = results.drop_duplicates(["job", "attack"], keep="last")  # the largest budget
        names = {"accuracy": "value", "attack": "under"}  # a parameter may be called `attack`
        values = results.rename(columns=names)[["job", "under", "value", "low", "high", "n"]]
        usual = results[(results["check"] == "") & (results["attack"] != WORST)]
        # Not every attack applies to every defence. Where the attack itself is swept, a mean is over a job's own.
        each = usual.groupby("job")["attack"].nunique()
        self.count = max(each, default=0) if "attack" in self.parameters else usual["attack"].nunique()
        jobs = list(sweep.jobs.items())
        # A parameter's value is known by its position, which sorts as the values do.
        places = {
            key: {name: known.index(value) if (value := job.values[key]) in known else -1 for name, job in jobs}
            for key, known in self.parameters.items()
        }
        scores = pd.concat([values, _means(values.loc[usual.index], self.count)])
        scores = scores.join(pd.DataFrame(places, index=list(sweep.jobs)), on="job")
        setting = ["_", *self.parameters]
        scores["job"] = scores.assign(_=0).groupby(setting)["job"].transform("first")
        of_seeds = {"job": "first", **dict.fromkeys(("value", "low", "high"), "mean"), "n": "first"}
        self.scores = scores.groupby(["under", *self.parameters], sort=False, as_index=False).agg(of_seeds)

    def of(self, attack: str, *keys: str) -> pd.DataFrame:
        """Accuracy of each setting that has all ``keys`` under an attack, or in the mean (``MEAN``).

        A row has ``job`` (its first), ``value``, ``low``, ``high``, ``n``, and under each parameter's key the position
        of its value in ``parameters``; -1 if the job has no such key.
        """
        scores = self.scores[self.scores["under"] == attack]
        for key in keys:
            scores = scores[scores[key] >= 0]
        return scores

    def ranking(self) -> pd.DataFrame:
        """The settings by their mean accuracy, the best first."""
        return self.of(MEAN).sort_values("value", ascending=False, kind="stable")

    def profile(self, key: str, attack: str = MEAN) -> pd.DataFrame:
        """Accuracy by the value of a parameter: rows with ``value``, ``low`` and ``high`` by the value's position.

        It is the mean over the settings of the other parameters that have most values, all of them the same.
        """
        nothing = pd.DataFrame(columns=["value", "low", "high"])
        if not len(self.of(attack, key)):
            return nothing
        wide = self._wide(attack, key)
        known = wide["value"].notna()
        longest = known[known.sum(axis=1) == max(2, known.sum(axis=1).max())]
        if not len(longest):
            return nothing
        pattern = longest.value_counts().index[0]
        chosen = longest.index[(longest == list(pattern)).all(axis=1)]
        return wide.loc[chosen].mean().unstack(0).dropna()

    def map(self, pair: tuple[str, str]) -> pd.DataFrame | None:
        """Mean accuracy by two parameters that were varied together: rows with ``value``, ``low`` and ``high``.

        It is the mean over the settings of the others, for values that all of them have. A cross (each varied while the
        other stays) is no map: for a and b values it has at most a + b - 1 jobs.
        """
        if not len(self.of(MEAN, *pair)):
            return None
        wide = self._wide(MEAN, *pair)
        known = wide["value"].notna()
        sizes = sum(known.T.groupby(level=key).any().sum() for key in pair)
        tables = wide[known.sum(axis=1) > sizes - 1].dropna(axis=1)
        return tables.mean().unstack(0) if tables.size else None

    def maps(self) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
        """Each pair of parameters that were varied together, with its `map`; numbers come before names."""
        for pair in combinations(sorted(self.parameters, key=lambda key: not is_numeric(self.parameters[key])), 2):
            if (cells := self.map(pair)) is not None:
                yield pair, cells

    def _wide(self, attack: str, *keys: str) -> pd.DataFrame:
        """Value, low and high of each job: a row for each setting of the other parameters, columns by ``keys``."""
        others = [key for key in self.parameters if key not in keys]
        scores = self.of(attack, *keys).assign(_="")
        return scores.pivot_table(["value", "low", "high"], ["_", *others], keys, aggfunc="first")


def _acts_on(key: str, defense: str) -> bool:
    """Whether a parameter may change the results of a defence: all do that do not belong to another one."""
    parts = key.lstrip("~").replace("@", ".").split(".")
    return "defenses" not in parts[:-1] or parts[parts.index("defenses") + 1] == defense


def _grids(sweep: Sweep) -> tuple[list[Grid], list[Grid]]:
    """The defences that a parameter acts on, and the others."""
    grids = [Grid(sweep, defense) for defense in sweep.defenses]
    return [grid for grid in grids if grid.parameters], [grid for grid in grids if not grid.parameters]


def _means(values: pd.DataFrame, attacks: int) -> pd.DataFrame:
    """The mean over the attacks, for jobs that have all of them.

    An image's results under the attacks depend on each other, so they do not count as so many images more: the
    interval is Wilson's for ``n`` images, which holds however strongly they depend.
    """
    jobs = values.groupby("job", sort=False)
    means = jobs.agg(value=("value", "mean"), n=("n", "min"))[jobs.size() == attacks].reset_index()
    counts = [(round(value * n, 9), int(n)) for value, n in zip(means["value"], means["n"], strict=True)]
    lows, highs = [wilson(floor(k), n)[0] for k, n in counts], [wilson(ceil(k), n)[1] for k, n in counts]
    return means.assign(under=MEAN, low=lows, high=highs)


def long_csv(sweep: Sweep) -> str:
    """A row for each job, attack and defence; a job without results has one row, with the reason."""
    taken = {*sweep.results.columns, "state", "problem"}
    names = {key: f"{label} (swept)" if label in taken else label for key, label in sweep.labels.items()}
    rows = [
        {"job": name, "state": job.state, **{names[k]: v for k, v in job.values.items()}}
        for name, job in sweep.jobs.items()
    ]
    table = pd.DataFrame(rows, dtype=object).merge(sweep.results, on="job", how="left")
    table["problem"] = [sweep.jobs[name].problem for name in table["job"]]
    table = table.map(lambda value: escape_csv(value) if isinstance(value, str) else value)
    return str(table.to_csv(index=False, lineterminator="\n"))


def state_section(sweep: Sweep, *, escape: Callable[[str], str] = escape_markdown) -> str:
    """How many jobs are done, and for the others what is missing or went wrong."""
    states = pd.Series([job.state for job in sweep.jobs.values()]).value_counts().reindex(STATES, fill_value=0)
    head = ", ".join(f"{count} {state}" for state, count in states.items() if count or state == "done")
    lines = [f"{len(sweep.jobs)} jobs: {head}."]
    alike: dict[tuple[str, str], list[str]] = {}
    for name, job in sweep.jobs.items():
        if job.state != "done":
            alike.setdefault((job.state, job.problem), []).append(f"{sweep.setting(name)} ({name})")
    texts = [f"{state}: {problem}: {'; '.join(jobs)}" for (state, problem), jobs in alike.items()]
    lines += ["", *(f"- {escape(text)}" for text in texts)] if texts else []
    if sweep.others:
        lines += ["", f"{sweep.others} more of earlier starts, not in this grid, are left out."]
    return "\n".join(lines)


def best_section(grid: Grid) -> str:
    """The best settings by their mean over the attacks; of a small sweep, all."""
    ranked, sweep = grid.ranking(), grid.sweep
    if not len(ranked):
        return "No job has all attacks yet."
    best = ranked.iloc[0]
    setting = escape_markdown(sweep.setting(best["job"], grid.parameters))
    near = int((ranked["high"] >= best["value"]).sum())
    head = (
        f"Best mean over {_count(grid)}: {100 * best['value']:.1f} % at {setting}. "
        f"{near} of {len(ranked)} settings have this figure within their own 95 % interval."
    )
    rows = [
        [*(text_of(sweep.jobs[line["job"]].values[key]) for key in grid.parameters), *_by_attack(grid, line)]
        for _, line in ranked.head(BEST if len(ranked) > ALL else ALL).iterrows()
    ]
    labels = [sweep.labels[key] for key in grid.parameters]
    return f"{head}\n\n{markdown([*labels, *map(head_of, grid.attacks), 'mean'], rows)}"


def fixed_section(grids: Sequence[Grid]) -> str:
    """One line for each defence that no parameter acts on."""
    lines = [(grid, line) for grid in grids for _, line in grid.ranking().iterrows()]
    rows = [[grid.defense, *_by_attack(grid, line)] for grid, line in lines]
    return markdown(["defence", *map(head_of, grids[0].attacks), "mean"], rows) if rows else "None has all attacks yet."


def _by_attack(grid: Grid, line: pd.Series) -> list[str]:
    """A job's accuracy under each attack, and their mean with its interval."""
    values = [grid.of(attack).set_index("job")["value"].get(line["job"]) for attack in grid.attacks]
    return [*(NONE if value is None else f"{100 * value:.1f}" for value in values), _interval(line)]


def pair_section(grid: Grid, pair: tuple[str, str], cells: pd.DataFrame) -> str:
    """A table of two parameters: mean accuracy in percent with 95 % intervals, and the paper's where it has them."""
    across, down = (grid.parameters[key] for key in pair)
    texts = cells.apply(_interval, axis=1).unstack(0).fillna(NONE)
    head = [f"{grid.sweep.labels[pair[1]]} / {grid.sweep.labels[pair[0]]}", *(text_of(across[i]) for i in texts)]
    section = f"Mean accuracy over {_count(grid)}, %:\n\n"
    section += markdown(head, [[text_of(down[j]), *line] for j, line in texts.T.items()])
    if {grid.sweep.labels[key] for key in pair} == TABLE_3_LABELS:
        section += f"\n\nThe paper's Table 3 ({SOURCE}; CIFAR-10, PGD at 8/255, its own ResNet-50, other images):\n\n"
        printed = [[name, *map(str, line.values())] for name, line in TABLE_3.items()]
        section += markdown(["network / T", *map(str, TABLE_3["small"])], printed)
    return section


def _count(grid: Grid) -> str:
    return f"{grid.count} attack{'s' * (grid.count != 1)}"


def _interval(share: pd.Series) -> str:
    return interval_text(share["value"], share["low"], share["high"])


def _figures(grid: Grid) -> Iterator[tuple[str, str, Figure]]:
    """Title, file name and figure of all that can be drawn."""
    if (figure := draw_lines(grid, mean=True)) is not None:
        yield "Mean accuracy (Figure 6)", "figure6_mean", figure
    if len(grid.attacks) > 1 and (figure := draw_lines(grid, mean=False)) is not None:
        yield "Accuracy by attack (Figure 7)", "figure7_columns", figure
    for pair, cells in grid.maps():
        name = re.sub(r"\W", "_", "_".join(grid.sweep.labels[key] for key in pair))
        yield _title(grid, pair), f"map_{name}", draw_map(grid, pair, cells)


def _title(grid: Grid, pair: tuple[str, str]) -> str:
    return escape_markdown(" x ".join(grid.sweep.labels[key] for key in pair))


def draw_lines(grid: Grid, *, mean: bool) -> Figure | None:
    """Accuracy against each parameter with 95 % bands, a panel for each parameter; None without lines.

    ``mean`` draws the mean over the attacks (Figure 6); without it each attack has a line (Figure 7).
    """
    attacks = [MEAN] if mean else grid.attacks
    keys = [key for key in grid.parameters if any(len(grid.profile(key, attack)) > 1 for attack in attacks)]
    if not keys:
        return None
    across = min(ACROSS, len(keys))
    down = ceil(len(keys) / across)
    size = (max(5.0, PANEL * across + LEGEND * (not mean)), 0.7 + TALL * down)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, sharey=True).ravel())
    for ax in axes[len(keys) :]:
        ax.set_axis_off()
    drawn = {}
    for ax, key in zip(axes, keys, strict=False):
        for i, attack in enumerate(attacks):
            shares, style = 100 * grid.profile(key, attack), line_style(i)
            if len(shares) > 1:
                values = grid.parameters[key]  # numbers are drawn at their value, everything else side by side
                x = [values[at] if is_numeric(values) else at for at in shares.index]
                ax.fill_between(x, shares["low"], shares["high"], color=style["color"], alpha=0.1, linewidth=0)
                (drawn[attack],) = ax.plot(x, shares["value"], linewidth=1.5, markersize=4.5, **style)
        _finish(ax, grid, key)
    for ax in axes[: len(keys) : across]:
        ax.set_ylabel("accuracy, %")
    title = f"mean accuracy over {_count(grid)}" if mean else "accuracy by attack"
    figure.suptitle(f"{grid.sweep.name}: {title}", fontsize=11, fontweight="bold")
    figure.supxlabel(f"bands: 95 % Wilson intervals, {images_text(grid.scores['n'])} an attack", fontsize=8)
    if not mean:
        names = [short(head_of(attack), 18) for attack in drawn]
        figure.legend(list(drawn.values()), names, loc="outside right center", frameon=False, fontsize=9)
    return figure


def draw_map(grid: Grid, pair: tuple[str, str], cells: pd.DataFrame) -> Figure:
    """A heat map of mean accuracy over two parameters."""
    table = 100 * cells["value"].unstack(0)
    figure = Figure(figsize=(2.6 + 0.62 * table.shape[1], 2.1 + 0.42 * table.shape[0]), dpi=DPI, layout="constrained")
    ax, low = figure.subplots(), table.min(axis=None)
    span = max(table.max(axis=None) - low, 1.0)  # points: cells that are nearly equal look alike
    # Half a span below the lowest, so that no cell is as pale as one without a figure.
    ax.imshow(table, cmap="Blues", vmin=low - span / 2, vmax=low + span, aspect="auto", origin="lower")
    for (j, i), value in np.ndenumerate(table.to_numpy()):
        text, dark = (f"{value:.0f}", value > low + span / 2) if np.isfinite(value) else (NONE, False)
        ax.text(i, j, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    across, down = (grid.parameters[key] for key in pair)
    ax.set_xticks(range(table.shape[1]), [text_of(across[i]) for i in table.columns], fontsize=8)
    ax.set_yticks(range(table.shape[0]), [text_of(down[i]) for i in table.index], fontsize=8)
    if not is_numeric(down):  # names are read from the top, as in a table
        ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    ax.set(xlabel=_symbol(grid, pair[0]), ylabel=_symbol(grid, pair[1]))
    figure.suptitle(f"{grid.sweep.name}: mean accuracy, %", fontsize=11, fontweight="bold")
    figure.supxlabel(f"over {_count(grid)}; {images_text(grid.scores['n'])} an attack", fontsize=8)
    return figure


def _finish(ax: Axes, grid: Grid, key: str) -> None:
    values = grid.parameters[key]
    texts = [text_of(value) for value in values]
    ax.set_xticks(values if is_numeric(values) else range(len(values)), texts, fontsize=8)
    ax.margins(x=0.05 if is_numeric(values) else 0.2)
    ax.tick_params(axis="x", rotation=35 if len("".join(texts)) > 30 else 0)
    ax.set_xlabel(_symbol(grid, key))
    plain_axes(ax)


def _symbol(grid: Grid, key: str) -> str:
    return SYMBOLS.get(grid.sweep.labels[key], grid.sweep.labels[key])
