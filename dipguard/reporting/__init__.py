"""Tables, figures and logs. They read results and traces and compute nothing. Importing the package is cheap."""

from importlib import import_module
from typing import Any

_HOME = {
    "RunLog": "loggers",
    "open_log": "loggers",
    "results_text": "report",
    "write_matrix_report": "report",
    "write_sweep_report": "sweep_report",
    "write_train_report": "report",
}

__all__ = ["RunLog", "open_log", "results_text", "write_matrix_report", "write_sweep_report", "write_train_report"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
