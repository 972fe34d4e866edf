"""One W&B run: opened so that it can neither block nor fail the work, and closed whatever happens."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

from pytorch_lightning.loggers import WandbLogger

from dipguard.config import LoggerConfig
from dipguard.files import write_text

_log = logging.getLogger(__name__)

INIT_SECONDS, FINISH_SECONDS = 30.0, 120.0
"""How long W&B's server is waited for; after that the run is kept offline, or the rest of it is."""
AGENT = "WANDB_SWEEP_ID"
"""Set by ``wandb agent``, which has chosen the run's id and reads its summary."""
_Mode = Literal["online", "offline", "disabled", "shared"]


@contextlib.contextmanager
def wandb_run(
    config: LoggerConfig, folder: Path, settings: Mapping[str, Any], *, job_type: str, group: str | None = None
) -> Iterator[WandbLogger]:
    """A run of the run folder's own, in ``logs/wandb``; the arguments are those of ``open_log``.

    Where the server cannot be reached, or refuses the key, the run is kept offline. A run that is open in this process
    for something else is neither joined nor closed.
    """
    place = folder / "logs"
    place.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {
        # A run of our own, made here: WandbLogger would join a run that is open in this process, and its offline=True
        # would set the mode of the whole process.
        "reinit": "create_new",
        "dir": place,
        "project": config.project,
        "entity": config.entity,
        "group": config.group or group,
        "job_type": "sweep" if AGENT in os.environ else job_type,
        "name": folder.name,
        "config": dict(settings),
        "settings": _settings(),
    }
    if AGENT not in os.environ:
        known["id"] = _run_id(folder)
    run = _start(wandb_mode(config.offline), known)
    code = 1
    try:
        yield WandbLogger(experiment=run, save_dir=place, project=config.project)
        code = 0
    finally:
        _finish(run, code)


def _start(mode: _Mode, known: dict[str, Any]) -> Any:
    import wandb

    if mode == "online":
        try:
            return wandb.init(mode="online", resume="allow", **known)
        except Exception as error:  # CommError, AuthenticationError, UsageError, ... : W&B's errors have no one base
            _log.warning("W&B cannot be used online, so this run is kept offline: %s", error)
            mode = "offline"
            known["id"] = secrets.token_hex(4)  # W&B takes the other for in use
    return wandb.init(mode=mode, **known)


def _finish(run: Any, code: int) -> None:
    folder = Path(run.dir).parent
    try:
        run.finish(exit_code=code)
    except Exception as error:
        _log.warning("W&B did not take the end of the run: %s: %s", type(error).__name__, error)
    if folder.name.startswith("offline-run"):
        _log.info("W&B run kept offline; to upload it: wandb sync %s", folder)


def _settings() -> Any:
    """Bounds on waiting; no capture of the terminal, which would outlive the job in a process of many."""
    import wandb

    wanted: dict[str, Any] = {
        "init_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "console": "off",
        "silent": True,
    }
    # Older versions do not know all of them.
    known = getattr(wandb.Settings, "model_fields", wanted)
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})


def wandb_mode(offline: bool | None) -> _Mode:
    """What was asked for; else what the environment says; else online where there is a key or an agent."""
    if offline is not None:
        return "offline" if offline else "online"
    wanted = os.environ.get("WANDB_MODE")
    for mode in get_args(_Mode):
        if wanted == mode:
            return cast(_Mode, mode)
    return "online" if AGENT in os.environ or "WANDB_API_KEY" in os.environ or _logged_in() else "offline"


def _logged_in() -> bool:
    """Whether ``wandb login`` has left a key."""
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


def results_to_wandb(
    run: Any, metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]], figures: Sequence[Path]
) -> None:
    """Enter the final figures into the summary, and log a table of ``rows`` and the pictures."""
    import wandb

    run.summary.update(dict(metrics))
    columns = list(rows[0])
    pictures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures}
    run.log(
        {"images": wandb.Table(columns=list(columns), data=[[row[c] for c in columns] for row in rows]), **pictures}
    )
