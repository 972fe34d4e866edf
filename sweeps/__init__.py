"""Sweeps: the report of a sweep's folder, and the file of a sweep that W&B controls. Named grids are in conf/sweep."""
