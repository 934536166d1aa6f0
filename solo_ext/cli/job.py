"""A run of a study in a process of its own: its pre-training, then what it is evaluated by and has no result of yet."""

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from solo_ext.cli.main import main
from solo_ext.files import write_json
from solo_ext.runs.run import CLASSIFIERS, COMMAND, DETECTORS, RESULT, WALL, Run, saved_at


def run(
    folder: str, others: Sequence[str], pretrain: list[str], evaluations: dict[str, list[str]], began: float
) -> int:
    """The exit status of the first command that fails, or 0. Adds to the run's result how long everything took since
    the process `began`, unless another one has done a part of it.

    The run is the newest finished one below `folder` but for those with the ids `others`, of another configuration.
    """

    def finished() -> list[Path]:
        runs = [file.parent for file in sorted(Path(folder).glob(f"*/*/{RESULT}"), key=saved_at)]
        return [run for run in runs if run.name not in others and run.parent.name not in (CLASSIFIERS, DETECTORS)]

    def command(*words: str) -> int:
        os.environ[COMMAND] = shlex.join(["solo-ext", *words])
        return main(words)

    whole = not finished()
    code = command(*pretrain) if whole else 0
    for name, words in evaluations.items() if not code else ():
        newest = Run(finished()[-1])
        if not newest.evaluated(name):
            # its network, and not that of the evaluation's recipe
            own = [f"backbone.name={newest.args['backbone']['name']}", f"name={name}", f"checkpoint.dir={folder}"]
            code = code or command(*words, *own, "--run", str(newest.dir))
    if whole and not code and not (done := Run(finished()[-1])).resumed:
        write_json(done.dir / RESULT, {**done.summary, WALL: time.time() - began})
    return code


if __name__ == "__main__":
    sys.exit(run(**json.loads(sys.argv[1])))
