"""The engines that the tests of the fit run on."""

import pytest

from dipguard.engines.native_build import compiler

NATIVE = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
WORKING = ["torch", pytest.param("native", marks=NATIVE)]
"""Engines that a CPU may have."""
SLOW_NATIVE = ["torch", pytest.param("native", marks=[NATIVE, pytest.mark.slow])]
"""The same; the second is left to the slow tests."""
