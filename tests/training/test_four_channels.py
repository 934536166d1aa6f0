"""A run on images of four channels from its beginning to all that is done with its encoder."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import config

from solo_ext.analysis.features import write_features
from solo_ext.analysis.pictures import draw_pictures
from solo_ext.cli.main import main
from solo_ext.errors import CheckpointError, ConfigError, DataError
from solo_ext.planning.plan import plan
from solo_ext.runs.checkpoints import open_checkpoint
from solo_ext.training.config import resolve, run_values
from solo_ext.training.evaluate import knn, linear, quality
from solo_ext.training.pretrain import pretrain
from solo_ext.zoo.export import export
from solo_ext.zoo.model import load_backbone

COLOURS = {"color_jitter": {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}}
VIEW = {"crop_size": 12, "num_crops": 2, "horizontal_flip": {"prob": 0.5}, "grayscale": {"prob": 0.2}, **COLOURS}


def pixels(i: int) -> np.ndarray:
    """Noise; the class is in the fourth channel alone."""
    array = np.random.default_rng(i).integers(0, 256, (20, 24, 4), np.uint8)
    array[..., 3] //= 4
    array[..., 3] += 190 * (i % 2)
    return array


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("channels")
    for split, count in (("train", 48), ("val", 16), ("rgb", 8)):
        for i in range(count):
            (root / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(i)[..., : 3 if split == "rgb" else 4]).save(root / split / "ab"[i % 2] / f"{i}.png")
    return root


def config_of(place, kind="pretrain", **changes):
    own = {"augmentations": [VIEW]} if kind == "pretrain" else {}
    paths = {"data__train_path": str(place / "train"), "data__val_path": str(place / "val"), "data__fraction": -1}
    return config(place, kind, data__dataset="custom", **{**paths, "data__channels": 4, **own, **changes})


@pytest.fixture(scope="module")
def run(place):
    return pretrain(config_of(place))


def test_the_run_says_what_it_was_trained_with(run):
    args = json.loads((run.dir / "args.json").read_text())
    images = np.stack([pixels(i) for i in range(48)]).reshape(-1, 4) / 255
    assert args["data"]["channels"] == 4 and args["augmentations"][0]["mean"] is None
    assert args["data"]["info"]["mean"] == pytest.approx(images.mean(0), abs=1e-3)
    assert args["data"]["info"]["std"] == pytest.approx(images.std(0), abs=1e-3)
    assert load_backbone(run.dir).conv1.weight.shape[1] == 4


def test_it_is_evaluated_as_it_was_trained(run, place, caplog):
    cfg = resolve(run_values(run.dir, "knn", ["knn_eval.k=[3]", "accelerator=cpu"]), "knn")
    assert cfg.data.channels == 4
    rows = knn(cfg)
    assert rows[0]["acc1"] == 100  # the fourth channel is seen
    values = run_values(run.dir, "linear", ["cache_features=true", "max_epochs=30", "accelerator=cpu"])
    assert linear(resolve(values, "linear")).metrics["val_acc1"] == 100
    values = run_values(
        run.dir, "linear", ["max_epochs=1", "accelerator=cpu", "optimizer.batch_size=16", f"checkpoint.dir={place}"]
    )
    trained = linear(resolve(values, "linear"))
    args = json.loads((run.dir / "args.json").read_text())
    own = json.loads((trained.dir / "args.json").read_text())
    assert own["data"]["augmentations"]["mean"] == args["data"]["info"]["mean"]
    found = quality(resolve(run_values(run.dir, "quality", ["views=2", "accelerator=cpu"]), "quality"))
    assert all(np.isfinite(value) for value in found.values())
    assert "the encoder was trained with" not in caplog.text


def test_features_of_images_at_a_path_and_of_ones_own(run, place, tmp_path):
    backbone = load_backbone(run.dir)
    with torch.no_grad():
        views = [
            backbone.transform(image)
            for image in (Image.fromarray(pixels(0)), torch.from_numpy(pixels(0)).permute(2, 0, 1))
        ]
        assert views[0].shape == (4, 12, 12) and torch.equal(*views)
        own = backbone(views[0][None])[0].numpy()
    write_features(open_checkpoint(run.dir), str(place / "val"), tmp_path / "x.npz", workers=0)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as written:
        row = [name.endswith("/0.png") for name in written["name"]].index(True)
        np.testing.assert_allclose(written["features"][row], own, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=r"\.png: not a readable image \(channels: 3, not data\.channels=4\)"):
        write_features(open_checkpoint(run.dir), str(place / "rgb"), tmp_path / "y.npz", workers=0)


def test_pictures_show_three_of_the_channels(run, place, tmp_path):
    pytest.importorskip("matplotlib")
    sources = [("x", open_checkpoint(run.dir))]
    for kind in ("features", "neighbours"):
        made = draw_pictures(
            sources, str(place / "val"), kind, tmp_path / f"{kind}.png", count=2, bank=str(place / "train")
        )
        assert made.stat().st_size > 1000


def test_exports_carry_it(run, tmp_path):
    export(run.dir, "safetensors", tmp_path / "out", dtype="float32")
    ours, theirs = load_backbone(run.dir), load_backbone(tmp_path / "out")
    images = torch.randn(2, 4, 12, 12)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
    assert torch.equal(ours.transform.mean, theirs.transform.mean)


def test_other_images_are_refused_before_anything_is_written(run, place, tmp_path):
    message = r"holds a resnet10_w16 \(features 128\) of 4 channels, but the images have 3 \(data\.channels\)$"
    rgb = ["data.channels=3", f"data.train_path={place / 'rgb'}", f"data.val_path={place / 'rgb'}", "accelerator=cpu"]
    for kind, command in (("knn", knn), ("linear", linear)):
        with pytest.raises(
            ConfigError, match=r"^data\.augmentations\.mean: 4 numbers, .* but the images have 3 channels"
        ):
            command(resolve(run_values(run.dir, kind, [*rgb, *["optimizer.batch_size=4"] * (kind == "linear")]), kind))
    with pytest.raises(CheckpointError, match=message):
        pretrain(config(tmp_path, pretrained_feature_extractor=str(run.dir)))
    assert not list(tmp_path.glob("byol/*"))


def test_weights_of_three_channels_do_not_begin_a_run_of_four(place, whole, tmp_path):
    changes = {"checkpoint__dir": str(tmp_path), "pretrained_feature_extractor": str(whole.dir)}
    with pytest.raises(CheckpointError, match=r"of 3 channels, but the images have 4 \(data\.channels\)$"):
        pretrain(config_of(place, **changes))
    state = load_backbone(whole.dir).state_dict()
    torch.save(state, tmp_path / "x.pth")
    changes["pretrained_feature_extractor"] = str(tmp_path / "x.pth")
    shapes = r"1 of another shape \(first conv1\.weight: \[16, 3, 3, 3\] instead of \[16, 4, 3, 3\]\)$"
    with pytest.raises(CheckpointError, match=rf"of 4 channels \(data\.channels\): {shapes}"):
        pretrain(config_of(place, backbone__stem="small", **changes))
    assert not list(tmp_path.glob("byol/*"))


def test_a_run_goes_on_with_its_channels_only(run, place):
    again = config_of(place, resume_from_checkpoint=str(run.checkpoint), data__channels=3, max_epochs=4)
    with pytest.raises(CheckpointError, match=r"was trained with another data\.channels: 4 -> 3$"):
        pretrain(again)


def test_a_plan_is_of_the_images_channels(place):
    parts = [plan(config_of(place, data__channels=n), measure=n == 5)["anatomy"]["student_parameters"] for n in (3, 5)]
    assert parts[1] - parts[0] == 2 * 16 * 7 * 7


def test_wrong_numbers_of_channels_are_one_sentence(place, tmp_path):
    for changes, message in (
        ({"data__channels": 5}, r"0\.png: not a readable image \(channels: 4, not data\.channels=5\)$"),
        (
            {"data__channels": 4, "data__train_path": str(place / "rgb")},
            r"rgb/a/0\.png: .*channels: 3, not data\.channels=4",
        ),
    ):
        with pytest.raises(DataError, match=message):
            pretrain(config_of(place, checkpoint__dir=str(tmp_path), **changes))
    with pytest.raises(ConfigError, match=r"^data\.channels must be a whole number of at least 1, not 0$"):
        config_of(place, data__channels=0)
    assert not list(tmp_path.iterdir())


def test_the_recipe_for_ones_own_images_takes_four_channels(place, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["backbone.name=resnet10_w16", "augmentations.0.crop_size=16", "augmentations.1.crop_size=16"]
    small += ["max_epochs=1", "accelerator=cpu", "precision=32", "optimizer.batch_size=16", "data.num_workers=0"]
    paths = [f"data.train_path={place / 'train'}", f"data.val_path={place / 'val'}"]
    with caplog.at_level(logging.WARNING, "solo_ext"):
        main(["pretrain", "custom/byol", "data.channels=4", *paths, *small, "method_kwargs.pred_hidden_dim=16"])
    said = [record.getMessage() for record in caplog.records if "grayscale" in record.getMessage()]
    assert len(said) == 1 and "left out for those of 4 channels" in said[0]
    [folder] = (tmp_path / "trained_models/byol").iterdir()
    assert json.loads((folder / "result.json").read_text())["metrics"]["train_loss"] > 0
