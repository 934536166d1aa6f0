"""Everything that only a GPU can show, in the time that there is: the same command goes on where the last one stopped.

    python benchmarks/gpu --minutes 9 --cifar datasets/cifar10_jpeg

The work is done in processes of their own (work.py), so that one that dies costs a unit and a sentence. In the end, and
so also in the middle, docs/results/gpu/<card>/ has one table and its JSON. It needs no network. `--device cpu` goes
through all of it in miniature: what it measures there says nothing.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
AGAIN, LATER = 75, 76  # exit status: another process, another call has to go on
SPARE = 20.0  # seconds for what is under way to be saved, and for the table


def work(words: list[str], state: Path, until: float) -> int | None:
    """The exit status of a process that does what is missing; None if it was still at work at the end."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    main = "from gpu.work import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", main, *words, "--until", str(until - SPARE)]
    with open(state / "log.txt", "a") as log:
        child = subprocess.Popen(command, env=os.environ | own, stderr=log, cwd=ROOT, start_new_session=True)
        try:
            return child.wait(max(1.0, until - SPARE / 2 - time.time()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):  # with all that it started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def lost(state: Path, status: int) -> None:
    """Notes that the unit under way took its process with it."""
    current = state / "current.json"
    if not current.exists():
        raise SystemExit(f"the kit cannot work here; {state / 'log.txt'} says why")
    unit = json.loads(current.read_text())
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    late = f"did not end within {unit['limit']} s"
    unit |= {"outcome": "failed", "says": late if how == "SIGALRM" else f"ended its process with {how}"}
    Path(unit["file"]).write_text(json.dumps(unit))
    current.unlink()


def page(state: Path, out: Path | None) -> Path:
    """Writes the table of all units, and copies those of the studies beside it."""
    from solo_ext.text import markdown_table

    units = sorted((json.loads(file.read_text()) for file in (state / "units").glob("*.json")), key=lambda u: u["at"])
    about = next((unit["figures"] for unit in units if unit["name"] == "device"), {})
    card = about.get("card", "no card")
    out = out or ROOT / "docs" / "results" / "gpu" / re.sub(r"\W+", "-", card).strip("-").lower()
    out.mkdir(parents=True, exist_ok=True)
    kept = [{key: value for key, value in unit.items() if key not in ("at", "file", "limit")} for unit in units]
    (out / "results.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    rows = [[unit[key] for key in ("part", "name", "outcome", "says")] for unit in units]
    counts = {name: sum(unit["outcome"] == name for unit in units) for name in ("passed", "measured", "failed")}
    seconds = sum(unit["seconds"] for unit in units)
    lines = [f"# {card}", "", about.get("origin", ""), ""]
    lines += [f"Written by `make gpu`: {', '.join(f'{n} {name}' for name, n in counts.items())}, in {seconds:.0f} s."]
    table = markdown_table(["part", "item", "", "what came out"], rows)
    (out / "README.md").write_text("\n".join([*lines, "", table]), encoding="utf-8")
    for study in (state / "studies").glob("*/study.md"):
        shutil.copy(study, out / f"{study.parent.name}.md")
    print(table)
    return out


def main() -> None:
    began = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cifar", default="", help="CIFAR-10: a folder of JPEGs, its archive, or torchvision's folder")
    parser.add_argument(
        "--state", type=Path, default=ROOT / "build" / "gpu", help="what is done; remove it to begin anew"
    )
    parser.add_argument("--out", type=Path, help="folder of the table (default: docs/results/gpu/<card>)")
    args = parser.parse_args()
    state, out = args.state.absolute(), args.out
    if args.device == "cpu":
        state, out = state / "miniature", out or state / "miniature" / "results"
    (state / "units").mkdir(parents=True, exist_ok=True)
    cifar = str(Path(args.cifar).expanduser().absolute()) if args.cifar else ""
    words = ["--device", args.device, "--state", str(state), "--cifar", cifar]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    status: int | None = 1
    while status not in (0, None, LATER) and time.time() < began + 60 * args.minutes - SPARE:
        (state / "current.json").unlink(missing_ok=True)
        status = work(words, state, began + 60 * args.minutes)
        if status not in (0, None, AGAIN, LATER):
            lost(state, status)
    print(f"{page(state, out)}: {'all is done' if status == 0 else 'the same command goes on'}")


if __name__ == "__main__":
    main()
