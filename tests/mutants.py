"""One-line faults that the tests have to notice: `python tests/mutants.py [WORD ...]` puts in each whose line holds all
of the words, runs the tests that are about its file, and names those that no test fails on. Exit 1 if there are any.

It works on a copy of the checkout. A fault that nobody could tell is in EQUIVALENT, with the reason.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 600  # for the tests of one fault
FAULTS = Path(__file__).with_suffix(".txt")
# the tests about a file, beside those in the folder of its room
ALSO = {
    "losses": ["methods", "training/test_distributed.py"],
    "momentum": ["methods", "planning"],
    "optim": ["training/test_config.py", "methods/test_golden.py"],
    "methods": ["momentum", "test_api.py"],
    "evaluation": ["training/test_evaluate.py"],
    "networks": ["training/test_evaluate.py", "test_api.py"],
    "training": ["faults"],
    "data": ["training/test_resume.py", "test_api.py"],
    "runs": ["zoo/test_hub.py"],
    "cli": ["studies"],
}
# the line of mutants.txt -> why nobody can tell
EQUIVALENT = {
    "momentum/teacher.py | student[self.entry.name].detach() | student[self.entry.name]": "it runs under no_grad",
    "analysis/embedding.py | torch.set_num_threads(threads) | pass": "where numba's OpenMP is not PyTorch's own",
}


def faults(words: list[str]) -> list[tuple[str, str, str]]:
    found = []
    for line in FAULTS.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") and line not in EQUIVALENT and all(word in line for word in words):
            file, old, new = (part.replace("\\|", "|").replace("\\n", "\n") for part in line.split(" | "))
            found.append((file, old, new))
    return found


def survives(copy: Path, file: str, old: str, new: str) -> bool:
    """Whether the tests pass with the fault in place."""
    path = copy / "solo_ext" / file
    text = path.read_text(encoding="utf-8")
    if text.count(old) < 1:
        raise SystemExit(f"{file} has no line with: {old}")
    room = file.partition("/")[0]
    tests = [f"tests/{place}" for place in (room, *ALSO.get(room, []))]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "FAULTS": "all"}
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=SECONDS)
        if done.returncode in (4, 5):  # pytest's for wrong paths and no tests
            raise SystemExit(done.stderr.decode() or done.stdout.decode())
        return done.returncode == 0
    except subprocess.TimeoutExpired:  # the fault hangs something
        return False
    finally:
        path.write_text(text, encoding="utf-8")


def main(words: list[str]) -> int:
    survivors, chosen = [], faults(words)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "checkout")
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "trained_models", "demo")
        )
        for number, fault in enumerate(chosen, start=1):
            began = time.monotonic()
            alive = survives(copy, *fault)
            survivors += [fault] if alive else []
            what = "SURVIVES" if alive else "noticed "
            print(f"{number:3}/{len(chosen)} {what} {time.monotonic() - began:4.0f} s  {' | '.join(fault)}", flush=True)
    print(f"{len(chosen)} faults, {len(survivors)} that no test notices")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
