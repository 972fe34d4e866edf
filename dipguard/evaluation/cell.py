"""The cells of a matrix: an attack on a classifier behind a defence, what its result depends on, and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dipguard.attacks import Attack, Cost
from dipguard.config import ATTACK_KEYS, NODE_KEYS, name_of, node_of
from dipguard.data import ImageSet
from dipguard.defenses import Defense
from dipguard.defenses.dip import DIPDefense
from dipguard.store import Entry, digest_of

CLEAN, WORST, BASELINE = "clean", "worst_case", "baseline"
"""Labels with a meaning of their own: the attack suite's clean images and worst case, and the undefended baseline."""
CONTROL, LARGE_EPS = "control", "large_eps"
"""Attacks of a suite that check the others: noise, and an attack that may change almost anything."""
BLACK_BOX = ("defended_square", "hopskipjump")
"""Adaptive attacks that only query the defended classifier."""
BLIND = ("none", "noise", "square")
"""Static attacks that take no gradient."""
DONE, NOT_RUN = "done", "not run yet"
JUDGED = ("accuracy", "worst", "vote", "known")
"""How right an image is over its draws: in what share of them, whether in all, by their majority, and in the first, the
evaluation's own, which an attack with ``draws="fixed"`` knows."""
FIGURES = ("decisions_given", "decisions", "ssim_given", "ssim", "psnr", "used")


@dataclass(frozen=True, eq=False)
class Target:
    """A classifier behind a defence.

    Attributes:
        node: The defence's settings; None for the baseline, which has no defence.
        victim: The classifier. It is attacked, and decides on the purified images.
        surrogate: Name of the classifier that the defence asks instead, empty if it asks the victim.
        bare: The defence without a store, for adaptive attacks: their many fits are used once.
        depends: Everything that the purified images depend on besides the given ones: JSON values.
        decisions_clean: The victim's decisions on all clean images, [N] int64.
    """

    label: str
    node: Mapping[str, Any] | None
    victim: nn.Module
    victim_name: str
    surrogate: str
    defense: Defense
    bare: Defense
    depends: dict[str, Any]
    decisions_clean: Tensor

    @property
    def cut(self) -> str:
        """How far the fit is shorter than by default, in words; empty if it is not, or T changes nothing."""
        if "T" not in self.bare.settings:
            return ""
        node, bare = self.node or {}, self.bare
        default = node_of("defense", node["name"]).get("T") if "_target_" not in node and "name" in node else None
        if isinstance(bare, DIPDefense) and bare.PRESETS:
            default = bare.PRESETS[bare.preset].get("T")
        given = node.get("T")
        return f"T {given:,} of {default:,}" if default and given and given < default else ""


