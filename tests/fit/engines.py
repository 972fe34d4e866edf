"""The engines that the tests of the fit run on."""

import pytest

from dipguard.engines.native_build import compiler

WORKING = ["torch", pytest.param("native", marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler"))]
"""Engines that a CPU may have."""
