"""Defences: images in, images out."""

from dipguard.defenses.base import Defense
from dipguard.defenses.dipguard import DIPGuard
from dipguard.defenses.result import DefenseResult

__all__ = ["DIPGuard", "Defense", "DefenseResult"]
