"""`solo-ext`: runs a command, and turns a user's mistake into one line and exit status 2."""

import io
import logging
import os
import sys
import time
from collections.abc import Sequence

from solo_ext import __version__, plugins
from solo_ext.cli import commands, completion, data, demo, showing, zoo  # noqa: F401, they register themselves
from solo_ext.cli.command import SOLO_EXT
from solo_ext.errors import FailedRun, SoloExtError

log = logging.getLogger("solo_ext")

GRACE = 10  # seconds


class _Messages(logging.StreamHandler):
    """Writes to what `sys.stderr` is by then: a progress bar lets messages pass above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `argv`, without the leading `solo-ext`; by default, that of the process.

    Returns the exit status: 0; 2 for a user's mistake; 1 for a run that went to NaN, or a closed pipe; 130 when
    interrupted.
    """
    completion.complete()
    # whether this is the first process of a run, or the only one
    first = all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the console cannot show
    handler = _Messages()
    handler.setFormatter(logging.Formatter("solo-ext: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if first else logging.ERROR)
    try:
        argv = plugins.take(sys.argv[1:] if argv is None else argv)
        if argv[:1] == ["--version"]:
            print(f"solo-ext {__version__}")
        else:
            if argv and not {"-h", "--help"} & {*argv}:
                plugins.load()
            SOLO_EXT(argv)
        sys.stdout.flush()
    except (SoloExtError, FailedRun) as error:
        if not first:  # all processes make the same mistake: when the first has ended, its launcher ends the others
            time.sleep(GRACE)
        mistake = isinstance(error, SoloExtError)
        kind, message = "error" if mistake else "stopped", " ".join(str(error).splitlines())
        print(f"solo-ext: {kind}: {message}", file=sys.stderr)
        return 2 if mistake else 1
    except BrokenPipeError:  # the reader of a listing, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left at its end
        return 1
    except KeyboardInterrupt:
        print("solo-ext: interrupted", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(handler)
    return 0
