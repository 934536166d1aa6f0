"""ImageNet-100: a hundred classes of ImageNet, as links to their folders."""

import os
from pathlib import Path

from solo_ext.data.images import ImageSet, class_folders, read_folder
from solo_ext.errors import DataError
from solo_ext.files import new_folder

_LIST = Path(__file__).with_name("assets") / "imagenet100_classes.txt"
CLASSES = tuple(line for line in _LIST.read_text(encoding="utf-8").split("\n") if line and not line.startswith("#"))
SIZES = {"train": 126_689, "val": 5_000}


def build_imagenet100(source: str | os.PathLike, destination: str | os.PathLike) -> dict[str, ImageSet]:
    """Makes `destination`/{train,val}/<class>, whole or not at all, unless it is there: relative links to the class
    folders in `source`/{train,val}. Returns the training and the validation images. `DataError` if `source` has no such
    folders or lacks classes, or if `destination` is something else or cannot be written."""
    source, destination = Path(source), Path(destination)
    for split in SIZES:
        folder = source / split
        if not folder.is_dir():
            raise DataError(f"there is no folder '{folder}'; SRC holds ImageNet's train/ and val/")
        names = class_folders(folder)
        if not names:
            raise DataError(
                f"'{folder}' has no class folders; images that lie beside each other, as in the download of ImageNet's "
                "validation set, have to be sorted into one folder for each class first"
            )
        if missing := sorted({*CLASSES} - {*names}):
            some = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
            raise DataError(f"'{folder}' lacks {len(missing)} of the {len(CLASSES)} classes: {some}")
    targets = {f"{split}/{name}": source / split / name for split in SIZES for name in CLASSES}
    if os.path.lexists(destination):
        links = {f"{path.parent.name}/{path.name}": path.resolve() for path in destination.glob("*/*")}
        expected = {link: target.resolve() for link, target in targets.items()}
        if different := dict(links.items() ^ expected.items()):
            first = min(different)
            raise DataError(f"'{destination}' exists and is not made from this SRC (first difference: {first})")
        return _read(destination)
    if not destination.parent.is_dir():
        raise DataError(f"'{destination}' cannot be written: there is no folder '{destination.parent}'")
    with new_folder(destination, DataError) as temporary:
        for link, target in targets.items():
            path = temporary / link
            path.parent.mkdir(exist_ok=True)
            path.symlink_to(os.path.relpath(target.absolute(), path.parent.resolve()), target_is_directory=True)
        _read(temporary)  # refuses a class without images
    return _read(destination)


def _read(folder: Path) -> dict[str, ImageSet]:
    return {split: read_folder(folder / split, split) for split in SIZES}
