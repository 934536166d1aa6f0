"""What a user can get wrong, said in one sentence: what, where, and the nearest thing that would be right."""

import difflib
from collections.abc import Iterable


class SoloExtError(ValueError):
    """A user's mistake. The command line prints its message without a traceback and exits 2."""

    def __init__(self, message: str):
        # A DataLoader worker re-raises with its traceback as the message; its last line carries ours.
        if "Original Traceback" in message:
            message = message.strip().splitlines()[-1].split(": ", 1)[-1]
        super().__init__(message)


class ConfigError(SoloExtError):
    """A key, type or value of the configuration."""


class DataError(SoloExtError):
    """A data set, folder or image."""


class CheckpointError(SoloExtError):
    """A checkpoint that is missing, damaged or made for another network."""


class NonFiniteError(RuntimeError):
    """Training went to NaN or infinity: a run that failed, not a mistake in its configuration."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice closest to `word`, or the empty string if none is close."""
    close = difflib.get_close_matches(str(word), list(map(str, choices)), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
