"""The report of a sweep: the long CSV, best settings, sensitivities, and figures and tables of its parameters.

Jobs are compared only where they agree in all other parameters. So a grid that varies one parameter at a time gives one
line per parameter through the common point, and a full grid gives many lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dipguard.evaluation.metrics import wilson
from dipguard.files import write_text
from dipguard.reporting.canvas import DPI, line_style, plain_axes, save_figure, short
from dipguard.reporting.escape import NONE, escape_csv, escape_markdown
from dipguard.reporting.paper_figures import SOURCE, TABLE_3, head_of
from dipguard.reporting.sweep_jobs import STATES, Sweep, is_numeric, read_sweep, text_of
from dipguard.reporting.tables import markdown

MEAN = "mean"
"""Stands for the mean over all attacks, the paper's averaged accuracy."""
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

    - ``sweep.csv``: a row for each job, attack and defence;
    - ``figure6_mean.png``, ``figure7_columns.png``: accuracy against each parameter, mean and by attack;
    - ``table3_T_network.png``, ``map_<a>_<b>.png``: parameters that were varied together;
    - ``report.md``: what is missing or failed; for each defence that the parameters act on the best settings,
      sensitivities and tables with intervals; the other defences; the figures.

    Raises:
        FileNotFoundError: See `read_sweep`.
    """
    folder = Path(folder)
    sweep = read_sweep(folder)
    made = [write_text(folder / "sweep.csv", long_csv(sweep))]
    parts, figures = [f"# Sweep {escape_markdown(sweep.name)}", state_section(sweep)], []
    swept, fixed = _grids(sweep)
    for grid in swept:
        of = f": {escape_markdown(grid.defense)}" if len(sweep.defenses) > 1 else ""
        parts += [f"## Settings{of}", best_section(grid), f"## Sensitivity{of}", sensitivity_section(grid)]
        for pair in grid.pairs():
            parts += [f"## {pair_title(grid, pair)}{of}", pair_section(grid, pair)]
        for title, name, figure in _figures(grid):
            made.append(save_figure(figure, folder / f"{name}{f'_{grid.defense}' if of else ''}.png"))
            figures += [f"## {title}{of}", f"![{made[-1].stem}]({made[-1].name})"]
    if fixed:
        parts += ["## Defences that the parameters do not act on", fixed_section(fixed)]
    return [write_text(folder / "report.md", "\n\n".join(filter(None, parts + figures)) + "\n"), *made]


def summary(folder: str | Path) -> str:
    """The sweep in some lines, for a terminal: how many jobs are done, what failed, the best setting."""
    sweep = read_sweep(folder)
    lines = [f"sweep {sweep.name}: {state_section(sweep)}"]
    for grid in _grids(sweep)[0]:
        for _, best in grid.ranking().head(1).iterrows():
            setting = sweep.setting(best["job"], grid.parameters)
            lines.append(f"best mean accuracy of defence {grid.defense}: {best['value']:.1%} at {setting}")
    return "\n".join([*lines, f"report: {Path(folder) / 'report.md'}"])


class Grid:
    """What the jobs of a sweep say about one defence: ``parameters`` are those that act on it."""

    def __init__(self, sweep: Sweep, defense: str) -> None:
        self.sweep, self.defense, self.attacks = sweep, defense, sweep.attacks
        self.parameters = {key: values for key, values in sweep.parameters.items() if _acts_on(key, defense)}
        results = sweep.results[(sweep.results["defense"] == defense) & sweep.results["accuracy"].notna()]
        results = results.drop_duplicates(["job", "attack"], keep="last")  # the largest budget
        values = results.rename(columns={"accuracy": "value"})[["job", "attack", "value", "low", "high", "n"]]
        jobs = list(sweep.jobs.items())
        # A parameter's value is known by its position, which sorts as the values do.
        places = {
            key: {name: known.index(value) if (value := job.values[key]) in known else -1 for name, job in jobs}
            for key, known in self.parameters.items()
        }
        scores = pd.concat([values, _means(values, len(self.attacks))])
        scores = scores.join(pd.DataFrame(places, index=list(sweep.jobs)), on="job")
        self.scores = scores.drop_duplicates(["attack", *self.parameters])

    def of(self, attack: str) -> pd.DataFrame:
        """Accuracy of each job under an attack, or in the mean (``MEAN``).

        A row has ``job``, ``value``, ``low``, ``high``, ``n``, and under each parameter's key the position of its value
        in ``parameters``.
        """
        return self.scores[self.scores["attack"] == attack]

    def ranking(self) -> pd.DataFrame:
        """The jobs by their mean accuracy, the best first."""
        return self.of(MEAN).sort_values("value", ascending=False, kind="stable")

    def lines(self, key: str, attack: str = MEAN) -> pd.DataFrame:
        """Accuracy against a parameter while the others stay: a row for each setting of those, a column for each value.

        Settings with a single value are left out.
        """
        wide = self._wide(attack, key)["value"]
        return wide[wide.notna().sum(axis=1) > 1]

    def profile(self, key: str, attack: str = MEAN) -> pd.DataFrame:
        """Accuracy by the value of a parameter: rows with ``value``, ``low`` and ``high`` by the value's position.

        It is the mean over the settings of the other parameters that have most values, all of them the same.
        """
        known = self.lines(key, attack).notna()
        if not len(known):
            return pd.DataFrame(columns=["value", "low", "high"])
        longest = known[known.sum(axis=1) == known.sum(axis=1).max()]
        pattern = longest.value_counts().index[0]
        chosen = longest.index[(longest == list(pattern)).all(axis=1)]
        return self._wide(attack, key).loc[chosen].mean().unstack(0).dropna()

    def map(self, pair: tuple[str, str], attack: str = MEAN) -> pd.DataFrame | None:
        """Accuracy by two parameters that were varied together: rows with ``value``, ``low`` and ``high``.

        It is the mean over the settings of the others, for values that all of them have. A cross (each varied while the
        other stays) is no map: for a and b values it has at most a + b - 1 jobs.
        """
        wide = self._wide(attack, *pair)
        known = wide["value"].notna()
        sizes = sum(known.T.groupby(level=key).any().sum() for key in pair)
        tables = wide[known.sum(axis=1) > sizes - 1]
        return tables.dropna(axis=1).mean().unstack(0)[["value", "low", "high"]] if len(tables) else None

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Pairs of parameters that were varied together under some attack; numbers come before names."""
        for pair in combinations(sorted(self.parameters, key=lambda key: not is_numeric(self.parameters[key])), 2):
            if any(self.map(pair, attack) is not None for attack in self.attacks):
                yield pair

    def sensitivities(self) -> pd.DataFrame:
        """The position of the best and worst value of each parameter, the accuracy between them, the number of lines.

        The most important parameter comes first.
        """
        found = []
        for key in self.parameters:
            values = self.profile(key)["value"]
            if len(values) > 1:
                found.append((key, values.idxmax(), values.idxmin(), values.max() - values.min(), len(self.lines(key))))
        table = pd.DataFrame(found, columns=["key", "best", "worst", "range", "lines"])
        return table.sort_values("range", ascending=False, kind="stable")

    def _wide(self, attack: str, *keys: str) -> pd.DataFrame:
        """Value, low and high of each job: a row for each setting of the other parameters, columns by ``keys``."""
        others = [key for key in self.parameters if key not in keys]
        return self.of(attack).assign(_="").pivot_table(["value", "low", "high"], ["_", *others], keys, aggfunc="first")


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
    return means.assign(attack=MEAN, low=lows, high=highs)


