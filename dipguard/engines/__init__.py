"""Engines: what computes the forward and backward pass of a fit step for a stack."""

from dipguard.engines.base import PRECISIONS, Engine, TorchEngine, check_matmul_precision, make_engine, precision

__all__ = ["PRECISIONS", "Engine", "TorchEngine", "check_matmul_precision", "make_engine", "precision"]
