"""What a set of millions of images costs before and beside the training: start-up, memory, resume.

    python benchmarks/scale.py --folder /data/scratch --out docs/results/scale

Makes folders and lists of empty files (`--images`, in 1,000 classes, removed at the end; fastest in a file system in
memory, of which the default takes 6 GB and 14 million inodes), and measures each part in a process of its own,
`--rounds` times. What a part costs is linear in the images: larger sets are read off a line that
is fitted through the medians, and marked with ~.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from solo_ext.data.images import read_folder
from solo_ext.data.lists import read_list
from solo_ext.data.loader import EpochSampler
from solo_ext.data.shared import begin_node, once_on_a_node
from solo_ext.runs.environment import environment

CLASSES, RANKS = 1000, 8
ABOUT = ("time", "python", "packages", "commit", "os", "cpu", "cores")
LARGER = (14_197_122, 100_000_000)  # ImageNet-21k, and what nobody has on one disk
FILES, ORDERS = ("folder", "list", "taken over"), ("sampler", "share", "resume")
SHARE = f"sampler, each of {RANKS} processes:"
ROWS = {  # part, figure of it -> what the table calls it
    ("folder", "seconds"): "folder: scan, s",
    ("folder", "fingerprint"): "folder: fingerprint, s",
    ("folder", "peak"): "folder: memory while it is read, MB",
    ("folder", "kept"): "folder: index, MB",
    ("taken over", "seconds"): "folder: taken over by the node's other processes, s",
    ("list", "seconds"): "list: reading, s",
    ("list", "fingerprint"): "list: fingerprint, s",
    ("list", "peak"): "list: memory while it is read, MB",
    ("list", "kept"): "list: index, MB",
    ("sampler", "seconds"): "sampler, one process: to the first image of an epoch, s",
    ("sampler", "peak"): "sampler, one process: memory, MB",
    ("share", "seconds"): f"{SHARE} to the first image of an epoch, s",
    ("share", "peak"): f"{SHARE} memory, MB",
    ("resume", "seconds"): f"{SHARE} to the next image, resumed in the middle of an epoch, s",
}


def make_files(folder: Path, sizes: list[int]) -> None:
    """`<folder>/<size>`, of links to the class folders of the largest size, and `<folder>/<size>.txt`. Within a class
    all names are hard links to one empty file."""
    each = max(sizes) // CLASSES
    for c in range(CLASSES):
        (folder / "all" / f"n{c:08d}").mkdir(parents=True)
        name = os.path.join(folder, "all", f"n{c:08d}", f"n{c:08d}_")
        Path(f"{name}0.JPEG").touch()
        for i in range(1, each):
            os.link(f"{name}0.JPEG", f"{name}{i}.JPEG")
    for size in sizes:
        (folder / str(size)).mkdir()
        with open(folder / f"{size}.txt", "w") as file:
            for c in range(size // each):
                (folder / str(size) / f"n{c:08d}").symlink_to(folder / "all" / f"n{c:08d}")
                file.writelines(f"{size}/n{c:08d}/n{c:08d}_{i}.JPEG {c}\n" for i in range(each))


def peak() -> float:
    """Megabytes that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(part: str, size: int, folder: Path) -> dict[str, float]:
    """Seconds of a part; megabytes that it took at most, and those that are kept."""
    if part == "taken over":
        begin_node(2)
        read = partial(read_folder, folder / str(size), part)
        with ProcessPoolExecutor(1, get_context("fork")) as other:  # before this process has what it shows
            other.submit(int).result()
            once_on_a_node(read)
            return other.submit(take_over, read).result()
    before, began = peak(), time.perf_counter()
    if part in FILES:
        where = folder / (f"{size}.txt" if part == "list" else str(size))
        images = (read_list if part == "list" else read_folder)(where, part)
        read, kept = time.perf_counter(), (images.images.paths.nbytes + images.targets.nbytes) / 1e6
        images.fingerprint()
        hashed = time.perf_counter() - read
        return {"seconds": read - began, "peak": peak() - before, "kept": kept, "fingerprint": hashed}
    sampler = EpochSampler(size, 0, 1 if part == "sampler" else RANKS, 0)
    sampler.skip = size // RANKS // 2 if part == "resume" else 0
    next(iter(sampler))
    return {"seconds": time.perf_counter() - began, "peak": peak() - before}


def take_over(read: Callable) -> dict[str, float]:
    os.environ["LOCAL_RANK"] = "1"
    began = time.perf_counter()
    once_on_a_node(read)
    return {"seconds": time.perf_counter() - began}


def measured(part: str, size: int, folder: Path) -> dict[str, float]:
    """In a process of its own."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(measure, part, size, folder).result()


def at(values: dict[int, float], size: int) -> str:
    """The value measured at a size, or what a line through those measured says, marked with ~."""
    if size in values:
        return f"{values[size]:,.3g}" if values[size] < 100 else f"{values[size]:,.0f}"
    slope, start = np.polyfit([*values], [*values.values()], 1)
    value = max(slope * size + start, 0)
    return f"~{value:,.2g}" if value < 100 else f"~{float(f'{value:.2g}'):,.0f}"


def write(out: Path, found: dict[str, dict[int, dict[str, float]]], about: dict) -> None:
    """`<out>.json` and `<out>.md`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"about": about, "parts": found}, indent=1) + "\n")
    sizes = sorted({*found["folder"], *LARGER})
    packages = about["packages"]
    lines = [
        "# Millions of images",
        "",
        f"Written by `make bench-scale`: {about['cpu']}, {about['cores']} cores, Python {about['python']}, "
        f"torch {packages['torch']};",
        f"links to empty files, whose names the kernel has in memory; medians of {about['rounds']}. Numbers with ~ are "
        "not measured, but of a line",
        "through those that are ([scale.json](scale.json)).",
        "",
        "| | " + " | ".join(f"{size:,}" for size in sizes) + " |",
        "|---|" + "---:|" * len(sizes),
    ]
    for (part, figure), title in ROWS.items():
        values = {size: result[figure] for size, result in found[part].items()}
        lines.append(f"| {title} | " + " | ".join(at(values, size) for size in sizes) + " |")
    out.with_suffix(".md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=lambda text: Path(text).resolve(), required=True, help="a new one, where the files are made"
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1_280_000, 5_000_000, 14_197_122])
    parser.add_argument("--orders", type=int, nargs="+", default=[1_280_000, 5_000_000, 14_197_122])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/scale"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        make_files(args.folder, args.images)
        runs: dict[tuple[str, int], list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            for part in (*FILES, *ORDERS):
                for size in args.images if part in FILES else args.orders:
                    runs.setdefault((part, size), []).append(measured(part, size, args.folder))
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for (part, size), results in runs.items():
        medians = {name: statistics.median(result[name] for result in results) for name in results[0]}
        found.setdefault(part, {})[size] = medians
    about = {key: value for key, value in environment().items() if key in ABOUT}
    write(args.out, found, about | {"rounds": args.rounds})


if __name__ == "__main__":
    main()
