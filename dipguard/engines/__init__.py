"""Engines: what computes the forward and backward pass of a fit step for a stack."""

from dipguard.engines.base import Engine, TorchEngine, check_matmul_precision, make_engine

__all__ = ["Engine", "TorchEngine", "check_matmul_precision", "make_engine"]
