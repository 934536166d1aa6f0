"""A process that does the units of the kit that are missing, one after the other, and saves what each found."""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu.__main__ import AGAIN, LATER, ROOT


class Skip(Exception):
    """Why a unit cannot be done here, in a sentence."""


class Unfinished(Exception):
    """The sentence and figures of a unit that goes on in another call."""


class Failed(Exception):
    """What a unit found to be wrong, in a sentence."""


@dataclass
class Unit:
    """`do` returns a sentence and figures. needs: seconds, without which it is not begun. limit: after so many it has
    failed; 0: never. done: outcome of one that ended."""

    part: str
    name: str
    do: Callable[["Kit"], tuple[str, Any]]
    needs: float = 15
    limit: int = 240
    done: str = "passed"


@dataclass
class Result:
    at: int
    part: str
    name: str
    file: str
    limit: int
    outcome: str = ""
    says: str = ""
    figures: Any = field(default_factory=dict)
    seconds: float = 0


@dataclass
class Kit:
    device: str
    state: Path
    cifar: str
    until: float

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    def left(self) -> float:
        return self.until - time.time()

    def folder(self, name: str) -> Path:
        (path := self.state / name).mkdir(parents=True, exist_ok=True)
        return path

    def remove(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self.state / name, ignore_errors=True)

    def run(self, *words: Any, module: bool = False, timeout: float | None = None) -> str:
        """What a Python command printed; Failed with its last line. At the timeout it is asked to save and end."""
        command = [sys.executable, *(["-m"] if module else []), *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=self.state, **pipes) as child:
            try:
                said, _ = child.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                child.terminate()
                return child.communicate()[0]
        print(said, file=sys.stderr)
        if child.returncode:
            raise Failed(f"status {child.returncode}: {(said.strip().splitlines() or [''])[-1]}")
        return said

    def photos(self) -> Path:
        """CIFAR-10 as JPEGs, `train/<class>` and `test/<class>`, or in miniature cuts of other photographs."""
        if not self.cifar and self.tiny:
            from data import cuts

            folder = self.folder("photos")
            for i, image in enumerate(cuts(48, 32, 32)):
                place = folder / ("test" if i % 3 == 2 else "train") / str(i % 2)
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{i}.jpg")
            return folder
        source = Path(self.cifar) if self.cifar else ROOT / "datasets" / "cifar10_jpeg"
        if not source.exists():
            raise Skip(f"there is no CIFAR-10 at {source}; make gpu CIFAR=PATH says where it is")
        made = self.state / "cifar10"
        if source.is_file() and not made.exists():
            with tarfile.open(source) as archive:
                archive.extractall(self.folder("unpacking"), filter="data")
            (self.state / "unpacking").rename(made)
        elif (source / "cifar-10-batches-py").is_dir() and not (made / "test").exists():
            self.run(ROOT / "benchmarks" / "cifar10_jpeg.py", source, made)
        places = [found.parent for folder in (source, made) for found in sorted(folder.glob("**/train"))]
        if not places:
            raise Skip(f"{source} is neither CIFAR-10 as a folder of JPEGs, nor its archive, nor torchvision's folder")
        return places[0]


def do(unit: Unit, result: Result, kit: Kit) -> None:
    """Fills in what came out."""
    began = time.time()
    try:
        result.says, result.figures = unit.do(kit)
        result.outcome = unit.done
    except Skip as why:
        result.outcome, result.says = "skipped", str(why)
    except Unfinished as what:
        result.outcome, (result.says, result.figures) = "goes on", what.args
    except torch.OutOfMemoryError:
        result.outcome, result.says = "failed", "the device has not memory enough"
    except Exception as error:
        traceback.print_exc()
        said = " ".join(str(error).split())[:200]
        result.outcome = "failed"
        result.says = said if isinstance(error, Failed) else f"{type(error).__name__}: {said}"
    result.seconds = time.time() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("device", str), ("state", Path), ("cifar", str), ("until", float)):
        parser.add_argument(f"--{name}", type=kind)
    kit = Kit(**vars(parser.parse_args()))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive the kit
    from gpu import correct, speed  # after what they import from here

    later = False
    for at, unit in enumerate([*correct.units(kit), *speed.units(kit)]):
        file = kit.state / "units" / f"{at:03}-{re.sub(r'[^a-z0-9]+', '-', unit.name.lower())}.json"
        begun = file.with_suffix(".begun")
        if file.exists() and json.loads(file.read_text())["outcome"] not in ("skipped", "goes on"):
            continue
        if kit.left() < unit.needs:
            later = True
            continue
        result = Result(at, unit.part, unit.name, str(file), unit.limit)
        tries = len(begun.read_text()) if begun.exists() else 0
        if unit.limit and tries >= 3:
            result.outcome, result.says = "failed", "was begun three times, and did not end"
        else:
            begun.write_text("x" * (tries + 1))
            (kit.state / "current.json").write_text(json.dumps(asdict(result)))
            signal.alarm(unit.limit)  # which ends this process, whatever hangs in it
            do(unit, result, kit)
            signal.alarm(0)
            begun.unlink()
        later |= result.outcome == "goes on"
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(result)))
        os.replace(temporary, file)
        (kit.state / "current.json").unlink(missing_ok=True)
        print(f"{unit.part}: {unit.name}: {result.outcome}: {result.says}", flush=True)
        if "CUDA error" in result.says:
            os._exit(AGAIN)  # what has failed there once fails ever after
    os._exit(LATER if later else 0)  # libraries of GPUs can crash in the end, when nothing is left to lose


if __name__ == "__main__":
    main()
