"""Fits that are made once: a folder of decision traces, keyed by all that a fit depends on and by nothing else."""

from dipguard.store.entry import DamagedEntryError, Entry
from dipguard.store.folder import LAYERS, TraceStore, open_store
from dipguard.store.keys import digest_of, victim_digest
from dipguard.store.manage import EntryInfo, list_entries, prune, store_size, verify
from dipguard.store.rules import stored_rule
from dipguard.store.serve import StoredResult, stored_stack
from dipguard.store.stack_keys import StackKeys, holds_traces
from dipguard.store.stopped import RuleAsked

__all__ = [
    "LAYERS",
    "DamagedEntryError",
    "Entry",
    "EntryInfo",
    "RuleAsked",
    "StackKeys",
    "StoredResult",
    "TraceStore",
    "digest_of",
    "holds_traces",
    "list_entries",
    "open_store",
    "prune",
    "store_size",
    "stored_rule",
    "stored_stack",
    "verify",
    "victim_digest",
]
