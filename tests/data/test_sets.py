"""What a data set is: which files and folders are taken, passed over or refused."""

import logging
import os

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_runs import config

from solo_ext.cli.main import main
from solo_ext.data.augmentations import AugmentationConfig
from solo_ext.data.datasets import DataConfig
from solo_ext.data.images import read_folder
from solo_ext.data.modules import PretrainData
from solo_ext.errors import ConfigError, DataError
from solo_ext.training.pretrain import pretrain


def images(folder, classes=("ant", "bee"), count=3):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.full((16, 16, 3), 40 * i + number, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_what_is_passed_over_is_counted_and_said(tmp_path, caplog):
    expected = read_folder(images(tmp_path), "data.train_path").fingerprint()
    assert not caplog.records
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / "ant" / f"{i}.gif")
    (tmp_path / "bee" / "Thumbs.db").touch()
    for folder in ("ant/@eaDir/0.png", "bee/.AppleDouble", "__MACOSX/ant", "#recycle", ".thumbnails"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / folder / "0.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "ant" / "._0.png")
    with caplog.at_level(logging.WARNING, "solo_ext"):
        found = read_folder(tmp_path, "data.train_path")
    assert found.fingerprint() == expected and found.classes == ("ant", "bee")
    [record] = caplog.records
    said, _, parts = record.getMessage().partition(", since no image or hidden: ")
    assert said == f"data.train_path: passed over in '{tmp_path}'"
    assert parts.startswith("3 .gif, 1 ") and parts.endswith(" and 1 more kinds") and "1 @eaDir/" in parts


@pytest.mark.parametrize(
    "link, target", [("ant/up", ".."), ("here", "."), ("twin", "ant"), ("ant/deep/down", "../../bee")]
)
def test_a_folder_that_would_be_read_twice(tmp_path, link, target):
    images(tmp_path / "set")
    (tmp_path / "set" / "ant" / "deep").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "set" / "ant" / "deep" / "0.png")
    (tmp_path / "set" / link).symlink_to(target, target_is_directory=True)
    with pytest.raises(DataError, match=r"^k: '.*' is the same folder as '.*': remove one of the links$"):
        read_folder(tmp_path / "set", "k")


def test_links_to_other_folders_are_followed(tmp_path):
    whole = images(tmp_path / "whole")
    (tmp_path / "part").mkdir()
    for name in ("ant", "bee"):
        (tmp_path / "part" / name).symlink_to(whole / name, target_is_directory=True)
    assert read_folder(tmp_path / "part", "k").fingerprint() == read_folder(whole, "k").fingerprint()


@pytest.mark.parametrize("names", [("train", "val"), ("train", "test", "validation"), ("Train",)])
def test_the_folder_above_the_splits(tmp_path, names):
    for name in names:
        images(tmp_path / name)
    for labels in (True, False):
        with pytest.raises(DataError, match=r"^k: '.*' holds .*, splits and not classes; name one of them$"):
            read_folder(tmp_path, "k", labels)
    images(tmp_path, ("bus",))
    assert "bus" in read_folder(tmp_path, "k").classes  # trains and buses


@pytest.mark.parametrize("missing", [1, 0])
def test_another_class_list_is_said(tmp_path, caplog, missing):
    from solo_ext.data.imagenet100 import CLASSES

    images(tmp_path, CLASSES[missing:] if missing else (*CLASSES[1:], "n99999999"), 1)
    augmentations = [AugmentationConfig(crop_size=16)]
    _ = PretrainData(DataConfig("imagenet100", train_path=str(tmp_path)), augmentations, 4, 0).train_set
    said = "has 99 of the 100 classes" if missing else "'n99999999' is no class of imagenet100's"
    assert said in caplog.text


@pytest.mark.parametrize("path", ["~/set", "set (1)", "a,b", "x[1]", "müller", "it's", "50%", "a=b", ".", "{x}", "a'b"])
def test_any_path_that_a_shell_takes(tmp_path, monkeypatch, capsys, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / (path.removeprefix("~/") if path != "." else "here")
    images(place)
    monkeypatch.chdir(place if path == "." else tmp_path)
    recipe = os.path.join(os.path.dirname(__file__), *[os.pardir] * 2, "scripts/pretrain/custom/byol.yaml")
    if path == "{x}":  # Hydra's own grammar; the form that works is shown
        assert main(["pretrain", recipe, f"data.train_path={path}", "--cfg", "job"]) == 2
        path = f"'{path}'"
    assert main(["pretrain", recipe, f"data.train_path={path}", "data.val_path=null", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out.partition("train_path: ")[2].splitlines()[0]
    found = yaml.safe_load(shown)
    assert read_folder(found, "k").fingerprint() == read_folder(place, "k").fingerprint()
    assert "~" not in found


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(ConfigError, match=r"^data\.train_path must be a path or null, not ''$"):
        DataConfig("custom", train_path="")


def test_mean_and_std_are_of_pixels_from_0_to_1(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^augmentations\.mean is of pixels from 0 to 1: \[0\.485, 0\.456, 0\.406\] in"
    ):
        AugmentationConfig(mean=[123.675, 116.28, 103.53])
    with pytest.raises(
        ConfigError, match=r"^augmentations\.std is of pixels from 0 to 1: \[0\.229, 0\.224, 0\.225\] in"
    ):
        AugmentationConfig(std=[58.395, 57.12, 57.375])
    with pytest.raises(ConfigError, match=r"^augmentations\.mean is of pixels from 0 to 1, not \[-2\.1, 0\.5, 0\.5\]"):
        AugmentationConfig(mean=[-2.1, 0.5, 0.5])


def test_views_are_normalised_alike(tmp_path):
    data = DataConfig("custom", train_path=str(images(tmp_path)))
    usual = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    views = [AugmentationConfig(crop_size=16, **usual), AugmentationConfig(crop_size=16)]
    PretrainData(data, views, 4, 0)
    for name in usual:
        other = AugmentationConfig(crop_size=16, **{name: [0.3, 0.2, 0.1]})
        for pair in ([views[1], other], [other, views[1]]):
            with pytest.raises(
                ConfigError, match=rf"^augmentations\.1\.{name} is .*; views of one image are normalised"
            ):
                PretrainData(data, pair, 4, 0)


def test_a_labelled_set_beside_unlabelled_training_images_is_said_to_be_unused(tmp_path, caplog):
    images(tmp_path / "val")
    (images(tmp_path / "train", ("flat",)) / "flat").rename(tmp_path / "flat")
    data = DataConfig("custom", train_path=str(tmp_path / "flat"), val_path=str(tmp_path / "val"))
    PretrainData(data, [AugmentationConfig(crop_size=16)], 2, 0).check()
    assert "data.val_path and knn_eval: unused, since the training images have no labels" in caplog.text
    caplog.clear()
    folders = {"data__train_path": data.train_path, "data__val_path": data.val_path, "data__fraction": -1}
    short = {"data__dataset": "custom", "max_epochs": 1, "limit_train_batches": 1, "optimizer__batch_size": 2}
    pretrain(config(tmp_path / "runs", **short, **folders))
    assert caplog.text.count("data.val_path and knn_eval: unused") == 1, "a run says it once"


def test_a_named_pipe_among_the_images_does_not_wait_for_a_writer(tmp_path):
    images(tmp_path)
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    found = read_folder(tmp_path, "k").images
    with pytest.raises(DataError, match=r"pipe\.png: not a readable image"):
        _ = found[3]
