"""Acceptance measurement: how often a draft's token equals the target's, with confidence intervals."""
