"""Format h5: what is written is what is read, here and by solo-learn; processes, damage, and a full disk."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from solo_ext.data.augmentations import AugmentationConfig, ProbConfig
from solo_ext.data.datasets import DataConfig
from solo_ext.data.imagenet100 import CLASSES
from solo_ext.data.images import EXTENSIONS, read_folder
from solo_ext.data.modules import ClassificationData, PretrainData
from solo_ext.errors import ConfigError, DataError

pytest.importorskip("h5py")
import h5py

from solo_ext.data import h5
from solo_ext.data.h5 import INDEX, H5Images, read_h5, write_h5


@pytest.fixture(autouse=True)
def closed():
    yield
    h5._shared.cache_clear()


def save(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed % 5, 24, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """`images`: 3 classes of 4 files, some of them nested or with names that are not ASCII."""
    for c, name in enumerate(("cat", "dog", "écureuil")):
        for i, inner in enumerate(("0.jpg", "b/1.png", "b-2/ü x.jpg", "9.bmp")):
            save(tmp_path / "images" / name / inner, 10 * c + i)
    (tmp_path / "images" / "cat" / "notes.txt").write_text("passed over")
    return tmp_path


def by_others(path: Path, content: dict, **options) -> Path:
    """A file in solo-learn's layout, without our index: {group: {name: bytes}}."""
    with h5py.File(path, "w") as file:
        for group, files in content.items():
            for name, data in files.items():
                file.require_group(group).create_dataset(name, data=np.frombuffer(data, np.uint8), **options)
    return path


def encoded(seed: int = 0) -> bytes:
    import io

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(a[i], b[i]) for i in range(len(a)))


# Reading what was written.


@pytest.mark.parametrize("indexed", [True, False])
def test_a_file_holds_the_folder(folder, indexed):
    source, path = folder / "images", folder / "images.h5"
    if not indexed:
        for name in ("b", "b-2"):  # the layout that others write is flat
            for inner in sorted((source).rglob(f"{name}/*")):
                inner.rename(inner.parents[1] / f"{name}{inner.name}")
    files = read_folder(source, "k")
    assert len(write_h5(source, path)) == 12
    if not indexed:
        with h5py.File(path, "r+") as file:
            del file.attrs[INDEX]
    images = read_h5(path, "k")
    assert images.classes == files.classes == ("cat", "dog", "écureuil")
    assert images.targets.tolist() == files.targets.tolist() and images.targets.dtype == np.int64
    assert same(images.images, files.images)
    assert all(images.images.read(i) == Path(files.images.path(i)).read_bytes() for i in range(12))
    assert images.fingerprint() == files.fingerprint()
    some = images.subset(np.array([3, 7]))
    assert same(some.images, files.subset(np.array([3, 7])).images) and type(some.images) is H5Images
    bare = read_h5(path, "k", labels=False)
    assert bare.classes == () and (bare.targets == -1).all() and len(bare) == 12


def test_images_without_classes(tmp_path):
    for i in range(3):
        save(tmp_path / "flat" / f"{i}.png", i)
    write_h5(tmp_path / "flat", tmp_path / "flat.hdf5")
    images = read_h5(tmp_path / "flat.hdf5", "k")
    assert images.classes == () and images.targets.tolist() == [-1] * 3
    assert images.fingerprint() == read_folder(tmp_path / "flat", "k").fingerprint()


@pytest.mark.parametrize("options", [{}, {"compression": "gzip", "compression_opts": 9}])
def test_files_of_solo_learns_converter(tmp_path, options):
    content = {"b": {"z.jpg": encoded(1), "a.jpg": encoded(2)}, "a": {"x.jpg": encoded(3)}}
    images = read_h5(by_others(tmp_path / "x.h5", content, **options), "k")
    assert images.images.paths.tolist() == [b"a/x.jpg", b"b/a.jpg", b"b/z.jpg"]
    assert [images.images.read(i) for i in range(3)] == [encoded(3), encoded(2), encoded(1)]
    assert images.targets.tolist() == [0, 1, 1]


