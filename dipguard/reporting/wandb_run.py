"""One W&B run that can neither block nor fail the work, and is closed in any case."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import WandbLogger

from dipguard.files import write_text

_log = logging.getLogger(__name__)

SETTINGS: dict[str, Any] = {"init_timeout": 30.0, "finish_timeout": 120.0, "console": "off", "silent": True}
"""After these seconds without W&B's server, the run or the rest of it is kept offline. The terminal is not captured:
that would outlive the job in a process with several jobs."""
AGENT = "WANDB_SWEEP_ID"
"""Set by ``wandb agent``, which has chosen the run's id and reads its summary."""
MODES = ("online", "offline", "disabled", "shared")


@contextlib.contextmanager
def wandb_run(
    config: Mapping[str, Any], folder: Path, settings: Mapping[str, Any], *, job_type: str, group: str | None = None
) -> Iterator[WandbLogger]:
    """A W&B run in ``logs/wandb`` of the run folder, with the arguments of ``open_log``.

    It is kept offline if the server cannot be reached or refuses the key. Another run that is open in this process is
    neither joined nor closed.
    """
    import wandb

    place = folder / "logs"
    place.mkdir(parents=True, exist_ok=True)
    fields = wandb.Settings.model_fields  # older versions do not know all settings
    known: dict[str, Any] = {
        # WandbLogger itself would join a run that is open in this process, and its offline=True would set the mode of
        # the whole process.
        "reinit": "create_new",
        "dir": place,
        "project": config.get("project"),
        "entity": config.get("entity"),
        "group": config.get("group") or group,
        "job_type": "sweep" if AGENT in os.environ else job_type,
        "name": folder.name,
        "config": dict(settings),
        "settings": wandb.Settings(**{name: value for name, value in SETTINGS.items() if name in fields}),
    }
    if AGENT not in os.environ:
        known["id"] = _run_id(folder)
    run = _start(wandb_mode(config.get("offline")), known)
    code = 1
    try:
        yield WandbLogger(experiment=run, save_dir=place, project=known["project"])
        code = 0
    finally:
        try:
            run.finish(exit_code=code)
        except Exception as error:
            _log.warning("W&B did not take the end of the run: %s: %s", type(error).__name__, error)
        if (kept := Path(run.dir).parent).name.startswith("offline-run"):
            _log.info("W&B run kept offline; to upload it: wandb sync %s", kept)


def wandb_mode(offline: bool | None) -> str:
    """The mode that was asked for, else the environment's, else online if there is a key or an agent."""
    if offline is not None:
        return "offline" if offline else "online"
    wanted = os.environ.get("WANDB_MODE")
    if wanted in MODES:
        return wanted
    return "online" if AGENT in os.environ or "WANDB_API_KEY" in os.environ or _logged_in() else "offline"


def results_to_wandb(
    run: Any, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]], figures: Sequence[Path]
) -> None:
    """Enter the final metrics into the summary, and log a table of ``rows`` and the figures."""
    import wandb

    run.summary.update(dict(metrics))
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    run.log({"images": table, **{f"figures/{path.stem}": wandb.Image(str(path)) for path in figures}})


def _start(mode: str, known: dict[str, Any]) -> Any:
    import wandb

    if mode == "online":
        try:
            return wandb.init(mode="online", resume="allow", **known)
        except Exception as error:  # CommError, AuthenticationError, UsageError, ...: W&B's errors have no common base
            _log.warning("W&B cannot be used online, so this run is kept offline: %s", error)
            mode = "offline"
            known["id"] = secrets.token_hex(4)  # W&B considers the other to be in use
    return wandb.init(mode=mode, **known)  # type: ignore[arg-type]


def _logged_in() -> bool:
    """Whether ``wandb login`` has stored a key."""
    import wandb

    try:
        host = urlsplit(wandb.Settings().base_url).hostname
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(folder: Path) -> str:
    path = folder / "logs" / "wandb_id.txt"
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    return path.read_text().strip()
