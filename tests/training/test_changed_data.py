"""Data that changes under a run is noticed when the run goes on, whatever the change."""

import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_runs import config, interrupted

from solo_ext.data.datasets import DataConfig, load_dataset
from solo_ext.data.images import read_folder
from solo_ext.errors import DataError
from solo_ext.runs.run import Run
from solo_ext.training.pretrain import pretrain

CLASSES = ("ant", "bee")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 4)):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i:02d}.bmp")
    return tmp_path


def changed(folder, how):
    first = folder / "train" / "ant" / "00.bmp"
    if how == "added":
        shutil.copy(first, first.with_name("99.bmp"))
    elif how == "removed":
        first.unlink()
    elif how == "replaced by one of another size":
        Image.new("RGB", (17, 16)).save(first)
    elif how == "replaced by one of the same size":
        Image.new("RGB", (16, 16)).save(first)
    elif how == "renamed":
        first.rename(first.with_name("zz.bmp"))
    elif how == "moved to another class":
        first.rename(folder / "train" / "bee" / "zz.bmp")
    elif how == "class renamed":
        for split in ("train", "val"):
            (folder / split / "ant").rename(folder / split / "wasp")
    elif how == "validation":
        (folder / "val" / "ant" / "00.bmp").unlink()
    elif how == "touched":
        first.touch()
    elif how == "copied":
        shutil.copytree(folder / "train", folder / "copy")
        shutil.rmtree(folder / "train")
        (folder / "copy").rename(folder / "train")


CHANGES = {
    "added": "images 48 -> 49",
    "removed": "images 48 -> 47",
    "replaced by one of another size": "file sizes ",
    "replaced by one of the same size": "file contents ",
    "renamed": "names and labels ",
    "moved to another class": "names and labels ",
    "class renamed": "names and labels ",
    "validation": "images 8 -> 7",
}


@pytest.mark.parametrize("how", [*CHANGES, "touched", "copied"])
def test_a_change_is_noticed_when_a_run_goes_on(folder, monkeypatch, how):
    options = {"data__dataset": "custom", "data__train_path": str(folder / "train"), "data__fraction": -1.0}
    options |= {"data__val_path": str(folder / "val"), "auto_resume__enabled": True}
    run, _ = interrupted(config(folder, **options), monkeypatch)
    assert {*Run(run).args["data"]["content"]} == {"train", "val"}
    before = {path: path.read_bytes() for path in run.iterdir()}
    changed(folder, how)
    if how in CHANGES:
        with pytest.raises(DataError) as error:
            pretrain(config(folder, **options))
        split = "val" if how == "validation" else "train"
        assert str(error.value).startswith(
            f"data: the {split} images are not those that {run} began with (first difference: {CHANGES[how]}"
        )
        assert {path: path.read_bytes() for path in run.iterdir()} == before
        options["data__accept_changes"] = True
    assert pretrain(config(folder, **options)).dir == run
    if how != "validation":
        assert Run(run).args["data"]["content"]["train"] == {
            **read_folder(folder / "train", "k").record(),
            **read_folder(folder / "train", "k").content(),
        }


def test_another_format_has_the_same_content(folder):
    pytest.importorskip("h5py")
    from solo_ext.data.h5 import read_h5, write_h5

    write_h5(folder / "train", folder / "train.h5")
    one, other = read_folder(folder / "train", "k"), read_h5(folder / "train.h5", "k")
    assert one.record() | one.content() == other.record() | other.content()
    assert load_dataset(DataConfig("fashion_mnist_mini"), "test").content() == {}


def test_many_files_are_read_in_part(folder, monkeypatch):
    monkeypatch.setattr("solo_ext.data.images.FEW", 1)
    monkeypatch.setattr("solo_ext.data.images.SOME", 2)  # the first and the last
    images = read_folder(folder / "train", "k")
    before, content = images.content(), []
    for name in ("ant/00", "ant/07", "bee/23"):
        path = folder / "train" / f"{name}.bmp"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        content.append(images.content() == before)
        path.write_bytes(whole)
    assert content == [False, True, False]
