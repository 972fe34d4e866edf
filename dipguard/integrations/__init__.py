"""dipguard in somebody else's project: one module for each outside world, none of them imported before it is needed.

`lightning` (a callback, a defended classifier, a defended LightningModule), `attackable` (foolbox, torchattacks) and
`art` (Adversarial Robustness Toolbox). Hydra finds the config groups through the plugin in ``hydra_plugins``.
"""
