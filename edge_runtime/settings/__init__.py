"""The settings of a board: one table (`table`), read from TOML and the environment (`loading`)."""

from edge_runtime.settings.loading import EffectiveSettings, read_effective_settings
from edge_runtime.settings.table import (
    SETTINGS,
    TABLES,
    DraftSettings,
    PlannerSettings,
    PolicyName,
    SettingEntry,
    Settings,
    VerifierSettings,
)
from edge_runtime.settings.validators import bare_type, is_in_clear, read_secret

__all__ = [
    "SETTINGS",
    "TABLES",
    "DraftSettings",
    "EffectiveSettings",
    "PlannerSettings",
    "PolicyName",
    "SettingEntry",
    "Settings",
    "VerifierSettings",
    "bare_type",
    "is_in_clear",
    "read_effective_settings",
    "read_secret",
]
