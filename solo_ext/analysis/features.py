"""The features of any images as a file for other programs, with the images' names and labels."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from solo_ext.data.augmentations import ClassificationAugmentationConfig
from solo_ext.data.datasets import CUSTOM, FOLDER, DataConfig, recorded_info
from solo_ext.data.images import FileImages, ImageSet
from solo_ext.data.modules import ClassificationData
from solo_ext.errors import ConfigError, DataError, require
from solo_ext.evaluation.features import extract_features
from solo_ext.files import output
from solo_ext.runs.checkpoints import Checkpoint
from solo_ext.runs.encoder import evaluation_view, load_encoder
from solo_ext.training.config import resolve, run_values
from solo_ext.training.trainer import explained

BATCH = 256
Columns = dict[str, np.ndarray]


def _npz(columns: Columns, file: Any) -> None:
    texts: Any = {name: x.astype(str) if x.dtype == object else x for name, x in columns.items()}
    np.savez(file, **texts)


def _parquet(columns: Columns, file: Any) -> None:
    require("pyarrow", "--out *.parquet", "features")
    import pyarrow
    from pyarrow import parquet

    lists = pyarrow.FixedSizeListArray.from_arrays(columns["features"].ravel(), columns["features"].shape[1])
    parquet.write_table(pyarrow.table({**columns, "features": lists}), file)


def _h5(columns: Columns, file: Any) -> None:
    require("h5py", "--out *.h5", "h5")
    import h5py

    with h5py.File(file, "w") as out:
        for name, x in columns.items():
            out.create_dataset(name, data=x)


WRITERS: dict[str, Callable[[Columns, Any], None]] = {".npz": _npz, ".parquet": _parquet, ".h5": _h5, ".hdf5": _h5}


def features_of(
    source: Checkpoint, images: str | None, teacher: bool = False, workers: int = 4, count: int | None = None
) -> tuple[np.ndarray, ImageSet]:
    """Features float32 [N, D] of a run's encoder, and the images at a path as they were read: a folder, list or HDF5
    file, with labels if it has any, shown as the run's evaluations show them; without a path, its validation images.

    count: of more images, only so many, evenly taken.
    Raises CheckpointError and DataError, as the evaluations do.
    """
    backbone, run = load_encoder(source, teacher=teacher)
    config = run or {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if images is None:
        data = own_data(source)
        data.data.num_workers, data.device = workers, device
        split, make = "val_set", data.val_dataloader
    else:
        view = ClassificationAugmentationConfig(**evaluation_view(config))
        info = recorded_info(config.get("data") or {}) or CUSTOM
        read = DataConfig(FOLDER, images, channels=info.channels, num_workers=workers, augmentations=view)
        data = ClassificationData(read, BATCH, seed=0, augment=False)
        data.info = info  # how an image of another size is resized
        data.device = device
        try:
            data.train_set  # noqa: B018, which is read here
        except DataError as error:
            raise DataError(str(error).replace("data.train_path", "IMAGES")) from None
        split, make = "train_set", data.train_dataloader
    shown: ImageSet = getattr(data, split)
    if count is not None and count < len(shown):
        setattr(data, split, shown := shown.evenly(count))
    with explained():
        features, _ = extract_features(backbone.to(device), make(), device)
    return features.numpy(), shown


def own_data(source: Checkpoint) -> ClassificationData:
    """The images that a run's evaluations take; DataError where it has none with labels."""
    cfg = resolve(run_values(source.path, "knn"), "knn")
    data = ClassificationData(cfg.data, BATCH, cfg.seed, augment=False)
    data.check()
    return data


def names_of(images: ImageSet) -> list[str]:
    """The images' paths, or their numbers."""
    files = images.images
    return files.names if isinstance(files, FileImages) else list(map(str, range(len(images))))


def write_features(
    source: Checkpoint,
    images: str | None,
    out: str | os.PathLike,
    teacher: bool = False,
    half: bool = False,
    workers: int = 4,
) -> tuple[int, int]:
    """Writes `features` [N, D] (float32, or with `half` float16), `name` [N] and `label` [N] (-1: none) to an .npz,
    .parquet or .h5; returns N and D.

    ConfigError for another ending, or where it cannot be written; nothing is left half-written.
    """
    path = Path(out).expanduser()
    if path.suffix not in WRITERS:
        raise ConfigError(f"--out: '{path}' must end in one of {', '.join(WRITERS)}")
    features, shown = features_of(source, images, teacher, workers)
    columns: Columns = {
        "features": features.astype(np.float16) if half else features,
        "name": np.array(names_of(shown), object),
        "label": shown.targets,
    }
    with output(path) as file:
        WRITERS[path.suffix](columns, file)
    return features.shape[0], features.shape[1]
