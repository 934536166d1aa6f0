"""The `data` section of a configuration, and the datasets by name: what is known of each, and how it is read."""

import gzip
import os
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from solo_ext.data.augmentations import ClassificationAugmentationConfig
from solo_ext.data.decode import AS_STORED, DecodeConfig
from solo_ext.data.imagenet100 import CLASSES
from solo_ext.data.images import EXTENSIONS, ArrayImages, FileImages, ImageSet, class_folders, read_folder
from solo_ext.data.lists import SUFFIXES, read_list
from solo_ext.data.shared import once_on_a_node
from solo_ext.data.subsets import part_of, rows_of
from solo_ext.errors import ConfigError, DataError, SoloExtError, naming, require
from solo_ext.files import log, sha256
from solo_ext.schema import Bounds, Config, Count, OneOf, Share

# auto: the fastest that works for the images and the device, see `modules.pick_format`
Format = Literal["auto", "image_folder", "h5", "tensor", "dali"]
PerChannel = tuple[float, ...]  # of pixels in [0, 1]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

BUNDLED = "fashion_mnist_mini"
MINI = Path(__file__).with_name("assets") / "fashion_mnist_mini.npz"
# printed by scripts/data/build_fashion_mnist_mini.py
MINI_SHA256 = "4b0cd74d4fcfbd4364c43ad82ee3078902ea66a75ad24609aab2a854a052ac92"

H5_SUFFIXES = (".h5", ".hdf5")
LINEAR_REFERENCE = "imagenet100"  # whose linear recipes, solo-learn's, serve the datasets that have none
DEFAULT_FOLDER = "datasets"  # of the sets that have a download, when data.train_path is null


@dataclass(frozen=True)
class DatasetInfo:
    """Everything known about a dataset. Another one is one entry of `DATASETS`, made here or in a module of your own:
    DATASETS["mine"] = DatasetInfo(10, (0.5,) * 3, (0.25,) * 3, load_mine, image_size=64)"""

    num_classes: int | None  # 0: no labels; None: the classes are the folders at `data.train_path`
    mean: PerChannel  # as many as the images have channels, but that gray ones are shown with 3
    std: PerChannel
    load: Callable[["DataConfig", str], ImageSet] = field(repr=False, compare=False)  # see `load_dataset`
    _: KW_ONLY
    image_size: int | None = None  # side in pixels; None: images of any size
    box_classes: int = 0  # of the objects that have boxes; 0: none has
    small_images: bool = False  # whether the backbone gets solo-learn's CIFAR stem
    train_size: int | None = None  # number of images for pre-training
    test_size: int | None = None  # of test images, where all of those for pre-training have labels
    eval_mean: PerChannel | None = None  # where evaluation does not normalise as pre-training does
    eval_std: PerChannel | None = None
    recipes: str | None = None  # folder of its recipes in `scripts/*/`, where it is not the dataset's name
    hub: str | None = None  # id on the Hugging Face Hub

    @property
    def channels(self) -> int:
        return len(self.mean)

    def of(self, channels: int | None) -> "DatasetInfo":
        """For images of so many channels, by default its own."""
        if channels in (None, self.channels):
            return self
        return replace(self, mean=(0.5,) * channels, std=(0.25,) * channels, eval_mean=None, eval_std=None)

    def evaluated(self, mean: Any = None, std: Any = None) -> tuple[Any, Any]:
        """What evaluations normalise by, where a configuration has no mean or std."""
        return mean or self.eval_mean or self.mean, std or self.eval_std or self.std


DATASETS: dict[str, DatasetInfo] = {}  # filled at the end of this file