def test_solo_learn_reads_it(solo_learn, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where it keeps a list
    from solo.data.h5_dataset import H5Dataset

    for name in (CLASSES[0], CLASSES[7], "n00000000"):
        for i in range(3):
            save(tmp_path / "train" / name / f"{i}.png", i + len(name))
    write_h5(tmp_path / "train", tmp_path / "train.h5")
    ours = read_h5(tmp_path / "train.h5", "k")
    expected = [ours.images[i].permute(1, 2, 0).numpy() for i in range(9)]
    h5._shared.cache_clear()  # with a file lock, as solo-learn wants it, the file cannot be opened a second time
    for _ in range(2):  # from the file, from its list
        theirs = H5Dataset("imagenet", str(tmp_path / "train.h5"))
        assert len(theirs) == 9
        items = [theirs[i] for i in range(9)]
        theirs.h5_file.close()
        assert [label for _, label in items] == ours.targets.tolist()
        assert all(np.array_equal(np.asarray(image), e) for (image, _), e in zip(items, expected, strict=True))


# In a run.


def pretrain(path, **data) -> PretrainData:
    aug = AugmentationConfig(crop_size=16, num_crops=2, horizontal_flip=ProbConfig(0.5))
    data = {"dataset": "custom", "num_workers": 0, "train_path": str(path), **data}
    return PretrainData(DataConfig(**data), [aug], 5, seed=3)


def batches(data: PretrainData) -> list:
    data.check()
    return list(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_the_folders(folder, workers):
    """Also after the process has read from the file, so that its workers inherit an open one."""
    path = folder / "images.h5"
    write_h5(folder / "images", path)
    expected = batches(pretrain(folder / "images", format="image_folder"))
    data = pretrain(path, num_workers=workers, val_path=str(folder / "images"))
    assert data.format == "h5" and data.num_classes == 3 and len(data.train_set.images[0]) == 3
    for epoch in range(2):
        found = batches(data)
        for (i, views, y), (j, others, z) in zip(found, expected, strict=True):
            assert torch.equal(i, j) and torch.equal(y, z) and all(map(torch.equal, views, others)), epoch
    assert same(data.train_set.images, read_folder(folder / "images", "k").images)
    assert len(data.val_set) == 12


def test_no_handle_is_inherited_or_pickled(folder):
    write_h5(folder / "images", folder / "images.h5")
    images = read_h5(folder / "images.h5", "k").images
    assert not h5._shared.cache_info().currsize  # opening reads the names only
    expected = images.read(5)
    assert h5._shared.cache_info().currsize
    child = os.fork()
    if not child:
        clean = not h5._shared.cache_info().currsize
        os._exit(0 if clean and images.read(5) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert images.read(5) == expected
    copy = pickle.loads(pickle.dumps(images))
    assert copy.read(5) == expected and len(pickle.dumps(images)) < 2000


def test_imagenet100_takes_its_classes_of_imagenet(tmp_path):
    names = [*CLASSES, *(f"n9999{i:04}" for i in range(30))]
    path = by_others(tmp_path / "train.h5", {name: {"0.jpg": encoded(), "1.jpg": encoded(1)} for name in names})
    data = pretrain(path, dataset="imagenet100")
    data.check()
    assert data.num_classes == 100 and data.train_set.classes == tuple(sorted(CLASSES))
    assert data.train_set.targets.tolist() == np.repeat(np.arange(100), 2).tolist()
    assert b"n9999" not in b"".join(data.train_set.images.paths.tolist())
    bare = pretrain(path, dataset="imagenet100", no_labels=True)
    bare.check()
    assert len(bare.train_set) == 200 and bare.num_classes == 0
    h5._shared.cache_clear()  # this process has looked at the images' sizes
    with h5py.File(path, "r+") as file:
        del file[CLASSES[3]], file[CLASSES[5]]
    with pytest.raises(
        DataError, match=rf"^data.train_path: '{path}' has 128 classes, but 2 of the 100 .*{CLASSES[3]}"
    ):
        pretrain(path, dataset="imagenet100").check()


# What cannot work.


def test_an_unreadable_image_is_named(folder):
    path = by_others(folder / "x.h5", {"a": {"0.jpg": encoded(), "1.jpg": encoded()[:300], "2.jpg": b"no image"}})
    images = read_h5(path, "k").images
    assert images[0].shape == (3, 9, 8)
    for i in (1, 2):
        with pytest.raises(DataError, match=rf"^{path}: a/{i}\.jpg: not a readable image \([^<>]*\)$"):
            images[i]
    data = pretrain(path, corrupt="skip", corrupt_limit=1)
    data.batch_size = 3
    assert [batch[0].tolist() for batch in batches(data)] == [[0, 0, 0]]


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: cut(p, p.stat().st_size - 1), r"^data.train_path: '.*' is cut short: it has \d+ of \d+ bytes$"),
        (lambda p: cut(p, 3000), r"is cut short: it has 3000 of \d+ bytes$"),
        (lambda p: cut(p, 100), r"is cut short: it has 100 of \d+ bytes$"),
        (lambda p: cut(p, 0), "^data.train_path: '.*' is empty$"),
        (lambda p: p.write_bytes(b"no HDF5 at all"), "^data.train_path: '.*' is not an HDF5 file$"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500)), r"is a damaged HDF5 file \("),
        (lambda p: p.unlink(), "^data.train_path: there is no file '.*'$"),
        (lambda p: by_others(p, {}), "^data.train_path: no image in '.*x.h5'$"),
        (lambda p: h5py.File(p, "a").require_group("empty").file.attrs.pop(INDEX), "no image in '.*x.h5: empty'$"),
        (lambda p: by_others(p, {"/": {"z.jpg": b""}, "a": {"0.jpg": b""}}), "x.h5: z.jpg' lies beside the class"),
    ],
    ids=["last byte", "data", "superblock", "empty", "text", "damaged", "missing", "no image", "class", "label"],
)
def test_files_that_cannot_be_used(folder, change, message):
    path = folder / "x.h5"
    write_h5(folder / "images", path)
    change(path)
    with pytest.raises(DataError, match=message) as error:
        pretrain(path).check()
    assert "\n" not in str(error.value)


