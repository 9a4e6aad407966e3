"""A profile says what a board is, in TOML: how fast it reads weights, what it draws, and where the figures are from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

BOARDS = Path(__file__).parent / "boards"

Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e18)]


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One board.

    Attributes:
        name: short name, that of its file.
        title: for people.
        origin: `published` (somebody else's figures) or `measured` (on the board at hand).
        sources: where the figures are from.
        cores: CPU cores.
        weight_bytes_per_second: how fast decoding streams weights; ms per token = 1000 * weight bytes / this.
        idle_watts, busy_watts: the whole board, idle and under full CPU load.
    """

    name: str
    title: str
    origin: Literal["published", "measured"]
    sources: Annotated[list[str], msgspec.Meta(min_length=1)]
    cores: Annotated[int, msgspec.Meta(gt=0)]
    weight_bytes_per_second: Positive
    idle_watts: Positive
    busy_watts: Positive

    def draft_milliseconds(self, weight_bytes: int) -> float:
        """Modelled milliseconds per drafted token: a token reads every weight once, and memory is the bottleneck."""
        return 1e3 * weight_bytes / self.weight_bytes_per_second

    def draft_joules(self, weight_bytes: int) -> float:
        """Modelled joules per drafted token, above idle."""
        return self.draft_milliseconds(weight_bytes) / 1e3 * (self.busy_watts - self.idle_watts)


class ProfileError(Exception):
    """A profile that does not exist or does not parse; says which field is wrong."""


def read_profile(path: Path) -> Profile:
    """Raises ProfileError."""
    try:
        profile = msgspec.toml.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ProfileError(f"cannot read the profile {path}: {error.strerror}") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProfileError(f"{path} is not a profile: {error}") from None
    if profile.name != path.stem:
        raise ProfileError(f"{path} calls itself {profile.name!r}; name and file name must be the same")
    if profile.busy_watts < profile.idle_watts:
        raise ProfileError(f"{path}: busy_watts {profile.busy_watts} is below idle_watts {profile.idle_watts}")
    return profile


def shipped_profiles() -> list[Profile]:
    """The profiles that come with FlexSpec, by name."""
    return [read_profile(path) for path in sorted(BOARDS.glob("*.toml"))]