@dataclass(frozen=True, eq=False)
class Cell:
    """One attack on one target.

    Attributes:
        node: The attack's settings.
        clean: The images that it starts from.
        options: The attack's options for this target.
        attack: The attack; None if it does not apply, and ``why`` says why not.
        eps_255: Its budget in levels of 0 to 255; None if it has no L-infinity bound.
        suite: Whether it belongs to the attack suite.
        source: The target that the attack's images are made on: ``target``, or another one for all targets alike.
        attack_key: Digest of everything that the attacked images depend on.
        key: Digest of everything that the result depends on, with the evaluation's own draw.
        judge: Draws of the defence that each image is judged by.
        cost: What an adaptive attack will cost, at most; nothing if its images are made on another target.
    """

    label: str
    node: dict[str, Any]
    target: Target
    clean: ImageSet
    options: dict[str, Any]
    attack: Attack | None
    why: str | None
    eps_255: float | None
    suite: bool
    source: Target
    attack_key: str = ""
    key: str = ""
    judge: int = 1
    cost: Cost = field(default_factory=Cost)

    @property
    def place(self) -> tuple[str, str]:
        """The labels of attack and defence."""
        return self.label, self.target.label

    def sub_key(self, *parts: str | int) -> str:
        """The key of another stored entry of this cell; ``parts`` say which."""
        return digest_of([self.key, *parts])

    @property
    def summary_key(self) -> str:
        """The key of the cell's figures."""
        return self.key if self.judge == 1 else self.sub_key("judged", self.judge)

    @property
    def budgets(self) -> int:
        """Number of budgets that the attack gives images for."""
        return len(self.options.get("budgets") or [0]) * len(self.options.get("radii_255") or [0])

    @property
    def judging(self) -> Cost:
        """Cost of the purifications that the cell is judged by, for one budget."""
        count = len(self.clean) * self.judge
        return Cost(count, count * self.defense.steps_per_image, count)

    @property
    def name(self) -> str:
        """The attack's name."""
        return name_of(self.node)

    @property
    def kind(self) -> str:
        """The name of the attack itself, also where the node points to its class; empty if it does not apply."""
        return "" if self.attack is None else self.attack.name

    @property
    def adaptive(self) -> bool:
        """Whether the attack knows the defence."""
        return self.attack is not None and self.attack.adaptive

    @property
    def defense(self) -> Defense:
        """The defence that purifies the attacked images."""
        return self.target.bare if self.adaptive else self.target.defense

    @property
    def check(self) -> str:
        """The check that the attack is made for; empty if it is an attack in its own right."""
        return str(self.node.get("check") or "")

    @property
    def white_box(self) -> bool:
        """Whether the attack takes gradients of the very system that it meets."""
        if self.adaptive:
            return self.kind not in BLACK_BOX and self.source is self.target
        return self.target.defense.name == "none" and self.kind not in BLIND

    @property
    def cut(self) -> str:
        """What the node's ``full`` has more of than the attack, in words; for clean images, the target's ``cut``."""
        if self.name == "none":
            return self.target.cut
        full = dict(self.node.get("full") or {})
        if not self.target.defense.random:
            full.pop("eot_iter", None)  # a deterministic system has one draw, and each look at it is the same
            full.pop("final_looks", None)
        made = {} if self.attack is None else self.attack.settings
        given = {name: made[name] for name in full if name in made}
        less = {n: v for n, v in given.items() if v != full[n] and not (isinstance(v, int | float) and v > full[n])}
        parts = [f"{n} {text_of(v)} of {text_of(full[n])}" for n, v in less.items()]
        fewer = len(self.clean) < len(self.target.decisions_clean)
        return ", ".join([*parts, *([f"the first {len(self.clean)} images"] if fewer else [])])


_NONE, _NO_DECISION = torch.zeros(0), torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class CellResult:
    """The result of a cell, or one of them for an attack that gives images for several budgets. All is on the CPU.

    Attributes:
        status: ``done``, or why there are no figures; then all tensors are empty.
        budget: Iterations or queries, if the attack gives images for several.
        decisions_given, ssim_given: The victim's decisions on the attacked images, and their SSIM to the clean ones.
        decisions, ssim, psnr: The same of the purified images, and their PSNR in dB, infinite for equal images.
        used: Number of images that each purified image was averaged from.
        draws: The victim's decisions under each further draw of the defence, [judge - 1, n].
        reasons: Why each purified image looks as it does.
        seconds: Wall time by part: ``attack``, those of the defence, ``start``, ``fit`` and ``decide``, and ``judge``
            for all further draws.
        history: Share of images that withstand after each step of the attack, the best step so far counting. Empty for
            an attack that was made on another target, as are the two below.
        last_history: The same, each step on its own.
        flat: Share of the gradients that were exactly zero; None if the attack does not tell.
    """

    cell: Cell
    status: str
    eps_255: float | None = None
    budget: int | None = None
    decisions_given: Tensor = _NO_DECISION
    decisions: Tensor = _NO_DECISION
    ssim_given: Tensor = _NONE
    ssim: Tensor = _NONE
    psnr: Tensor = _NONE
    used: Tensor = _NO_DECISION
    draws: Tensor = _NO_DECISION
    reasons: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    spent: Cost = field(default_factory=Cost)
    history: Sequence[float] = ()
    last_history: Sequence[float] = ()
    flat: float | None = None

    @property
    def done(self) -> bool:
        """Whether there are figures."""
        return self.status == DONE

    @property
    def right(self) -> Tensor:
        """Share of an image's draws that are classified correctly, float [n] in [0, 1]."""
        return self.judged("accuracy")

    def judged(self, by: str) -> Tensor:
        """How right each image is by a figure of `JUDGED`, float64 [n] in [0, 1]; a tied vote is not right."""
        decisions = torch.stack([self.decisions, *self.draws])
        right = decisions == self.cell.clean.labels[: len(self.decisions)]
        if by == "vote":
            votes = (decisions[:, None] == decisions).sum(dim=1)  # for each draw, how many agree with it
            return (right.sum(dim=0) > (votes * ~right).amax(dim=0)).double()
        if by == "known":
            return right[0].double()
        return right.all(dim=0).double() if by == "worst" else right.double().mean(dim=0)

    @property
    def attacks(self) -> bool:
        """Whether it counts for the suite's worst case: done, and not a check."""
        return self.done and self.cell.suite and not self.cell.check and self.cell.label != CLEAN


