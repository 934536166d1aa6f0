"""Lists of files, ImageNet-100, fingerprints, `solo-ext data`, and data that cannot work, as a user meets it."""

import hashlib
import json
import os
import pickle
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from solo_ext.cli.data import DATA
from solo_ext.data.datasets import DataConfig, dataset_info, load_dataset, read_images
from solo_ext.data.imagenet100 import CLASSES, SIZES, build_imagenet100
from solo_ext.data.images import read_folder
from solo_ext.data.lists import read_list
from solo_ext.data.modules import ClassificationData
from solo_ext.errors import DataError

CUSTOM = ROOT / "scripts" / "pretrain" / "custom" / "byol.yaml"
MINI = ROOT / "scripts" / "pretrain" / "fashion_mnist_mini" / "byol.yaml"
SMALL = (
    "accelerator=cpu",
    "precision=32",
    "data.num_workers=0",
    "optimizer.batch_size=4",
    "backbone.name=resnet10_w16",
    "max_epochs=1",
)
VIEWS = ("augmentations.0.crop_size=24", "augmentations.1.crop_size=24")


def save(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """`images`: 2 classes of 4 files."""
    for c, name in enumerate(("cat", "dog")):
        for i in range(4):
            save(tmp_path / "images" / name / f"{i} {i}.png", 10 * c + i)
    return tmp_path


def everything(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


# Lists of files.


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_list_is_the_folder(folder):
    files = read_folder(folder / "images", "k")
    rows = [f"{os.fsdecode(p)}\t {c}" for p, c in zip(files.images.paths.tolist(), files.targets, strict=True)]
    path = write(folder / "images" / "list.txt", "\ufeff# two classes", "", *rows[:5], "  # the rest", *rows[5:], "  ")
    images = read_images(path, "k")
    assert images.targets.tolist() == files.targets.tolist() and images.classes == ("0", "1")
    assert images.images.paths.tolist() == files.images.paths.tolist()
    assert all((images.images[i] == files.images[i]).all() for i in range(8))
    assert images.fingerprint() == files.fingerprint()
    elsewhere = write(folder / "list.txt", *(f"{folder / 'images'}/{row}" for row in rows))  # absolute paths
    assert (read_list(elsewhere, "k").images[7] == files.images[7]).all()


def test_labels_of_a_list(folder):
    names = ["cat/0 0.png", "cat/1 1.png", "dog/2 2.png"]
    bare = read_list(write(folder / "images" / "a.txt", *names), "k")
    assert bare.classes == () and bare.targets.tolist() == [-1] * 3
    some = write(folder / "images" / "b.txt", f"{names[0]} 3", names[1], f"{names[2]} 10")
    with pytest.raises(DataError, match=rf"^k: line 2 of the list '{some}' has no label, unlike others$"):
        read_list(some, "k")
    assert read_list(some, "k", labels=False).images.paths.tolist() == [os.fsencode(name) for name in names]
    write(some, f"{names[0]} 3", f"{names[1]} 10", f"{names[2]} 3")
    images = read_list(some, "k")  # numbers in order, not words
    assert images.classes == ("3", "10") and images.targets.tolist() == [0, 1, 0]
    write(some, f"{names[0]} -1", f"{names[1]} 0")
    images = read_list(some, "k")  # one without a label
    assert images.classes == ("0",) and images.targets.tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("lines", "classes", "targets"),
    [
        (["cat/0 0.png house cat", "dog/2 2.png\tdog"], ("dog", "house cat"), [1, 0]),
        (["cat/0 0.png,house cat", "dog/2 2.png, dog", "dog/3 3.png,-1"], ("dog", "house cat"), [1, 0, -1]),
        (["path,label", "cat/0 0.png,10", "dog/2 2.png,9", "dog/3 3.png,09"], ("9", "10"), [1, 0, 0]),
        (["Image_Path;Class", "cat/0 0.png;müsli", "dog/2 2.png;3"], ("3", "müsli"), [1, 0]),
        (["filename", "cat/0 0.png", "dog/2 2.png"], (), [-1, -1]),
    ],
)
def test_words_are_labels_and_a_list_may_have_a_header(folder, lines, classes, targets):
    path = write(folder / "images" / "list.csv", *lines)
    images = read_images(path, "k")
    assert (images.classes, images.targets.tolist()) == (classes, targets)
    assert images.images.path(0) == str(folder / "images/cat/0 0.png") and images.images[1].shape == (3, 24, 20)


def test_a_list_takes_the_memory_of_a_folder(tmp_path):
    """While it is read, and in each worker."""
    for i in range(3000):
        (tmp_path / "set" / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / f"{i % 3}" / f"{i}.png").touch()
    files = read_folder(tmp_path / "set", "k")
    rows = zip(files.images.names, files.targets, strict=True)
    path, peaks, sizes = write(tmp_path / "set" / "all.txt", *(f"{name} {c}" for name, c in rows)), [], []
    for read, where in ((read_folder, tmp_path / "set"), (read_list, path)):
        tracemalloc.start()
        images = read(where, "k")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(len(pickle.dumps(images)))
        assert images.fingerprint() == files.fingerprint()
    assert peaks[1] < 1.5 * peaks[0] and sizes[1] == sizes[0], (peaks, sizes)


def test_a_list_in_another_encoding(folder):
    path = folder / "images" / "a.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # the last as Windows writes it
        path.write_text("cat/0 0.png 0\ndog/2 2.png 1\n", encoding=encoding)
        assert read_list(path, "k").targets.tolist() == [0, 1]
    path.write_text("cat/0 0.png 0\n", encoding="utf-16-le")  # and without its mark
    with pytest.raises(DataError, match=rf"^k: '{path}' is no list of paths in UTF-8$"):
        read_list(path, "k")


@pytest.mark.parametrize(
    "lines, message",
    [
        (["cat/0 0.png", "", "cat/9.png"], "line 3 of the list '.*list.txt': there is no file 'cat/9.png'$"),
        (["cat/0 0.png 0", "bat/0 0.png 1"], "line 2 of the list '.*list.txt': there is no file 'bat/0 0.png'$"),
        (
            ["cat/0 0.png 0 2"],
            "line 1 of the list '.*': '0 2' is no label, which is a number from 0, -1 for none, or a word$",
        ),
        (["cat/0 0.png 1", "cat/1 1.png 0,1"], "line 2 of the list '.*': '0,1' is no label"),
        (["cat/0 0.png,cat,train"], "line 1 of the list '.*': 'cat,train' is no label"),
        (["cat/9.png,label"], "line 1 of the list '.*': there is no file 'cat/9.png,label'$"),
        (["path,label"], "^data.train_path: no image in the list '.*list.txt'$"),
        (["path,label", "cat/0 0.png,cat", "dog/2 2.png"], "line 3 of the list '.*' has no label, unlike others$"),
        (["cat/0 0.png 0.5"], "line 1 of the list '.*': '0.5' is no label"),
        (["# nothing", ""], "^data.train_path: no image in the list '.*list.txt'$"),
    ],
)
def test_lists_that_cannot_work(folder, lines, message):
    path = write(folder / "images" / "list.txt", *lines)
    with pytest.raises(DataError, match=message):
        load_dataset(DataConfig("custom", train_path=str(path)), "train")
    with pytest.raises(DataError, match=r"^data.train_path: there is no file '.*no.txt'$"):
        load_dataset(DataConfig("custom", train_path=str(folder / "no.txt")), "train")


def test_a_list_has_as_many_classes_as_labels(folder):
    rows = [f"{name}/{i} {i}.png {c}" for c, name in enumerate(("cat", "dog")) for i in range(4)]
    train, val = write(folder / "images" / "train.txt", *rows), write(folder / "images" / "val.txt", *rows[4:])
    config = DataConfig("custom", train_path=str(train), val_path=str(val), num_workers=0)
    assert dataset_info(config).num_classes == 2
    data = ClassificationData(config, 4, 0)
    data.check()
    assert data.num_classes == 2 and data.val_set.targets.tolist() == [1] * 4
    write(val, rows[4], rows[5][:-1] + "-1")  # of whose images one has no label
    assert ClassificationData(config, 4, 0).val_set.targets.tolist() == [1, -1]
    write(train, *rows, "cat/0 0.png 2")
    os.utime(train, ns=(0, 0))
    assert dataset_info(config).num_classes == 3
    assert dataset_info(DataConfig("custom", train_path=str(folder / "no.txt"))).num_classes is None
    assert dataset_info(DataConfig("custom", train_path=str(train), no_labels=True)).num_classes == 0


# ImageNet-100.


def test_the_classes_are_solo_learns(solo_learn):
    text = (solo_learn / "solo" / "data" / "dataset_subset" / "imagenet100_classes.txt").read_text()
    assert sorted(text.split()) == list(CLASSES)


def test_the_classes():
    assert len(set(CLASSES)) == 100 and list(CLASSES) == sorted(CLASSES)
    assert all(name[0] == "n" and len(name) == 9 and name[1:].isdigit() for name in CLASSES)
    assert hashlib.sha256(" ".join(CLASSES).encode()).hexdigest()[:16] == "469d277522bc36e8"


@pytest.fixture
def imagenet(tmp_path):
    """A small ImageNet: 102 classes with 2 training images and 1 validation image each."""
    source = tmp_path / "disk" / "imagenet"
    save(tmp_path / "one.JPEG")
    for name in (*CLASSES, "n00000000", "n99999999"):
        for path in (f"train/{name}/{name}_1.JPEG", f"train/{name}/{name}_2.JPEG", f"val/{name}/v.JPEG"):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(tmp_path / "one.JPEG", source / path)
    (tmp_path / "one.JPEG").unlink()
    return source


SPLITS = (("train", 200), ("val", 100))


def test_imagenet100_is_links(run, tmp_path, imagenet):
    status, out, err = run("data", "imagenet100", "disk/imagenet", "in100")
    assert status == 0 and out == "in100: links to 100 classes; 200 train images, 100 val images\n"
    known = [f"solo-ext: ImageNet-100 has {SIZES[split]:,} {split} images, not {n}" for split, n in SPLITS]
    assert err.splitlines() == known
    for split in ("train", "val"):
        made = sorted((tmp_path / "in100" / split).iterdir())
        assert [path.name for path in made] == list(CLASSES)
        assert all(os.readlink(path) == f"../../disk/imagenet/{split}/{path.name}" for path in made)
    before = everything(tmp_path / "in100")
    assert run("data", "imagenet100", tmp_path / "disk" / "imagenet", "in100")[:2] == (status, out)
    assert everything(tmp_path / "in100") == before
    assert sorted(os.listdir(tmp_path)) == ["disk", "in100"]

    config = {"train_path": "in100/train", "val_path": "in100/val", "num_workers": 0}
    data = ClassificationData(DataConfig("imagenet100", **config), 4, 0)
    data.check()
    assert data.num_classes == 100 and len(data.train_set) == 200 and len(data.val_set) == 100
    config["train_path"] = "disk/imagenet/train"
    with pytest.raises(DataError, match=r"has 102 class folders, but .* 100 classes; solo-ext data imagenet100 SRC"):
        ClassificationData(DataConfig("imagenet100", **config), 4, 0).check()


def test_links_from_a_linked_folder(tmp_path, imagenet):
    """A relative path is followed from where a folder really is."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "short").symlink_to("deep/er")
    build_imagenet100(imagenet, tmp_path / "short" / "in100")
    assert (tmp_path / "deep" / "er" / "in100" / "val" / CLASSES[0] / "v.JPEG").is_file()
    assert (tmp_path / "short" / "in100" / "val" / CLASSES[0] / "v.JPEG").is_file()


def lack(source, destination):
    for name in (CLASSES[4], CLASSES[9]):
        shutil.rmtree(source / "train" / name)


def flatten(source, destination):
    for path in (source / "val").iterdir():
        (path / "v.JPEG").rename(source / "val" / f"{path.name}.JPEG")
        path.rmdir()


def differ(source, destination):
    build_imagenet100(source, destination)
    (destination / "train" / CLASSES[3]).unlink()
    (destination / "train" / CLASSES[3]).symlink_to(source / "train" / "n00000000")


def add(source, destination):
    build_imagenet100(source, destination)
    (destination / "train" / "n00000000").symlink_to(source / "train" / "n00000000")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s, d: shutil.rmtree(s / "val"), "there is no folder 'disk/imagenet/val'; SRC holds"),
        (flatten, "'disk/imagenet/val' has no class folders; images that lie beside each other"),
        (lack, f"'disk/imagenet/train' lacks 2 of the 100 classes: {CLASSES[4]}, {CLASSES[9]}"),
        (lambda s, d: (s / "val" / CLASSES[2] / "v.JPEG").unlink(), "(looked for .jpg"),
        (lambda s, d: d.mkdir(), "'in100' exists and is not made from this SRC"),
        (lambda s, d: d.write_text(""), "'in100' exists and is not made from this SRC"),
        (differ, f"(first difference: train/{CLASSES[3]})"),
        (add, "(first difference: train/n00000000)"),
    ],
    ids=["no val", "flat val", "lacking", "empty class", "empty folder", "file", "another link", "one more"],
)
def test_imagenet100_that_cannot_be(run, tmp_path, imagenet, damage, message):
    damage(imagenet, tmp_path / "in100")
    before = everything(tmp_path)
    status, out, err = run("data", "imagenet100", "disk/imagenet", "in100")
    # at most the line that says where the run would have been
    assert status == 2 and len(out.splitlines()) <= 1 and message in err and len(err.splitlines()) == 1, err
    assert everything(tmp_path) == before


def test_imagenet100_into_nowhere(run, imagenet):
    status, _, err = run("data", "imagenet100", "disk/imagenet", "no/where")
    assert status == 2 and err == "solo-ext: error: 'no/where' cannot be written: there is no folder 'no'\n"


# Fingerprints.


def test_the_fingerprint_is_names_and_labels(folder):
    files = read_folder(folder / "images", "k")
    names = [f"{c}/{i} {i}.png" for c in ("cat", "dog") for i in range(4)]
    content = "\n".join(names).encode() + b"".join(c.to_bytes(8, "little") for c in (0,) * 4 + (1,) * 4)
    assert files.fingerprint() == hashlib.sha256(content).hexdigest()
    (folder / "links").symlink_to("images")
    shutil.copytree(folder / "images", folder / "copy" / "of images")
    same = [read_folder(folder / name, "k").fingerprint() for name in ("links", "copy/of images", "images/../images/")]
    assert set(same) == {files.fingerprint()}
    rows = np.arange(8)
    others = [files.subset(rows[::-1]), files.subset(rows[1:]), files.unlabelled()]
    (folder / "images" / "dog").rename(folder / "images" / "elk")
    others.append(read_folder(folder / "images", "k"))
    assert len({images.fingerprint() for images in (files, *others)}) == 5


def test_the_fingerprint_of_arrays_is_their_pixels():
    mini = load_dataset(DataConfig("fashion_mnist_mini"), "test")
    first = mini.fingerprint()
    assert load_dataset(DataConfig("fashion_mnist_mini"), "test").fingerprint() == first
    pixels = mini.images.pixels.copy()
    pixels[3, 2, 1] ^= 1
    assert type(mini)(type(mini.images)(pixels), mini.targets).fingerprint() != first
    assert type(mini)(mini.images, mini.targets[::-1]).fingerprint() != first


def test_a_run_records_its_data(run, folder):
    paths = ("data.train_path=images", "data.val_path=images")
    status, _, err = run("pretrain", CUSTOM, *paths, *SMALL, *VIEWS)
    assert status == 0, err
    [path] = (folder / "trained_models").rglob("environment.json")
    recorded = read_folder(folder / "images", "k").record()
    assert recorded == {"images": 8, "classes": 2, "fingerprint": read_folder(folder / "images", "k").fingerprint()}
    content = read_folder(folder / "images", "k").content()
    sets = dict.fromkeys(("train", "val"), recorded | content)
    assert json.loads(path.read_text())["data"] == {"dataset": "custom", "format": "tensor", **sets}
    assert json.loads(path.with_name("args.json").read_text())["data"]["content"] == sets
    status, out, _ = run("data", "fingerprint", "images")
    assert status == 0 and [line.split(None, 1)[1] for line in out.splitlines()] == list(map(str, recorded.values()))


# The commands.


@pytest.mark.parametrize("name", DATA.commands)
def test_help_of_a_command(run, name):
    status, out, err = run("data", name, "--help")
    assert status == 0 and not err and f"usage: solo-ext data {name}" in out
    assert out.count(f"\n  solo-ext data {name}") == len(DATA.commands[name].examples) >= 2
    assert max(map(len, out.splitlines())) <= 80
    assert f"\n  {name} " in run("data")[1]


def test_to_h5_and_back(run, folder):
    pytest.importorskip("h5py")
    assert run("data", "to-h5", "images", "x.h5") == (0, "x.h5: 8 images, 2 classes\n", "")
    assert run("data", "fingerprint", "x.h5") == run("data", "fingerprint", "images")
    status, _, err = run("pretrain", CUSTOM, "data.train_path=x.h5", "data.format=h5", *SMALL, *VIEWS)
    [path] = (folder / "trained_models").rglob("environment.json")
    assert status == 0 and json.loads(path.read_text())["data"]["format"] == "h5", err


@pytest.mark.parametrize(
    ("changes", "classes", "logged"),
    [
        (["data.train_path=images", "data.val_path=images"], 2, {"val_acc1", "val_knn1", "val_knn20"}),
        (["data.train_path=images"], 2, set()),
        (["data.train_path=images/cat"], 0, set()),
    ],
)
def test_the_recipe_of_ones_own_images_has_a_classifier_and_knn_where_there_are_labels(
    run, folder, changes, classes, logged
):
    assert run("pretrain", CUSTOM, *changes, *SMALL, *VIEWS)[0] == 0
    [path] = (folder / "trained_models").rglob("result.json")
    metrics = json.loads(path.read_text())["metrics"]
    assert {name for name in metrics if name.startswith(("val_acc1", "val_knn"))} == logged
    assert ("train_acc1" in metrics) == bool(classes)
    assert json.loads((path.parent / "args.json").read_text())["data"]["num_classes"] == classes


@pytest.mark.parametrize("size", [64, 9])
def test_the_batch_size_that_is_said_works(run, folder, size):
    words = ["pretrain", CUSTOM, "data.train_path=images", *SMALL, *VIEWS]
    status, _, err = run(*words, f"optimizer.batch_size={size}")
    assert status == 2 and err.count("error") == 1
    [said] = re.findall(r"; (optimizer\.batch_size=\d+) fits$", err.splitlines()[-1])
    assert said == "optimizer.batch_size=8" and run(*words, said)[0] == 0


def test_linear_says_first_that_there_are_no_labels(run, folder):
    about = ["untrained=true", "backbone.name=resnet10_w16", "data.dataset=custom", "data.train_path=images/cat"]
    recipe = ROOT / "scripts" / "linear" / "imagenet-100" / "byol.yaml"
    for more in ([], ["optimizer.batch_size=4096", "data.format=tensor", "data.val_path=null"]):
        status, _, err = run("linear", recipe, *about, "devices=1", "strategy=auto", "accelerator=cpu", *more)
        assert status == 2 and "data.dataset: 'custom' has no labels here" in err.splitlines()[-1], err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["to-h"], "there is no command 'data to-h'; did you mean 'to-h5'?"),
        (["fly"], "(one of to-h5, imagenet100, fingerprint"),
        (["to-h5", "images"], "required: DST.h5"),
        (["to-h5", "images", "x.zip"], "DST: 'x.zip' must end in .h5 or .hdf5"),
        (["to-h5", "nowhere", "x.h5"], "SRC: there is no folder 'nowhere'"),
        (["to-h5", "images", "x.h5", "--compress"], "unknown option '--compress'"),
        (["fingerprint"], "required: PATH"),
        (["fingerprint", "x.h5"], "PATH: there is no file 'x.h5'"),
        (["imagenet100", "images", "in100"], "there is no folder 'images/train'"),
    ],
)
def test_mistakes(run, folder, argv, message):
    before = everything(folder)
    status, out, err = run("data", *argv)
    # at most the line that says where the run would have been
    assert status == 2 and len(out.splitlines()) <= 1 and message in err and len(err.splitlines()) == 1, err
    assert everything(folder) == before


# Data that cannot work.


def no_images(folder):
    for path in (folder / "images").rglob("*.png"):
        path.rename(path.with_suffix(".dat"))


def text(folder):
    (folder / "images" / "dog" / "2 2.png").write_text("no image")


def half_labelled(folder):
    write(folder / "l.txt", "images/cat/0 0.png 0", "images/cat/1 1.png")


def cut_short(folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "x.h5", "w") as file:
        file["a/0.jpg"] = np.zeros(5000, np.uint8)
    with open(folder / "x.h5", "r+b") as file:
        file.truncate(4000)


@pytest.mark.parametrize(
    "damage, changes, message",
    [
        (
            no_images,
            [],
            "data.train_path: no image in 'images/cat' (looked for .jpg .jpeg .png",
        ),
        (no_images, [], "; found 4 files such as '0 0.dat')"),
        (no_images, ["data.no_labels=true"], "; found 8 files such as '0 0.dat')"),
        (lambda f: shutil.rmtree(f / "images" / "dog") or (f / "images" / "dog").mkdir(), [], "; found nothing)"),
        (text, ["optimizer.batch_size=8"], "images/dog/2 2.png: not a readable image (of no format that Pillow knows)"),
        (lambda f: save(f / "images" / "x.png"), [], "'images/x.png' lies beside the class folders and has no label"),
        (
            lambda f: None,
            ["devices=9", "optimizer.batch_size=2"],
            "devices: 9 devices are more than the 8 training",
        ),
        (
            lambda f: None,
            ["devices=3", "optimizer.batch_size=3"],
            "batch_size: 3 images on each of 3 devices",
        ),
        (cut_short, ["data.train_path=x.h5"], "data.train_path: 'x.h5' is cut short: it has 4000 of "),
        (
            lambda f: write(f / "l.txt", "images/cat/0 0.png 0", "images/cat/1 1.png"),
            ["data.train_path=l.txt"],
            "line 2",
        ),
        (
            lambda f: (f / "x.zip").write_text(""),
            ["data.train_path=x.zip"],
            "not a folder, list (.txt, .csv) or HDF5 file",
        ),
    ],
    ids=["others", "found", "flat", "empty", "text", "beside", "devices", "batch", "h5", "labels", "zip"],
)
def test_bad_data_is_one_sentence_and_leaves_nothing(run, folder, damage, changes, message):
    damage(folder)
    before = everything(folder)
    status, out, err = run("pretrain", CUSTOM, "data.train_path=images", *SMALL, *changes)
    errors = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and len(out.splitlines()) <= 1 and len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err and everything(folder) == before


def test_crops_larger_than_the_images(run, tmp_path):
    status, out, err = run("pretrain", MINI, *SMALL, "augmentations.0.crop_size=500")
    assert status == 2 and len(out.splitlines()) <= 1 and everything(tmp_path) == []
    sentence = "augmentations.0.crop_size: 500 px, but the images of 'fashion_mnist_mini' have 28; use at most 28"
    assert err.splitlines()[-1] == f"solo-ext: error: {sentence}"
    enlarged = DataConfig("fashion_mnist_mini", num_workers=0, augmentations={"crop_size": 56})  # on purpose
    data = ClassificationData(enlarged, 4, 0)
    data.check()
    assert next(iter(data.train_dataloader()))[1][0].shape == (4, 3, 56, 56)
