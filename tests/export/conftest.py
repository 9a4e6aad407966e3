"""Fixture for tests that need a target on disk."""

from tests.cloud_verifier.draft_models.conftest import save_target

__all__ = ["save_target"]
