"""A matrix of attacks and defences, and the work on one of its cells; what is in the store is not done again.

Entries of the store, each under the digest of everything that it depends on:

    attacks   attacked images of an attack: once for all defences, or once per defence if the attack is adaptive
    cells     purified images and decision traces of a cell's chunk; further draws' decisions; a finished cell's figures

The run folder has a copy of each trace that is kept, ``traces/<attack>/<defense>/<index>.safetensors``.
"""

from __future__ import annotations

import csv
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import hydra.utils
import numpy as np
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger
from torch import Tensor

from dipguard.attacks.best_found import joined
from dipguard.attacks.target import JUDGE, AdaptiveAttack, fresh_indices
from dipguard.config import RunConfig
from dipguard.data import ImageSet
from dipguard.defenses import DefenseResult
from dipguard.evaluation.cell import NOT_RUN, Cell, CellResult, Target, results_of
from dipguard.evaluation.metrics import decide, psnr, similarity
from dipguard.files import file_digest, write_bytes
from dipguard.store import Entry, Store, digest_of

_log = logging.getLogger(__name__)

Row: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Takes the step of a fit and its metrics."""


class Curves(Logger):
    """The curves of a chunk's fits: a Lightning logger that keeps all ``rows``, and passes each one on."""

    name = version = property(lambda self: None)

    def __init__(self, row: Row | None = None) -> None:
        super().__init__()
        self.row = row
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Keep one row."""
        self.rows.append((step or 0, {name: float(value) for name, value in metrics.items()}))
        if self.row is not None:
            self.row(*self.rows[-1])

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a run's log has the run's settings, not those of each Trainer."""