def long_csv(sweep: Sweep) -> str:
    """A row for each job, attack and defence; a job without results has one row, with the reason."""
    taken = {*sweep.results.columns, "state", "problem"}
    names = {key: key if label in taken else label for key, label in sweep.labels.items()}
    rows = [
        {"job": name, "state": job.state, **{names[k]: v for k, v in job.values.items()}}
        for name, job in sweep.jobs.items()
    ]
    table = pd.DataFrame(rows, dtype=object).merge(sweep.results, on="job", how="left")
    table["problem"] = [sweep.jobs[name].problem for name in table["job"]]
    table = table.map(lambda value: escape_csv(value) if isinstance(value, str) else value)
    return str(table.to_csv(index=False, lineterminator="\n"))


def state_section(sweep: Sweep) -> str:
    """How many jobs are done, and for the others what is missing or went wrong."""
    states = pd.Series([job.state for job in sweep.jobs.values()]).value_counts().reindex(STATES, fill_value=0)
    head = ", ".join(f"{count} {state}" for state, count in states.items() if count or state == "done")
    lines = [f"{len(sweep.jobs)} jobs: {head}."]
    rest = {name: job for name, job in sweep.jobs.items() if job.state != "done"}
    texts = [f"{job.state}: {sweep.setting(name)} ({name}): {job.problem}" for name, job in rest.items()]
    lines += ["", *(f"- {escape_markdown(text)}" for text in texts)] if texts else []
    counts = [sum(job.store.get(name, 0) for job in sweep.jobs.values()) for name in ("fitted", "replayed", "decided")]
    if any(counts):
        lines += ["", f"Fits, in images: {counts[0]} made, {sum(counts[1:])} taken from the store."]
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
        + (" These images cannot tell them apart." if near > 1 else "")
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


