"""Stacks of untrained U-Nets."""

from dipguard.networks.presets import PRESETS, NetworkSpec, network_spec
from dipguard.networks.unet import INITS, PADDINGS, StackedSkipNet, build

__all__ = ["INITS", "PADDINGS", "PRESETS", "NetworkSpec", "StackedSkipNet", "build", "network_spec"]