@dataclass
class DataConfig(Config, section="data"):
    dataset: Annotated[str, OneOf(DATASETS)]  # by its name; custom: images of your own
    train_path: str | None = None  # a folder, list of files or HDF5 file; for CIFAR and the like, that of the download
    val_path: str | None = None  # the same of the test images; null: for CIFAR and the like, train_path
    format: Format = "auto"  # auto: the fastest that works
    channels: Count | None = None  # of the images; null: the dataset's own, 3 of files
    # processes of image_folder and h5, threads of dali, but no more than there are cores; tensor has none
    num_workers: Annotated[int, Bounds(0)] = 4
    no_labels: bool = False  # true: class folders are no labels
    fraction: float = -1.0  # of the training set, stratified by class; -1: all of it
    # of the training set: ImageNet's simclr_1percent or simclr_10percent, or a text file with names of files
    subset: str | None = None
    val_fraction: Share = 0.0  # of the labelled training images: evaluated on instead of the test images; 0: none
    download: bool = True  # whether missing files may be fetched
    corrupt: Literal["error", "skip"] = "error"  # an unreadable image: error, or skip (the next one takes its place)
    corrupt_limit: Share = 0.01  # of the images may be skipped
    decode: DecodeConfig | None = None  # image files with more than 8-bit RGB holds
    accept_changes: bool = False  # whether a run goes on with images that have changed since it began
    augmentations: ClassificationAugmentationConfig | None = None  # linear evaluation only
    num_classes: int | None = None  # derived
    num_large_crops: int | None = None  # derived
    num_small_crops: int | None = None  # derived
    info: dict[str, Any] | None = None  # derived: `FACTS` of the dataset, for readers of the run that lack the dataset
    content: dict[str, Any] | None = None  # derived: the training and validation images, see `ImageSet.record`

    when_given = frozenset({"channels", "decode", "content"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_path", "val_path"):
            path = getattr(self, name)
            self.require(path != "", name, "a path or null")
            setattr(self, name, path and os.path.expanduser(path))
        share = 0 < self.fraction < 1
        self.require(share or self.fraction == -1, "fraction", "between 0 and 1, or -1 for the whole set")
        self.require(self.val_fraction < 1, "val_fraction", "below 1")


# what an encoder's network and the images that it is shown depend on
FACTS = ("image_size", "small_images", "mean", "std", "eval_mean", "eval_std")


def recorded_info(data: Mapping[str, Any]) -> DatasetInfo | None:
    """What is known of the dataset of an args.json's `data`: as recorded there, or by its name; None: nothing."""
    info, recorded = DATASETS.get(str(data.get("dataset"))), data.get("info")
    if recorded:
        return replace(info or CUSTOM, **{key: recorded[key] for key in FACTS})
    return info and info.of(data.get("channels"))


def dataset_info(data: DataConfig) -> DatasetInfo:
    """Facts about `data.dataset`, found without reading an image; class folders are counted at `data.train_path`."""
    info = DATASETS[data.dataset].of(data.channels)
    if data.no_labels:
        return replace(info, num_classes=0)
    if info.num_classes is None and data.train_path is not None:
        path = os.path.abspath(data.train_path)
        with suppress(OSError, SoloExtError):
            return replace(info, num_classes=_count_classes(path, os.stat(path).st_mtime_ns))
    return info


@lru_cache(maxsize=8)
def _count_classes(path: str, changed: int) -> int:
    return len(class_folders(path) if os.path.isdir(path) else read_images(path, "data.train_path").classes)


def read_images(path: str | os.PathLike, key: str, labels: bool = True, only: tuple[str, ...] = ()) -> ImageSet:
    """The folder, list of files (.txt, .csv) or HDF5 file at `path`; `only`: classes to take from a file with more."""
    suffix = "" if os.path.isdir(path) else Path(path).suffix.lower()
    if suffix in H5_SUFFIXES:
        require("h5py", f"{key}: HDF5", "h5")
        from solo_ext.data.h5 import read_h5

        return read_h5(path, key, labels, only)
    read = partial(read_list if suffix in SUFFIXES else read_folder, path, key, labels)
    return once_on_a_node(read, os.path.abspath(path), key, labels)


def load_dataset(data: DataConfig, split: str) -> ImageSet:
    """Images and labels of a split: `pretrain`, `train` (labelled; differs for stl10) or `test`.

    With `data.val_fraction`, `test` is a part of the training images, which the others lack; `data.subset`, and of it
    `data.fraction`, apply to all but `test`. Raises `DataError` for what is missing, and cannot or may not be
    downloaded, or damaged.
    """
    held_out = data.val_fraction > 0
    info = DATASETS[data.dataset].of(data.channels)
    images = info.load(data, "train" if held_out and split == "test" else split)
    if isinstance(images.images, FileImages):
        images.images.how, images.images.channels = data.decode or AS_STORED, info.channels
        if data.channels and data.corrupt == "error":
            images.images[0]  # where none has so many, a loader would look through all of them
    elif (own := images.images.channels) != info.channels and (own, info.channels) != (1, 3):
        raise ConfigError(f"data.channels: {info.channels}, but the images of '{data.dataset}' have {own}")
    elif data.decode:
        raise ConfigError(f"data.decode: the images of '{data.dataset}' are not decoded from files; leave it out")
    if held_out:
        labelled = np.flatnonzero(images.targets >= 0)
        if not len(labelled):
            raise DataError(f"data.val_fraction: the training images of '{data.dataset}' have no labels")
        rows = labelled[part_of(images.targets[labelled], data.val_fraction, "data.val_fraction")]
        kept = np.setdiff1d(np.arange(len(images)), rows)
        images = images.subset(np.sort(rows) if split == "test" else kept)
    if data.no_labels:
        images = images.unlabelled()
    if split == "test":
        return images
    if data.subset:
        images = images.subset(rows_of(data.subset, images, Path(DEFAULT_FOLDER), data.download))
    if data.fraction == -1:
        return images
    return images.subset(part_of(images.targets, data.fraction, "data.fraction"))


def _load_mini(data: DataConfig, split: str) -> ImageSet:
    name = "test" if split == "test" else "train"
    if not (MINI.is_file() and sha256(MINI) == MINI_SHA256):
        raise DataError(f"{MINI}: not the file that solo-ext was released with; reinstall solo-ext")
    with np.load(MINI, allow_pickle=False) as arrays:
        return ImageSet(ArrayImages(arrays[f"{name}_images"]), arrays[f"{name}_labels"].astype(np.int64))


def _load_fashion_mnist(data: DataConfig, split: str) -> ImageSet:
    """The idx files, gzipped or not, in the folder itself or where torchvision's FashionMNIST puts them."""
    root, _ = _root(data, split)
    name, prefix, count = ("test", "t10k", 10_000) if split == "test" else ("train", "train", 60_000)

    def find(kind: str) -> Path:
        folders = (root, root / "FashionMNIST" / "raw")
        paths = [folder / f"{prefix}-{kind}-ubyte{suffix}" for folder in folders for suffix in ("", ".gz")]
        return next(filter(Path.is_file, paths), paths[0])

    if not (find("images-idx3").is_file() and find("labels-idx1").is_file()):
        _torchvision(data, split, "FashionMNIST", train=split != "test")
    pixels, labels = read_idx(find("images-idx3")), read_idx(find("labels-idx1"))
    with np.load(MINI, allow_pickle=False) as known:  # drawn from it; MNIST and others have files of the same names
        images, classes, rows = (known[f"{name}_{part}"] for part in ("images", "labels", "rows"))
        whole = pixels.shape == (count, 28, 28) and labels.shape == (count,)
        if not (whole and np.array_equal(pixels[rows], images) and np.array_equal(labels[rows], classes)):
            raise DataError(f"{find('images-idx3')}: not Fashion-MNIST with its labels (shape {pixels.shape})")
    return ImageSet(ArrayImages(pixels), labels.astype(np.int64))


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an idx file (MNIST's format), gzipped if its name ends in .gz."""
    errors = OSError, EOFError, IndexError, ValueError, zlib.error
    with naming(f"{path}: not a readable idx file", *errors, error=DataError):
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            raw = bytearray(file.read())  # so that the array is writable, as torch wants it
        if raw[:3] != b"\0\0\x08":
            raise ValueError("no idx header of unsigned bytes")
        shape = np.frombuffer(raw, ">i4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _load_cifar(data: DataConfig, split: str) -> ImageSet:
    cifar = _torchvision(data, split, data.dataset.upper(), train=split != "test")
    return ImageSet(ArrayImages(cifar.data), np.asarray(cifar.targets, dtype=np.int64))


def _load_stl10(data: DataConfig, split: str) -> ImageSet:
    stl = _torchvision(data, split, "STL10", split="train+unlabeled" if split == "pretrain" else split)
    pixels = np.ascontiguousarray(stl.data.transpose(0, 2, 3, 1))
    return ImageSet(ArrayImages(pixels), stl.labels.astype(np.int64))  # where -1 marks the unlabelled images, too


def _load_folder(data: DataConfig, split: str, only: tuple[str, ...] = (), advice: str = "") -> ImageSet:
    """`only`: the dataset's classes; `advice`: what to do about a folder with more."""
    key, path = _named(data, split, "folder")
    images, expected = read_images(path, key, not data.no_labels, only), DATASETS[data.dataset].num_classes
    if expected is not None and len(images.classes) > expected:
        found = f"'{path}' has {len(images.classes)} class folders, but '{data.dataset}' has {expected} classes"
        raise DataError(f"{key}: {found}; {advice}data.dataset=custom takes another set")
    if other := sorted({*images.classes} - {*(only or images.classes)}):
        log.warning("%s: '%s' is no class of %s's, so its figures compare with nobody's", key, other[0], data.dataset)
    elif expected and 0 < len(images.classes) < expected:
        log.warning("%s: '%s' has %d of the %d classes", key, path, len(images.classes), expected)
    return images


def _named(data: DataConfig, split: str, what: str) -> tuple[str, str]:
    """The key that names where a split is, and its value."""
    name = "val_path" if split == "test" else "train_path"
    if (path := getattr(data, name)) is None:
        raise DataError(f"data.{name}: missing, but dataset '{data.dataset}' is read from the {what} named there")
    return f"data.{name}", path


def _root(data: DataConfig, split: str) -> tuple[Path, str]:
    """The folder of a dataset that has a download, and the key that names it."""
    if split == "test" and data.val_path:
        return Path(data.val_path), "data.val_path"
    return Path(data.train_path or DEFAULT_FOLDER), "data.train_path"


def _torchvision(data: DataConfig, which: str, name: str, **kwargs: Any) -> Any:
    """torchvision's dataset `name` from disk, or else from its download, one process at a time."""
    import torchvision.datasets
    from filelock import FileLock  # a dependency of torch

    cls = getattr(torchvision.datasets, name)
    root, key = _root(data, which)
    damaged = naming(f"{key}: the files of {name} in '{root}' cannot be read", Exception, error=DataError)
    with damaged, suppress(RuntimeError):  # torchvision's "not found or corrupted", after comparing checksums
        return cls(root, download=False, **kwargs)
    missing = f"{key}: no complete files of {name} in '{root}'"
    if any(path.suffix.lower() in EXTENSIONS for pattern in ("*", "*/*") for path in root.glob(pattern)):
        own = "data.dataset=custom, as in the recipes custom/..., trains on these"
        raise DataError(f"{missing}, but images of another set; {own}, and a folder of its own takes the download")
    if not data.download:
        raise DataError(f"{missing}, and data.download is false")
    lock, existed = root / ".download.lock", root.exists()
    try:  # the network, the disk and a broken archive raise errors of many types
        with naming(f"{missing}, and the download failed", Exception, error=DataError):
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                return cls(root, download=True, **kwargs)
    finally:
        with suppress(OSError):
            lock.unlink()
        for folder, _, _ in () if existed else os.walk(root, topdown=False):
            with suppress(OSError):
                os.rmdir(folder)  # only if empty: a failed download leaves no folders behind


def _load_boxes(data: DataConfig, split: str) -> ImageSet:
    from solo_ext.data.boxes import read_boxes

    key, path = _named(data, split, "annotation")
    return read_boxes(path, key, skip=data.corrupt == "skip")


_FASHION = partial(
    DatasetInfo, 10, (0.286,) * 3, (0.353,) * 3, image_size=28, small_images=True, hub="zalando-datasets/fashion_mnist"
)
_CIFAR = partial(
    DatasetInfo,
    load=_load_cifar,
    image_size=32,
    small_images=True,
    train_size=50_000,
    test_size=10_000,
    # solo-learn evaluates both CIFAR sets with CIFAR-10's mean and a coarser std; kept, so that accuracies compare
    eval_mean=(0.4914, 0.4822, 0.4465),
    eval_std=(0.247, 0.243, 0.261),
)
_BOXES = partial(DatasetInfo, 0, IMAGENET_MEAN, IMAGENET_STD, _load_boxes)  # without labels of whole images
_IMAGENET = partial(DatasetInfo, mean=IMAGENET_MEAN, std=IMAGENET_STD, hub="ILSVRC/imagenet-1k")
_IMAGENET_100 = partial(
    _load_folder, only=CLASSES, advice="solo-ext data imagenet100 SRC DST makes a folder of its classes, "
)
# images of any size, whose classes are their folders; also what is assumed of a dataset that is not known here
FOLDER, CUSTOM = "custom", DatasetInfo(None, IMAGENET_MEAN, IMAGENET_STD, _load_folder)

DATASETS |= {
    BUNDLED: _FASHION(load=_load_mini, train_size=5_000, test_size=1_000),
    "fashion_mnist": _FASHION(load=_load_fashion_mnist, train_size=60_000, test_size=10_000),
    "cifar10": _CIFAR(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), hub="uoft-cs/cifar10"),
    "cifar100": _CIFAR(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), hub="uoft-cs/cifar100"),
    "stl10": DatasetInfo(
        10, (0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261), _load_stl10, image_size=96, train_size=105_000
    ),
    "imagenet100": _IMAGENET(100, load=_IMAGENET_100, train_size=126_689, test_size=5_000, recipes="imagenet-100"),
    "imagenet": _IMAGENET(1000, load=_load_folder, train_size=1_281_167, test_size=50_000),
    "voc": _BOXES(box_classes=20),
    "coco": _BOXES(box_classes=80),
    FOLDER: CUSTOM,
}
