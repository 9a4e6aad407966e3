"""The settings of a board: one table (`table`), read from TOML and the environment.

Reading is in `loading`, which is imported by itself because its TOML library is slow to import.
"""

from edge_runtime.settings.table import (
    REMOVED_FEATURES,
    SETTINGS,
    TABLES,
    DraftSettings,
    PlannerSettings,
    PolicyName,
    ReasoningFormName,
    ServiceSettings,
    SettingEntry,
    Settings,
    ToolCallFormName,
    VerifierSettings,
    state_directory,
    xdg_directory,
)
from edge_runtime.settings.validators import (
    bare_type,
    describe_type,
    from_text,
    is_in_clear,
    read_api_keys,
    read_secret,
)
from edge_runtime.settings.verifier_checks import check_encryption, check_verifier_settings

__all__ = [
    "REMOVED_FEATURES",
    "SETTINGS",
    "TABLES",
    "DraftSettings",
    "PlannerSettings",
    "PolicyName",
    "ReasoningFormName",
    "ServiceSettings",
    "SettingEntry",
    "Settings",
    "ToolCallFormName",
    "VerifierSettings",
    "bare_type",
    "check_encryption",
    "check_verifier_settings",
    "describe_type",
    "from_text",
    "is_in_clear",
    "read_api_keys",
    "read_secret",
    "state_directory",
    "xdg_directory",
]