def sensitivity_section(grid: Grid) -> str:
    """Best and worst value of each parameter and the points between them."""
    rows = []
    for _, one in grid.sensitivities().iterrows():
        shares, values = grid.profile(one["key"]), grid.parameters[one["key"]]
        ends = [text for at in (one["best"], one["worst"]) for text in (text_of(values[at]), _interval(shares.loc[at]))]
        rows.append([grid.sweep.labels[one["key"]], *ends, f"{100 * one['range']:.1f}", str(one["lines"])])
    if not rows:
        return "No parameter was varied alone yet."
    head = ["parameter", "best value", "mean accuracy, %", "worst value", "mean accuracy, %", "range, points", "lines"]
    note = (
        "Accuracy with its 95 % interval; the range is between the best and the worst value while all other parameters "
        "stay, in the mean over so many lines. A parameter's best value is the best of this grid, on these images."
    )
    return f"{note}\n\n{markdown(head, rows)}"


def pair_section(grid: Grid, pair: tuple[str, str]) -> str:
    """A table of two parameters: mean accuracy in percent with 95 % intervals, and the paper's where it has them."""
    across, down = (grid.parameters[key] for key in pair)
    cells = grid.map(pair)
    if cells is None or not len(cells):
        return "No job has all attacks yet."
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
    return f"{len(grid.attacks)} attack{'s' * (len(grid.attacks) != 1)}"


def _interval(share: pd.Series) -> str:
    return f"{100 * share['value']:.1f} ({100 * share['low']:.0f}{NONE}{100 * share['high']:.0f})"


def pair_title(grid: Grid, pair: tuple[str, str]) -> str:
    """Both labels, and the paper's table if it varies the same."""
    labels = [grid.sweep.labels[key] for key in pair]
    return " x ".join(labels) + (" (Table 3)" if set(labels) == TABLE_3_LABELS else "")


