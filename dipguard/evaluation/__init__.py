"""The protocol: one run from settings to figures of merit, resumable (:mod:`dipguard.evaluation.pipeline`)."""