def results_of(cell: Cell, summary: Entry) -> list[CellResult]:
    """The results of a finished cell, one for each budget."""
    about, made = summary.header, []
    if not 0 < len(about["snapshots"]) == len(summary.arrays["decisions"]):
        raise ValueError(f"there must be figures for each budget, got budgets {about['snapshots']}")
    attack: dict[str, Any] = {name: about["attack"][name] for name in ("history", "last_history", "flat")}
    attack["spent"] = Cost(**about["attack"]["spent"])
    before = about["attack"]["seconds"]
    if cell.source is not cell.target:  # its course, and what it cost, are those of the row where it was made
        attack = {"spent": Cost(), "history": (), "last_history": (), "flat": None}
        before = dict.fromkeys(before, 0.0)
    for number, (eps_255, budget) in enumerate(about["snapshots"]):
        own: dict[str, Any] = {name: torch.from_numpy(summary.arrays[name][number]) for name in FIGURES}
        own |= {"eps_255": eps_255, "budget": budget, "reasons": about["reasons"][number]}
        if lengths := {name: len(own[name]) for name in (*FIGURES, "reasons") if len(own[name]) != len(cell.clean)}:
            raise ValueError(f"there are {len(cell.clean)} images, got {lengths}")
        if cell.judge > 1:
            own["draws"] = torch.from_numpy(summary.arrays["draws"][number])
        own["seconds"] = {**before, **about["seconds"][number]}
        made.append(CellResult(cell, DONE, **own, **attack))
    return made


def fitting_options(
    node: Mapping[str, Any], target: Target, *, kind: type[Attack], source: Target
) -> tuple[dict[str, Any], str | None]:
    """The options of an attack (settings ``node``) for a target, and why it does not apply to it (None: it does).

    ``source`` is the target that it is made on.
    """
    defense = source.defense
    options = {key: value for key, value in node.items() if key not in (*NODE_KEYS, *ATTACK_KEYS)}
    if missing := target.defense.unavailable or defense.unavailable:
        return options, missing
    if node.get("only") is not None and target.label not in node["only"]:
        return options, "left out"
    if not kind.adaptive:
        return options, None
    if node.get("intermediate"):
        wanted = [node["intermediate"]] if isinstance(node["intermediate"], str) else node["intermediate"]
        found = next((view for view in wanted if view in defense.intermediate_views), None)
        if found is None:
            return options, "no such intermediate"
        options["intermediate"] = found
    looks = options.get("eot_iter")
    if isinstance(looks, int) and looks > 1 and not defense.random:  # the constructor refuses what is no number
        if kind.name != "defended_autoattack":
            return options, "deterministic"  # the attack without EOT is the same
        options["eot_iter"] = 1
    if not defense.random:
        options.pop("final_looks", None)  # each look is the same
    if not defense.steps_per_image and (kind.name == "unrolled" or options.get("backward") == "short_dip"):
        return options, "no DIP"
    return options, None


def victim_name(node: Mapping[str, Any]) -> str:
    """The name of a victim's node, and of its network if it may be any of a library: ``torchvision:resnet101``."""
    network = Path(str(node.get("weights" if node.get("name") == "huggingface" else "arch") or ""))
    known = network.name if network.is_absolute() else network.as_posix()  # the place of a folder says nothing
    return f"{name_of(node)}:{known}" if network.name else name_of(node)


def text_of(value: Any) -> str:
    """An option's value as text; numbers without trailing zeros."""
    return f"{value:g}" if isinstance(value, float) else str(value)
