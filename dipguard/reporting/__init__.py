"""Tables, figures and logs: reads results and traces, computes nothing."""

from dipguard.reporting.loggers import RunLog, open_log
from dipguard.reporting.report import write_report

__all__ = ["RunLog", "open_log", "write_report"]