def test_every_cut_is_found(folder):
    write_h5(folder / "images", folder / "x.h5")
    whole = (folder / "x.h5").read_bytes()
    for size in range(1, len(whole), 211):
        (folder / "x.h5").write_bytes(whole[:size])
        with pytest.raises(DataError, match=f"is cut short: it has {size} of {len(whole)} bytes$|is not an HDF5 file$"):
            read_h5(folder / "x.h5", "k")


def test_without_h5py(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    expected = r"^data.train_path: HDF5 needs h5py, which is not installed: pip install 'solo-ext\[h5\]'$"
    with pytest.raises(ConfigError, match=expected):
        pretrain(folder / "x.h5").check()


def test_a_format_that_cannot_read_it(folder):
    write_h5(folder / "images", folder / "x.h5")
    with pytest.raises(ConfigError, match="'image_folder' does not read an HDF5 file"):
        pretrain(folder / "x.h5", format="image_folder").check()
    with pytest.raises(ConfigError, match="'h5' does not read image files"):
        pretrain(folder / "images", format="h5").check()


def test_a_classifier_reads_it(folder):
    write_h5(folder / "images", folder / "x.h5")
    data = DataConfig("custom", train_path=str(folder / "x.h5"), val_path=str(folder / "x.h5"), num_workers=0)
    data = ClassificationData(data, 4, 0, augment=False)
    data.check()
    assert [y.tolist() for _, _, y in data.val_dataloader()] == [[c] * 4 for c in range(3)]


# Writing.


def test_the_destination_is_whole_or_absent(folder):
    path, source = folder / "x.h5", folder / "images"
    before = sorted(folder.iterdir())
    bad = source / "dog" / "2.png"
    bad.write_text("no image")
    with pytest.raises(DataError, match=rf"^{bad}: not a readable image \(of no format that Pillow knows\)$"):
        write_h5(source, path)
    bad.unlink()

    def interrupted(rows):
        yield from rows[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_h5(source, path, interrupted)
    with pytest.raises(DataError, match=r"nowhere/x.h5 cannot be written: No such file or directory$"):
        write_h5(source, folder / "nowhere" / "x.h5")
    assert sorted(folder.iterdir()) == before
    write_h5(source, path)
    with pytest.raises(DataError, match=rf"^'{path}' exists; remove it"):
        write_h5(source, path)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files")
def test_a_full_disk(folder):
    """HDF5 crashes the process when writing fails; a limit on the size of files stands for the full disk."""
    code = """if True:
        import resource, signal, sys
        from solo_ext.data.h5 import write_h5
        from solo_ext.errors import DataError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for size in map(int, sys.argv[3:]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
            try:
                write_h5(*sys.argv[1:3])
            except DataError as error:
                print(error)
    """
    sizes = [0, 99, *range(1000, 14000, 2000)]
    argv = [sys.executable, "-c", code, str(folder / "images"), str(folder / "x.h5"), *map(str, sizes)]
    done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and all("passed over" in line for line in done.stderr.splitlines())
    assert done.stdout.splitlines() == [f"{folder / 'x.h5'} cannot be written: File too large"] * len(sizes)
    assert [path.name for path in folder.iterdir()] == ["images"]


def test_extensions_are_all_written(tmp_path):
    for extension in EXTENSIONS:
        image = Image.new("L" if extension == ".pgm" else "RGB", (5, 4))
        (tmp_path / "all").mkdir(exist_ok=True)
        image.save(tmp_path / "all" / f"x{extension}")
    assert len(write_h5(tmp_path / "all", tmp_path / "all.h5")) == len(EXTENSIONS)
    assert all(
        image.shape == (3, 4, 5) for image in map(read_h5(tmp_path / "all.h5", "k").images.__getitem__, range(9))
    )


def test_our_index_is_not_needed_to_be_found_by_others(folder):
    """The index hides from readers that list the root."""
    write_h5(folder / "images", folder / "x.h5")
    with h5py.File(folder / "x.h5") as file:
        assert re.fullmatch("cat dog écureuil", " ".join(file))
        assert file["cat/0.jpg"][:].tobytes() == (folder / "images" / "cat" / "0.jpg").read_bytes()
