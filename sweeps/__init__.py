"""Sweeps: the collector, and the file that W&B drives them by. The named grids lie in conf/sweep."""
