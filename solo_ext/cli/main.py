"""`solo-ext`: finds the command, runs it, and turns a user's mistake into one line and exit status 2.

Torch is imported when a command runs, so that asking for help takes no time.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence

from solo_ext import __version__, plugins
from solo_ext.cli.command import dispatch, overview
from solo_ext.cli.commands import COMMANDS
from solo_ext.errors import NonFiniteError, SoloExtError

log = logging.getLogger("solo_ext")

GRACE = 10  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after `solo-ext`; None takes those of the process.

    Returns:
        The exit status: 0; 2 for a user's mistake; 1 for a run that went to NaN; 130 when interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("solo-ext: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if _first() else logging.ERROR)
    try:
        argv = plugins.take(argv)
        if not argv or argv[0] in ("-h", "--help"):
            print(_help())
        elif argv[0] == "--version":
            print(f"solo-ext {__version__}")
        else:
            if not {"-h", "--help"} & {*argv}:
                plugins.load()
            dispatch(COMMANDS, argv)
    except SoloExtError as error:
        _let_the_first_speak()
        print(f"solo-ext: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        _let_the_first_speak()
        print(f"solo-ext: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("solo-ext: interrupted", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(handler)
    return 0


def _first() -> bool:
    """Whether this is the first process of a run, or the only one."""
    return all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _let_the_first_speak() -> None:
    """What all processes find wrong, one says: when the first has ended, its launcher ends the others."""
    if not _first():
        time.sleep(GRACE)


def _help() -> str:
    text = "Trains image encoders without labels, with projector-only and residual momentum."
    return f"""{overview("solo-ext", text, COMMANDS)}
solo-ext --version says which version this is; --import MODULE, with any command, registers methods, backbones, datasets
and monitors of your own.

examples:
  solo-ext demo
  solo-ext pretrain cifar10/res_mocov3 data.train_path=/data
"""
