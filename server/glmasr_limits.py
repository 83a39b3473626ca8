"""The bounds of live transcription: each is a setting, an environment variable with a default."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

# Environment variable → default. Those in COUNTS are whole numbers.
LIVE_LIMITS = {
    "MAX_SESSIONS": "64",  # open at once, of all API processes together
    "MAX_SESSION_MINUTES": "60",
    "MAX_IDLE_S": "120",  # without a message from the client
    "MAX_MESSAGE_MB": "2",
    "MAX_TURN_S": "600",  # of audio in one item
    "MAX_PENDING_FINALS": "8",  # of a session; further audio waits
    "MAX_PARTIALS": "16",  # in flight, of all API processes together
}
COUNTS = ("MAX_SESSIONS", "MAX_PENDING_FINALS", "MAX_PARTIALS")


@dataclass(frozen=True)
class Limits:
    """`LIVE_LIMITS` as numbers, for one of `processes` API processes: numbers of sessions and partials are its share."""

    sessions: int
    session_s: float
    idle_s: float
    message_bytes: int
    turn_s: float
    pending_finals: int
    partials: int

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ, processes: int = 1) -> "Limits":
        """Raises ValueError for a value that is no number."""
        value = {name: float(environment.get(name) or default) for name, default in LIVE_LIMITS.items()}
        return cls(
            -int(-value["MAX_SESSIONS"] // processes), 60 * value["MAX_SESSION_MINUTES"], value["MAX_IDLE_S"],
            int(value["MAX_MESSAGE_MB"] * 2**20), value["MAX_TURN_S"], int(value["MAX_PENDING_FINALS"]),
            -int(-value["MAX_PARTIALS"] // processes),
        )  # fmt: skip
