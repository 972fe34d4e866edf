"""Engines: who computes one fit step's forward and backward pass for a stack."""

from __future__ import annotations

from dipguard.engines.base import ENGINES, Engine, TorchEngine, make_engine, native_problem

__all__ = ["ENGINES", "Engine", "TorchEngine", "make_engine", "native_problem"]
