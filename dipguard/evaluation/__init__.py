"""Attacks x defences: prepare a matrix, run its cells, write their results."""
