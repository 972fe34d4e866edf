"""dipguard's Hydra config groups. A package, so that a wheel holds it as ``dipguard.conf``."""
