"""Draws fashion_mnist_mini from the original Fashion-MNIST files and prints its SHA-256.

    python scripts/data/build_fashion_mnist_mini.py /usr/share/datasets/fashion-mnist

500 training and 100 test images of each class, drawn without replacement by numpy's default_rng(SEED), in
the order of the original files. `*_rows` in the result are their places in those files. The arrays are the
same everywhere; the compressed bytes, and so the hash, also depend on the zlib in use (here: zlib 1.2.13).
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from solo_ext.data.datasets import MINI, read_idx

SEED = 0
PER_CLASS = {"train": 500, "test": 100}


def draw(folder: Path, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    prefix = "t10k" if split == "test" else "train"
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    drawn = [rng.choice(np.flatnonzero(labels == c), PER_CLASS[split], replace=False) for c in range(10)]
    rows = np.sort(np.concatenate(drawn))
    return {
        f"{split}_images": images[rows],
        f"{split}_labels": labels[rows],
        f"{split}_rows": rows.astype(np.uint16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the four original *-ubyte.gz files")
    parser.add_argument("--out", type=Path, default=MINI)
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    arrays = {**draw(args.folder, "train", rng), **draw(args.folder, "test", rng)}
    np.savez_compressed(args.out, **arrays)
    print(hashlib.sha256(args.out.read_bytes()).hexdigest(), args.out)


if __name__ == "__main__":
    main()
