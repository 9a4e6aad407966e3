"""Measures drafts against targets: acceptance, retention, modeled speed, recorded traces, and an advance diagnosis."""