@dataclass(eq=False)
class Matrix:
    """A checked matrix, ready to run.

    ``targets`` are by the defence's label (``baseline`` is another victim without any), ``cells`` attack by attack, and
    ``results`` by the labels of attack and defence, one for each budget.
    """

    config: RunConfig
    folder: Path
    clean: ImageSet
    device: torch.device
    store: Store
    targets: dict[str, Target]
    cells: list[Cell]
    results: dict[tuple[str, str], list[CellResult]] = field(default_factory=dict)
    _attacked: dict[str, Entry] = field(default_factory=dict)
    _traces: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)  # digests by the image's index

    @property
    def chunk_size(self) -> int:
        """Images of a cell that are purified, and stored, together."""
        return self.config.chunk or (256 if self.device.type == "cuda" else 32)

    def cell(self, attack: str, defense: str) -> Cell:
        """The cell of an attack and a defence, by their labels."""
        return next(cell for cell in self.cells if cell.place == (attack, defense))

    def attacked(self, attack: str, defense: str, *, snapshot: int = -1) -> Tensor:
        """The attacked images [n, 3, H, W] of a cell, stored or made now, for the budget of this number."""
        return torch.from_numpy(self.attack_entry(self.cell(attack, defense)).arrays["images"][snapshot])

    def reconstructions(self, attack: str, defense: str, *, snapshot: int = -1) -> Tensor:
        """The purified images [n, 3, H', W'] of a cell, stored or made now, for the budget of this number."""
        cell = self.cell(attack, defense)
        summary = self.store.read("cells", cell.summary_key)
        known = self.attack_entry(cell) if summary is None else summary
        number, size = range(len(known.header["snapshots"]))[snapshot], known.header.get("chunk", self.chunk_size)
        parts = [self.chunk(cell, number, part) for part in parts_of(len(cell.clean), size)]
        return torch.from_numpy(np.concatenate([part.arrays["images"] for part in parts]))

    def curves(self, cell: Cell) -> Iterator[Sequence[tuple[int, dict[str, float]]]]:
        """What the fits of each stored chunk have logged, for the last budget: steps and metrics."""
        summary = self.store.read("cells", cell.summary_key)
        if summary is not None:
            last, size = len(summary.header["snapshots"]) - 1, summary.header["chunk"]
            for part in parts_of(len(cell.clean), size):
                entry = self.store.read("cells", cell.sub_key("chunk", last, part.start, part.stop))
                yield () if entry is None else entry.header["curves"]

    def traces(self, cell: Cell) -> Iterator[tuple[int, Path]]:
        """The files of a finished cell's traces that are kept, each after the position of its image."""
        digests = self._traces.get(cell.place, {})
        for position, index in enumerate(cell.clean.indices.tolist()):
            path = self.traces_path(*cell.place, index)
            # Those of other settings may lie in their place.
            if str(index) in digests and _is_as_written(path, digests[str(index)]):
                yield position, path

    def traces_path(self, attack: str, defense: str, index: int) -> Path:
        """The file of an image's decision trace; it exists if the defence leaves traces and they are kept."""
        return self.folder / "traces" / attack / defense / f"{index:06d}.safetensors"

    def load(self) -> None:
        """Read what is known of each cell from the store."""
        for cell in self.cells:
            if cell.place not in self.results or self.results[cell.place][0].status == NOT_RUN:
                self.results[cell.place] = self._known(cell)

    def attack_entry(self, cell: Cell, *, tell: Callable[[int], object] | None = None) -> Entry:
        """A cell's attacked images: ``images`` [S, n, 3, H, W] for S budgets, ``decisions`` and ``ssim`` [S, n].

        If they are made now, by an adaptive attack, ``tell`` hears how many images each of its looks has purified.
        """
        if cell.attack_key not in self._attacked:
            self._attacked.clear()  # the next cells have the same, or none that was before
            counts, key = self.store.counts, cell.attack_key
            before = counts["attacked"]
            self._attacked[key] = self.store.arrays("attacks", key, lambda: self._attack(cell, tell))
            if counts["attacked"] == before:
                counts["attacks_found"] += len(cell.clean)
            if self.store.file("attacks", key).is_file():  # not where the disk was full
                for batch in self._batches(cell):  # they are a part of the whole now
                    self.store.remove("attacks", batch)
        return self._attacked[cell.attack_key]

    def chunk(
        self, cell: Cell, snapshot: int, part: slice, *, progress: Callback | None = None, row: Row | None = None
    ) -> Entry:
        """Some images of a cell, purified: ``images`` [B, 3, H', W'] and ``used`` [B]; stored, or made now.

        ``snapshot`` is the number of the budget. The callback ``progress`` comes before those of the config. ``row`` is
        given the curves of the fits, also if they were made earlier.
        """
        key, curves = cell.sub_key("chunk", snapshot, part.start, part.stop), Curves(row)

        def make() -> Entry:
            self._refuse_in_a_rebuild(cell)
            # A cell has the traces of one budget.
            last = snapshot == len(self.attack_entry(cell).header["snapshots"]) - 1
            result = self._defend(cell, snapshot, part, progress, logger=curves)
            files = self._save_traces(cell, result, part) if last else {}
            about = {
                "what": f"{cell.label} x {cell.target.label}, images {part.start} to {part.stop - 1}",
                "reasons": result.reasons,
                "seconds": result.seconds,
                "curves": curves.rows,
                "traced": last and bool(result.traces),
                "traces": {index: file_digest(path) for index, path in files.items()},
            }
            arrays = {"images": result.reconstructions.cpu().numpy(), "used": np.array(result.used, dtype=np.int64)}
            content = {f"trace {index}": np.fromfile(path, dtype=np.uint8) for index, path in files.items()}
            return Entry({**arrays, **content}, about)

        entry = self.store.arrays("cells", key, make)
        if self._lacks_traces(cell, entry, part):
            with self.store.claim([key]):
                entry = make()
                self.store.write("cells", key, entry.arrays, entry.header)  # in the place of the one without
        if row is not None and not curves.rows:  # made earlier
            for step, metrics in entry.header["curves"]:
                row(step, metrics)
        for index in self._lost_traces(cell, entry, part):
            write_bytes(self.traces_path(*cell.place, int(index)), entry.arrays[f"trace {index}"].tobytes())
        return Entry({name: entry.arrays[name] for name in ("images", "used")}, entry.header)

    def draw(self, cell: Cell, snapshot: int, part: slice, number: int, progress: Callback | None = None) -> Entry:
        """``decisions`` [B] on some images of a cell under the further draw ``number``, from 1; stored, or made now."""

        def make() -> Entry:
            result = self._defend(cell, snapshot, part, progress, draw=number)
            what = f"{cell.label} x {cell.target.label}, images {part.start} to {part.stop - 1}, draw {number}"
            decisions = decide(cell.target.victim, result.reconstructions).numpy()
            return Entry({"decisions": decisions}, {"what": what, "seconds": sum(result.seconds.values())})

        return self.store.arrays("cells", cell.sub_key("draw", number, snapshot, part.start, part.stop), make)

    def finish(self, cell: Cell, chunks: Sequence[Sequence[Entry]], *, progress: Callback | None = None) -> None:
        """Compute the figures of a cell from its chunks (one sequence for each budget), and store them.

        The further draws that it is judged by are made first; ``progress`` as in `chunk`.
        """
        attacked, clean = self.attack_entry(cell), cell.clean.images
        arrays, seconds = defaultdict[str, list[Any]](list), []
        for snapshot, parts in enumerate(chunks):
            images = torch.from_numpy(np.concatenate([part.arrays["images"] for part in parts]))
            same = images.shape == clean.shape
            comparable = images if same else torch.nn.functional.interpolate(images, clean.shape[-2:], mode="area")
            arrays["decisions"].append(decide(cell.target.victim, images).numpy())
            arrays["ssim"].append(similarity(comparable, clean).numpy())
            arrays["psnr"].append(psnr(comparable, clean).numpy())
            arrays["used"].append(np.concatenate([part.arrays["used"] for part in parts]))
            names = parts[0].header["seconds"]
            seconds.append({name: sum(part.header["seconds"][name] for part in parts) for name in names})
            if cell.judge > 1:
                places = parts_of(len(clean), self.chunk_size)
                entries = [[self.draw(cell, snapshot, p, n, progress) for n in range(1, cell.judge)] for p in places]
                arrays["draws"].append(np.hstack([[e.arrays["decisions"] for e in part] for part in entries]))
                seconds[-1]["judge"] = sum(entry.header["seconds"] for part in entries for entry in part)
        given = {f"{name}_given": attacked.arrays[name] for name in ("decisions", "ssim")}
        if cell.source is not cell.target:
            each = (torch.from_numpy(images) for images in attacked.arrays["images"])
            given["decisions_given"] = np.stack([decide(cell.target.victim, images).numpy() for images in each])
        made = {name: np.stack(values) for name, values in arrays.items()} | given
        headers = [[part.header for part in parts] for parts in chunks]
        about = {
            "what": f"{cell.label} x {cell.target.label}: {len(clean)} images",
            "snapshots": attacked.header["snapshots"],
            "attack": {name: attacked.header[name] for name in ("seconds", "spent", "history", "last_history", "flat")},
            "reasons": [[reason for part in parts for reason in part["reasons"]] for parts in headers],
            "seconds": seconds,
            "chunk": self.chunk_size,
            "traced": headers[-1][0]["traced"],
            "traces": {index: file for part in headers[-1] for index, file in part["traces"].items()},
        }
        self.store.write("cells", cell.summary_key, made, about)
        self.results[cell.place], self._traces[cell.place] = results_of(cell, Entry(made, about)), about["traces"]

    def _defend(
        self, cell: Cell, snapshot: int, part: slice, progress: Callback | None, *, draw: int = 0, **options: Any
    ) -> DefenseResult:
        """Purify some images of a cell under a draw of the defence; 0 is the evaluation's own."""
        callbacks = [] if progress is None else [progress]
        callbacks += [hydra.utils.instantiate(node) for node in self.config.callbacks.values()]
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                number = f"{draw}-{snapshot}-{part.start}"
                callback.dirpath = str(self.folder.joinpath("checkpoints", *cell.place, number))
        images = torch.from_numpy(self.attack_entry(cell).arrays["images"][snapshot][part]).to(self.device)
        defense, indices = cell.defense, cell.clean.indices[part]
        if draw > 0:  # without a store: these fits are used once
            defense, indices = cell.target.bare, fresh_indices(indices, JUDGE + draw)
        return defense.defend(images, indices=indices, callbacks=callbacks, **options)

    def _known(self, cell: Cell) -> list[CellResult]:
        # A rebuild runs nothing, so what failed stays so.
        status = self._failures.get(cell.key, NOT_RUN) if self.config.rebuild else NOT_RUN
        unknown = [CellResult(cell, cell.why or status, cell.eps_255)]

        def parse(summary: Entry) -> list[CellResult]:
            whole = slice(0, len(cell.clean))
            lacks = self._lacks_traces(cell, summary, whole) or self._lost_traces(cell, summary, whole)
            # Only a run makes traces again; tables need none.
            if lacks and not self.config.rebuild:
                return unknown
            self._traces[cell.place] = summary.header["traces"]
            return results_of(cell, summary)

        known = None if cell.why is not None else self.store.read_as("cells", cell.summary_key, parse)
        return unknown if known is None else known

    @cached_property
    def _failures(self) -> dict[str, str]:
        """Why cells failed, by their keys, from the results.csv in the folder."""
        with suppress(FileNotFoundError), (self.folder / "results.csv").open(newline="", encoding="utf-8") as file:
            rows = [(row.get("key") or "", row.get("status") or "") for row in csv.DictReader(file)]
            return {key: status for key, status in rows if status.startswith("failed")}
        return {}

    def _attack(self, cell: Cell, tell: Callable[[int], object] | None) -> Entry:
        """Attack a cell's images; its batches, which may take hours, are stored one by one."""
        assert cell.attack is not None
        self._refuse_in_a_rebuild(cell)
        on = f" x {cell.source.label}" if cell.adaptive else ""
        _log.info("attack %s%s: %d images", cell.label, on, len(cell.clean))
        if not (batches := self._batches(cell)):
            return self._attack_batch(cell, slice(0, len(cell.clean)), tell)
        whole = join_batches([
            self.store.arrays("attacks", key, partial(self._attack_batch, cell, part, tell))
            for key, part in batches.items()
        ])  # fmt: skip
        whole.header["what"] = f"{cell.label}: {len(cell.clean)} images of {cell.clean.name}"
        return whole

    def _refuse_in_a_rebuild(self, cell: Cell) -> None:
        if self.config.rebuild:
            raise RuntimeError(
                f"`rebuild` runs nothing, but the store has no images of {cell.label} x {cell.target.label} any more: "
                "leave `rebuild` out, or draw none of evaluate.py's (`figures=0`)"
            )

    @staticmethod
    def _batches(cell: Cell) -> dict[str, slice]:
        """The batches of a cell's attack by their keys, if it has several."""
        size = len(cell.clean) if cell.attack is None else cell.attack.batch_size
        parts = list(parts_of(len(cell.clean), size))
        return {digest_of([cell.attack_key, p.start, p.stop]): p for p in parts} if len(parts) > 1 else {}

    def _attack_batch(self, cell: Cell, part: slice, tell: Callable[[int], object] | None) -> Entry:
        assert cell.attack is not None
        attack, clean = cell.attack, cell.clean.images[part]
        before, start = asdict(attack.spent), time.perf_counter()
        images, labels = clean.to(self.device), cell.clean.labels[part].to(self.device)
        if isinstance(attack, AdaptiveAttack):
            attack.target.tell = tell
        made = attack.snapshots(images, labels, indices=cell.clean.indices[part])
        about = {
            "what": f"{cell.label}: {len(clean)} images of {cell.clean.name}",
            "settings": attack.settings,
            "snapshots": [list(snapshot) for snapshot in made],
            "seconds": {"attack": time.perf_counter() - start},
            "spent": {name: value - before[name] for name, value in asdict(attack.spent).items()},
            "history": attack.history,
            "last_history": attack.last_history,
            "flat": attack.flat,
        }
        self.store.counts["attacked"] += len(clean)
        attacked = [one.cpu() for one in made.values()]
        arrays = {
            "images": attacked,
            "decisions": [decide(cell.source.victim, one) for one in attacked],
            "ssim": [similarity(one, clean) for one in attacked],
        }
        return Entry({name: torch.stack(tensors).numpy() for name, tensors in arrays.items()}, about)

    def _save_traces(self, cell: Cell, result: DefenseResult, part: slice) -> dict[str, Path]:
        """Write the traces of a chunk that are to be kept; the files by index."""
        kept = result.traces[: len(self._kept(cell, part))]
        return {str(trace.index): trace.save(self.traces_path(*cell.place, trace.index)) for trace in kept}

    def _kept(self, cell: Cell, part: slice) -> list[int]:
        """The indices of the first of some images of a cell, whose traces are to be kept: all, or as figures show."""
        stop = part.stop if self.config.keep_traces else min(part.stop, self.config.figures)
        indices: list[int] = cell.clean.indices[part.start : max(part.start, stop)].tolist()
        return indices

    def _lacks_traces(self, cell: Cell, entry: Entry, part: slice) -> bool:
        """Whether an entry of some images of a cell lacks traces that are to be kept, and a run would make them."""
        found, may_run = entry.header["traces"], entry.header["traced"] and not self.config.rebuild
        return may_run and any(str(index) not in found for index in self._kept(cell, part))

    def _lost_traces(self, cell: Cell, entry: Entry, part: slice) -> list[str]:
        """The indices of an entry's traces that are to be kept, whose files are not in the run folder as written."""
        kept = {str(index) for index in self._kept(cell, part)}
        digests = [(i, digest) for i, digest in entry.header["traces"].items() if i in kept]
        return [i for i, digest in digests if not _is_as_written(self.traces_path(*cell.place, int(i)), digest)]


def _is_as_written(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def parts_of(count: int, size: int) -> Iterator[slice]:
    """The chunks of ``count`` images."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def join_batches(batches: Sequence[Entry]) -> Entry:
    """The entry of an attack's images from those of its batches, in order."""
    first, headers = batches[0], [batch.header for batch in batches]
    sizes = [batch.arrays["images"].shape[1] for batch in batches]
    gradients = [about["spent"]["gradients"] for about in headers]

    whole = dict(first.header)
    for name in ("history", "last_history"):
        if whole[name]:
            # The look at the start is no longer known, and is left out again.
            counts = [[0, *(round(x * n) for x in about[name])] for about, n in zip(headers, sizes, strict=True)]
            whole[name] = joined(counts, total=sum(sizes))
    for name in ("seconds", "spent"):
        whole[name] = {key: sum(about[name][key] for about in headers) for key in first.header[name]}
    if any(about["flat"] is not None for about in headers):
        flat = sum(about["flat"] * n for about, n in zip(headers, gradients, strict=True) if about["flat"] is not None)
        whole["flat"] = flat / max(1, sum(gradients))
    arrays = {name: np.concatenate([batch.arrays[name] for batch in batches], axis=1) for name in first.arrays}
    return Entry(arrays, whole)
