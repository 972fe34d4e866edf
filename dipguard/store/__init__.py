"""Results that are computed once: a folder of fits, traces, attacked images and cells under content keys."""

from dipguard.store.folder import LAYERS, Entry, Store, open_store
from dipguard.store.keys import digest_of, numerics, victim_digest
from dipguard.store.stack import stored_stack

__all__ = ["LAYERS", "Entry", "Store", "digest_of", "numerics", "open_store", "stored_stack", "victim_digest"]
