"""dipguard in other projects: one module per framework, imported only when used.

`lightning` holds a callback, a defended classifier and a defended LightningModule; `attackable` serves foolbox and
torchattacks, `art` the Adversarial Robustness Toolbox. Hydra finds the config groups through ``hydra_plugins``.
"""
