"""Parts of a training set: drawn, or published as lists of file names, so that all train on the same few labels."""

from pathlib import Path

import numpy as np

from solo_ext.data.images import FileImages, ImageSet, stratified_rows
from solo_ext.errors import DataError, naming
from solo_ext.files import sha256

_SIMCLR = "https://raw.githubusercontent.com/google-research/simclr/383d4143fd8cf7879ae10f1046a9baeb753ff438/"
PUBLISHED = {  # name -> where it is, and its SHA-256: of ImageNet's training images (Chen et al., 2020, Sec. 4.2)
    "simclr_1percent": (
        f"{_SIMCLR}imagenet_subsets/1percent.txt",
        "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
    ),
    "simclr_10percent": (
        f"{_SIMCLR}imagenet_subsets/10percent.txt",
        "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091",
    ),
}


def part_of(targets: np.ndarray, fraction: float, key: str) -> np.ndarray:
    """The rows of solo-learn's fraction of the images: stratified by class, if there are labels."""
    count, size, labelled = len(targets), int(fraction * len(targets)), targets.max() >= 0
    _, counts = np.unique(targets, return_counts=True)
    if not size or (labelled and (counts.min() < 2 or min(size, count - size) < len(counts))):
        why = f"each of {len(counts)} classes needs an image in it and one outside" if labelled else "that is none"
        raise DataError(f"{key}: {fraction} of {count} images cannot be drawn ({why})")
    return stratified_rows(targets, size) if labelled else np.random.RandomState(42).permutation(count)[count - size :]


def rows_of(subset: str, images: ImageSet, folder: Path, download: bool = True) -> np.ndarray:
    """The rows, ascending, of the images in `subset`: one of `PUBLISHED`, which is kept in `folder`, or a text file.

    A line is an image's file name, or its path below the training folder. `DataError` for what is not there.
    """
    if not isinstance(images.images, FileImages):
        raise DataError("data.subset: the training images are no files with names; use data.fraction")
    file = folder / f"{subset}.txt" if subset in PUBLISHED else Path(subset).expanduser()
    if subset in PUBLISHED:
        _fetch(subset, file, download)
    with naming(f"data.subset: {file} cannot be read", OSError, UnicodeError, error=DataError):
        wanted = dict.fromkeys(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    known: dict[str, int] = {}
    for i, path in enumerate(images.images.names):
        known |= {path: i, path.rpartition("/")[2]: i}
    if missing := [name for name in wanted if name not in known]:
        some = f"{len(missing):,} of its {len(wanted):,} images are not in data.train_path (first: {missing[0]})"
        raise DataError(f"data.subset: {subset}: {some}")
    if not wanted:
        raise DataError(f"data.subset: {file} names no image")
    return np.unique([known[name] for name in wanted])


def _fetch(name: str, file: Path, download: bool) -> None:
    """Puts a published list into `file`, unless it is there."""
    url, digest = PUBLISHED[name]
    if file.is_file() and sha256(file) == digest:
        return
    if not download:
        raise DataError(f"data.subset: {file} is missing or damaged, and data.download is false; it is {url}")
    from torch.hub import download_url_to_file

    with naming(f"data.subset: {url} cannot be downloaded to {file}", Exception, error=DataError):
        file.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(file), hash_prefix=digest, progress=False)
