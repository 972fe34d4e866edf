"""dipguard's Hydra config groups. This file makes the folder a package, as Hydra's ``pkg://`` asks for."""
