"""dipguard in somebody's own Lightning project: a callback, a defended classifier, a defended LightningModule."""

from __future__ import annotations

from dipguard.integrations.defended_classifier import DefendedClassifier
from dipguard.integrations.defended_module import DefendedModule
from dipguard.integrations.purify_callback import PurifyCallback

__all__ = ["DefendedClassifier", "DefendedModule", "PurifyCallback"]
