"""What a user can get wrong, said in one sentence: what, where, and the nearest thing that would be right."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from solo_ext.text import hint


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
    """A dataset, folder or image."""


class CheckpointError(SoloExtError):
    """A checkpoint that is missing, damaged or made for another network."""


class FailedRun(RuntimeError):
    """A training that failed, not a mistake in its configuration. The command line prints its message and exits 1."""


class NonFiniteError(FailedRun):
    """A loss, gradient or weight became NaN or infinite."""


class CollapseError(FailedRun):
    """The outputs collapsed, and the run is to stop then."""


def require(package: str, what: str, extra: str) -> None:
    """Raises ConfigError, "<what> needs <package>", unless it is installed; our extra `extra` brings it."""
    try:
        __import__(package)
    except ImportError:
        hint = f"pip install 'solo-ext[{extra}]'"
        raise ConfigError(f"{what} needs {package}, which is not installed: {hint}") from None


def must_have(name: Any, names: Any, what: str) -> None:
    """Raises ConfigError, `what` followed by the name and the nearest one, unless it is one of `names`."""
    if name not in names:
        raise ConfigError(f"{what} '{name}'{hint(name, names)}")


def reason(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


@contextmanager
def naming(subject: str, *kinds: type[Exception], error: type[SoloExtError] = ConfigError) -> Iterator[None]:
    """Turns errors of `kinds`, by default OSError, into `error`: "<subject>: <reason>"; ours only if a kind is ours."""
    try:
        yield
    except kinds or OSError as failure:  # noqa: B030
        if isinstance(failure, SoloExtError) and not any(issubclass(kind, SoloExtError) for kind in kinds):
            raise
        raise error(f"{subject}: {reason(failure)}") from failure
