"""dipguard's Hydra config groups. A package, so that Hydra finds it as a module, in a wheel as ``dipguard.conf``."""
