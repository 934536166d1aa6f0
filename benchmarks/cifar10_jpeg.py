"""CIFAR-10 as folders of JPEGs of quality 75, as the studies on photographs have it.

    python benchmarks/cifar10_jpeg.py datasets datasets/cifar10_jpeg

reads torchvision's files in the first folder, which are downloaded if they are missing, and writes `train` and `test`
below the second: <class>/<number within the class>.jpg, in the order of the files.
"""

import sys
from collections import Counter
from pathlib import Path

from torchvision.datasets import CIFAR10


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    for split in ("train", "test"):
        images = CIFAR10(source, train=split == "train", download=True)
        counts: Counter[int] = Counter()
        for image, label in images:
            folder = target / split / images.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{counts[label]:04}.jpg", quality=75)
            counts[label] += 1


if __name__ == "__main__":
    main()