def _figures(grid: Grid) -> Iterator[tuple[str, str, Figure]]:
    """Title, file name and figure of all that can be drawn."""
    if (figure := draw_lines(grid, mean=True)) is not None:
        yield "Mean accuracy (Figure 6)", "figure6_mean", figure
    if len(grid.attacks) > 1 and (figure := draw_lines(grid, mean=False)) is not None:
        yield "Accuracy by attack (Figure 7)", "figure7_columns", figure
    for pair in grid.pairs():
        labels = [grid.sweep.labels[key] for key in pair]
        name = "_".join("".join(c if c.isalnum() else "_" for c in label) for label in labels)
        kind = "table3" if set(labels) == TABLE_3_LABELS else "map"
        yield pair_title(grid, pair), f"{kind}_{name}", draw_map(grid, pair)


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
    figure, axes = _panels(size, down, across, len(keys), sharey=True)
    drawn = {}
    for ax, key in zip(axes, keys, strict=True):
        for i, attack in enumerate(attacks):
            shares, style = 100 * grid.profile(key, attack), line_style(i)
            if len(shares) > 1:
                values = grid.parameters[key]  # numbers are drawn at their value, everything else side by side
                x = [values[at] if is_numeric(values) else at for at in shares.index]
                ax.fill_between(x, shares["low"], shares["high"], color=style["color"], alpha=0.1, linewidth=0)
                (drawn[attack],) = ax.plot(x, shares["value"], linewidth=1.5, markersize=4.5, **style)
        _finish(ax, grid, key)
    for ax in axes[::across]:
        ax.set_ylabel("accuracy, %")
    title = f"mean accuracy over {_count(grid)}" if mean else "accuracy by attack"
    _caption(figure, f"{grid.sweep.name}: {title}", f"bands: 95 % Wilson intervals, {_images(grid)}")
    if not mean:
        names = [short(head_of(attack), 18) for attack in drawn]
        figure.legend(list(drawn.values()), names, loc="outside right center", frameon=False, fontsize=9)
    return figure


def draw_map(grid: Grid, pair: tuple[str, str]) -> Figure:
    """A map of two parameters: a panel for the mean and one for each attack."""
    attacks = [MEAN, *grid.attacks] if len(grid.attacks) > 1 else grid.attacks
    maps = {attack: cells for attack in attacks if (cells := grid.map(pair, attack)) is not None}
    places = [sorted({i for cells in maps.values() for i in cells.index.get_level_values(key)}) for key in pair]
    across = min(3, len(attacks))
    down = ceil(len(attacks) / across)
    wide, tall = 1.3 + 0.62 * len(places[0]), 1.1 + 0.42 * len(places[1])
    size = (max(4.6, across * max(wide, 2.3)), 1.0 + down * max(tall, 1.8))
    figure, axes = _panels(size, down, across, len(attacks))
    texts = [[text_of(grid.parameters[key][i]) for i in at] for key, at in zip(pair, places, strict=True)]
    for ax, attack in zip(axes, attacks, strict=True):
        values = maps[attack]["value"].unstack(0) if attack in maps and len(maps[attack]) else pd.DataFrame()
        _draw_map(ax, 100 * values.reindex(index=places[1], columns=places[0]).to_numpy(dtype=float))
        ax.set_xticks(range(len(texts[0])), texts[0], fontsize=8)
        ax.set_yticks(range(len(texts[1])), texts[1], fontsize=8)
        if not is_numeric(grid.parameters[pair[1]]):  # names are read from the top, as in a table
            ax.invert_yaxis()
        ax.set_title("mean" if attack == MEAN else head_of(attack), fontsize=10)
        ax.set(xlabel=_symbol(grid, pair[0]), ylabel=_symbol(grid, pair[1]))
    _caption(figure, f"{grid.sweep.name}: accuracy, %", f"{_images(grid)}; dark is a panel's highest")
    return figure


def _panels(size: tuple[float, float], down: int, across: int, count: int, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, **options).ravel())
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes[:count]


def _caption(figure: Figure, title: str, note: str) -> None:
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.supxlabel(note, fontsize=8)


def _draw_map(ax: Axes, values: np.ndarray) -> None:
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    span = max(high - low, 1.0)  # points: cells that are nearly equal look alike
    # Half a span below the lowest, so that no cell is as pale as one without a figure.
    ax.imshow(values, cmap="Blues", vmin=low - span / 2, vmax=low + span, aspect="auto", origin="lower")
    for (j, i), value in np.ndenumerate(values):
        text, dark = (f"{value:.0f}", value > low + span / 2) if np.isfinite(value) else (NONE, False)
        ax.text(i, j, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    ax.spines[:].set_visible(False)


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


def _images(grid: Grid) -> str:
    low, high = int(grid.scores["n"].min()), int(grid.scores["n"].max())
    return f"{low} image{'s' * (low != 1)} an attack" if low == high else f"{low} to {high} images an attack"
