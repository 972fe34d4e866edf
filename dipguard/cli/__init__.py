"""The ``dipguard`` command: purify pictures with any victim and any defence, list both, and check an installation."""
