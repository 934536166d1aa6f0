"""`import solo_ext` in a script: a pre-training in one call, and what evaluates it, as strict as the commands."""

import math
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import AUGMENTATION, rows
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import solo_ext
import solo_ext.training.pretrain
from solo_ext.data.datasets import DATASETS, DataConfig, load_dataset
from solo_ext.data.given import read_given
from solo_ext.errors import CheckpointError, ConfigError, DataError
from solo_ext.networks.backbones import BACKBONES, give_backbone
from solo_ext.runs.checkpoints import find_checkpoint, load_checkpoint

RECIPE = "fashion_mnist_mini/byol"
SMALL = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "precision": "32",
    "optimizer": {"batch_size": 16},
    "method_kwargs": {"proj_hidden_dim": 8, "proj_output_dim": 4, "pred_hidden_dim": 8},
    "augmentations": [AUGMENTATION],
    "enable_progress_bar": False,
}


class Squares(Dataset):
    """Photographs of one class are dark, of the other bright; as one of `KINDS`."""

    def __init__(self, kind="pair", count=48):
        self.kind, self.count = kind, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        pixels = np.random.default_rng(i).integers(0, 100, (20, 24, 3), np.uint8) + np.uint8(100 * (i % 2))
        image = {
            "pair": Image.fromarray(pixels),
            "mapping": Image.fromarray(pixels),
            "uint8": torch.from_numpy(pixels).permute(2, 0, 1),
            "float": torch.from_numpy(pixels).permute(2, 0, 1) / 255,
            "array": pixels,
            "bare": Image.fromarray(pixels),
        }[self.kind]
        if self.kind == "mapping":
            return {"image": image, "label": i % 2}
        return image if self.kind == "bare" else (image, i % 2)


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [{*known} for known in (DATASETS, BACKBONES)]
    yield tmp_path
    for known, names in zip((DATASETS, BACKBONES), before, strict=True):
        for name in {*known} - names:
            del known[name]


def test_what_there_is():
    assert dir(solo_ext) == sorted([*solo_ext.__all__, "__version__"])
    assert all(getattr(solo_ext, name) is not None for name in solo_ext.__all__)


def test_a_recipe_is_trained_evaluated_and_used(places):
    run = solo_ext.pretrain(RECIPE, data={"fraction": 0.02}, seed=3, **SMALL, **{"optimizer.lr": 0.1})
    assert run.dir.parent == places / "trained_models/byol" or run.dir.parent.name == "byol"
    assert math.isfinite(run.metrics["train_loss"]) and rows(run.dir)
    again = solo_ext.Trained(run.dir)
    assert again.metrics == run.metrics
    assert 0 <= again.linear(max_epochs=1, accelerator="cpu", **{"data.fraction": 0.1}).metrics["val_acc1"] <= 100
    [row] = again.knn(k=[3], accelerator="cpu", **{"knn_eval.distance_func": ["cosine"]})
    assert row["k"] == 3 and 10 < row["acc1"] <= 100
    backbone = run.backbone(teacher=True)
    assert backbone(torch.zeros(2, 3, 28, 28)).shape == (2, backbone.num_features)
    assert run.features().shape == (1000, backbone.num_features)


@pytest.mark.parametrize("kind", ["pair", "mapping", "uint8", "float", "array"])
def test_a_dataset_of_the_users_own(places, kind):
    run = solo_ext.pretrain(RECIPE, data=Squares(kind), val_data=Squares(kind, 20), **SMALL)
    cfg = run._run.args
    name = cfg["data"]["dataset"]
    assert re.fullmatch(r"Squares-[0-9a-f]{8}", name) and name != cfg["data"]["val_path"]
    assert cfg["data"]["num_classes"] == 2 and "val_acc1" in run.metrics
    [row, _] = run.knn(data=Squares(kind), val_data=Squares(kind, 20), accelerator="cpu", **{"knn_eval.T": [0.1]})[:2]
    assert row["acc1"] == 100
    image = load_dataset(DataConfig(name), "train").images[5]
    assert image.dtype == torch.uint8 and torch.equal(image, torch.from_numpy(Squares("array")[5][0]).permute(2, 0, 1))


def test_a_dataset_of_the_hub(places, caplog):
    """Its labels are a column, for which no image is read; under another name they are not passed over in silence."""
    import datasets as hub

    pictures, labels = [Squares()[i][0] for i in range(12)], [i % 2 for i in range(12)]
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["dark", "bright"])})
    rows = hub.Dataset.from_dict({"image": pictures, "label": labels}, features).select(range(8))
    images = read_given(rows, "data")
    assert images.classes == ("dark", "bright") and images.targets.tolist() == labels[:8]
    assert torch.equal(images.images[3], torch.from_numpy(np.array(pictures[3])).permute(2, 0, 1))
    assert read_given(rows.rename_column("label", "fine_label"), "data").classes == ()
    assert "data: no labels, since a sample has image, fine_label, but none of label, labels, target" in caplog.text


def test_images_without_labels(places):
    run = solo_ext.pretrain(RECIPE, data=Squares("bare"), **SMALL)
    assert "val_acc1" not in run.metrics and run._run.args["data"]["num_classes"] == 0


def test_a_dataloader_with_indexes(places, caplog):
    """The learning rate is that of its batch size, and the probe is validated on the other loader."""
    images = [torch.from_numpy(Squares("array")[i][0]).permute(2, 0, 1) / 255 for i in range(48)]
    loader = DataLoader([(i, [image, image.flip(2)], i % 2) for i, image in enumerate(images)], batch_size=12)
    val = DataLoader([(image, i % 2) for i, image in enumerate(images)], batch_size=8)
    keys = {**SMALL, "optimizer": {"lr": 0.1}, "max_epochs": 4, "data.num_classes": 2}
    run = solo_ext.pretrain("custom/byol", data=loader, val_data=val, **keys)
    cfg = run._run.args
    assert (cfg["optimizer"]["batch_size"], cfg["data"]["num_classes"]) == (12, 2) and "effect" not in caplog.text
    assert [row["step"] for row in rows(run.dir) if row["val_acc1"]] == ["3", "7", "11", "15"]
    assert run.metrics["val_acc1"] > 90


def test_a_dataloader_of_lightly(places):
    data = pytest.importorskip("lightly.data")
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    views = BYOLTransform(BYOLView1Transform(input_size=32), BYOLView2Transform(input_size=32))
    for i in range(32):
        Squares()[i][0].save(places / f"{i}.png")
    loader = DataLoader(data.LightlyDataset(str(places), transform=views), batch_size=16, drop_last=True)
    run = solo_ext.pretrain("custom/byol", data=loader, **SMALL)
    assert rows(run.dir)[-1]["step"] == "1" and math.isfinite(run.metrics["train_loss"])


@pytest.mark.parametrize("sample", [(torch.zeros(3, 8, 8), 1), torch.zeros(3, 8, 8)])
def test_a_dataloader_without_views(places, sample):
    with pytest.raises(DataError, match=r"^data: the DataLoader's batches are \(\[12, 3, 8, 8\].*\), not \(\[view, "):
        solo_ext.pretrain("custom/byol", data=DataLoader([sample] * 24, batch_size=12), **SMALL)


class Rows(list):
    """A Dataset of the given samples."""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([1]), r"^data: a \w*iterator is no Dataset with len\(\) and \[i\]$"),
        (Rows(), r"^data: the Rows is empty$"),
        (
            Rows([torch.full((3, 9, 9), 2.5)]),
            r"^Rows\[0\]: not a readable image \(values from 2.5 to 2.5; give images before",
        ),
        (Rows([torch.zeros(2, 5, 9, 9, dtype=torch.uint8)]), r"its shape is \[2, 5, 9, 9\], no image\)$"),
        (Rows([{"pixels": 1}]), r"a sample has the keys pixels, but none of image, img"),
        (Rows([(np.zeros((9, 9), np.uint8), "cat")]), r"^data: labels are class numbers, not 'cat'$"),
        (
            Rows([(np.zeros((9, 9), np.uint8), x) for x in (0, "dog", 1)]),
            r"^data: labels are class numbers, not 'dog'$",
        ),
        (Rows([(np.zeros((9, 9), np.uint8), -3)]), r"^data: labels are class numbers from 0, or -1 for none, not -3$"),
        (Rows([(np.zeros((9, 9), np.int64), 0)]), r"its values are torch.int64, but an image is uint8"),
    ],
)
def test_what_is_no_dataset_of_images(places, data, message):
    with pytest.raises(DataError, match=message):
        solo_ext.pretrain(RECIPE, data=data, **SMALL)
    assert not list(places.iterdir())


@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_first_image_without_a_label_hides_no_other(places, kind):
    pairs = [(np.zeros((9, 9), np.uint8), label) for label in (None, 1, 0)]
    samples = pairs if kind is tuple else [dict(zip(("image", "label"), pair, strict=True)) for pair in pairs]
    assert solo_ext.data.given.read_given(Rows(samples), "data").targets.tolist() == [-1, 1, 0]


def test_two_datasets_of_a_class_stand_beside_each_other(places):
    whole = Squares()
    parts = [Subset(whole, range(0, 32)), Subset(whole, range(16, 48))]
    runs = [solo_ext.pretrain(RECIPE, data=part, val_data=part, **SMALL) for part in parts]
    names = [run._run.args["data"]["dataset"] for run in runs]
    assert len({*names}) == 2 and all(name.startswith("Subset-") for name in names)
    for run, part in zip(runs, parts, strict=True):
        run.knn(k=[1], accelerator="cpu")
        protocol = run._run.evaluations["knn.json"][0]["protocol"]
        seen = load_dataset(DataConfig(protocol["data.dataset"], val_path=run._run.args["data"]["val_path"]), "test")
        assert torch.equal(seen.images[0], torch.from_numpy(np.array(part[0][0])).permute(2, 0, 1))


def test_a_run_of_a_dataset_goes_on_with_the_same_one(places):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        solo_ext.pretrain(RECIPE, data=Squares(), callbacks=[Stop()], **{**SMALL, "max_epochs": 2})
    [stopped] = (places / "trained_models" / "byol").iterdir()
    run = solo_ext.pretrain(RECIPE, data=Squares(), **{**SMALL, "max_epochs": 2})
    assert run.dir.name == stopped.name and run._run.resumed
    other = solo_ext.pretrain(RECIPE, data=Squares(count=47), **{**SMALL, "max_epochs": 2})
    assert other.dir.name != stopped.name


def test_a_sample_is_read_once_for_its_label(places):
    class Counted(Squares):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)

    reads = []
    solo_ext.data.given.read_given(Counted(count=5), "data")
    assert reads == [0, 1, 2, 3, 4]


def test_a_run_without_checkpoints_comes_back(places):
    run = solo_ext.pretrain(RECIPE, data={"fraction": 0.01}, checkpoint={"enabled": False}, **SMALL)
    assert run.dir.is_dir() and "train_loss" in run.metrics


def test_gray_images_and_missing_labels(places):
    samples = Rows([(np.full((9, 9), 10 * i, np.uint8), i % 3 - 1 or None) for i in range(9)])
    images = load_dataset(DataConfig(solo_ext.data.given.give(samples, None, None)["data.dataset"]), "train")
    assert images.targets.tolist() == [-1, -1, 1] * 3
    assert torch.equal(images.images[4], torch.full((3, 9, 9), 40, dtype=torch.uint8))


def bands(count, channels=4):
    """Labelled images [channels, 20, 24] that differ in their last channel."""
    arrays = [np.random.default_rng(i).integers(0, 60, (channels, 20, 24), np.uint8) for i in range(count)]
    for i, array in enumerate(arrays):
        array[-1] += np.uint8(180 * (i % 2))
    return Rows([(array, i % 2) for i, array in enumerate(arrays)])


def test_a_dataset_of_four_channels_and_what_follows_from_it(places):
    run = solo_ext.pretrain(RECIPE, data=bands(48), val_data=bands(16), **SMALL)
    assert run._run.args["data"]["channels"] == 4 and len(run._run.args["data"]["info"]["std"]) == 4
    assert run.knn(k=[3], accelerator="cpu")[0]["acc1"] == 100
    assert run.linear(max_epochs=20, accelerator="cpu", cache_features=True).metrics["val_acc1"] == 100
    backbone, image = run.backbone(), torch.from_numpy(bands(1)[0][0])
    with torch.no_grad():
        np.testing.assert_allclose(
            backbone(backbone.transform(image)[None])[0], run.features()[0], rtol=1e-4, atol=1e-5
        )
    other = {"data": bands(8, 5), "val_data": bands(8, 5)}
    with pytest.raises(ConfigError, match=r"^data\.augmentations\.mean: 4 numbers, .* but the images have 5 channels"):
        run.knn(accelerator="cpu", **other)
    with pytest.raises(CheckpointError, match=r"of 4 channels, but the images have 5 \(data\.channels\)$"):
        run.knn(accelerator="cpu", **other, **{"data.augmentations": None})
    with pytest.raises(DataError, match=r"^Rows\[0\]: .*its shape is \[5, 20, 24\], no image of data\.channels=4"):
        run.knn(accelerator="cpu", **other, **{"data.channels": 4})


def test_one_channel_where_it_is_asked_for(places):
    gray = Rows([(np.full((9, 9), 10 * i, np.uint8), i % 2) for i in range(24)])
    run = solo_ext.pretrain(RECIPE, data=gray, **SMALL, **{"data.channels": 1})
    assert next(run.backbone().parameters()).shape[1] == 1 and run._run.args["data"]["info"]["mean"] == [0.451]
    rgb = solo_ext.pretrain(RECIPE, data=gray, **SMALL)
    assert next(rgb.backbone().parameters()).shape[1] == 3 and "channels" not in rgb._run.args["data"]


def test_a_backbone_of_the_users_own_takes_the_images_channels(places):
    own = {"data": bands(24), **SMALL}
    run = solo_ext.pretrain(RECIPE, backbone=Net(4), **own)
    assert run.backbone()(torch.zeros(1, 4, 28, 28)).shape == (1, 6)
    before = len(list(run.dir.parent.iterdir()))
    message = r"^backbone: a Net takes no images \[2, 4, 224, 224\]: .* to have 3 channels, but got 4 channels instead$"
    with pytest.raises(ConfigError, match=message):
        solo_ext.pretrain(RECIPE, backbone=Net(), **own)
    assert len(list(run.dir.parent.iterdir())) == before


class Net(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_backbones_of_one_class_have_names_by_their_structure():
    names = [give_backbone(net) for net in (Net(), Net(), nn.Sequential(Net()), nn.Sequential(Net(), nn.Linear(6, 5)))]
    try:
        assert names[0] == names[1] and names[0].startswith("Net-") and len({*names}) == 3
        assert BACKBONES[names[2]]().num_features == 6
        assert BACKBONES[names[0]]() is not BACKBONES[names[0]](), "each run has its own"
    finally:
        for name in {*names}:
            del BACKBONES[name]


@pytest.mark.parametrize("make", [Net, lambda: __import__("torchvision").models.resnet18()])
def test_a_backbone_of_the_users_own(places, make):
    torch.manual_seed(1)
    net = make()
    first = next(net.parameters())
    before = first.detach().clone()
    run = solo_ext.pretrain(
        RECIPE, backbone=net, data={"fraction": 0.01}, **{**SMALL, "optimizer": {"batch_size": 16, "lr": 1e-9}}
    )
    assert torch.equal(first, before), "a copy is trained"
    trained = load_checkpoint(find_checkpoint(run.dir))["state_dict"]
    name = "backbone.conv.weight" if isinstance(net, Net) else "backbone.conv1.weight"
    assert torch.allclose(trained[name], before, atol=1e-3), "which begins with its weights"
    assert run.backbone()(torch.zeros(1, 3, 28, 28)).shape == (1, 6 if isinstance(net, Net) else 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_epoch": 3}, "unknown key 'max_epoch'; did you mean 'max_epochs'?"),
        ({"optimizer": {"learning_rate": 1}}, "unknown key 'optimizer.learning_rate'"),
        ({"momentum": {"stages": ["blok4"]}}, "momentum.stages: the network has no stage 'blok4'"),
        ({"momentum": {"stages": "block4:0.9"}}, "teacher; put the option in quotes: 'momentum.stages="),
        ({"augmentations": [{**AUGMENTATION, "crop": 3}]}, "unknown key 'augmentations.0.crop'"),
        ({"backbone": nn.Conv2d(3, 4, 3)}, "backbone: a Conv2d gives [2, 4, 222, 222]"),
        ({"backbone": nn.Linear(3, 4)}, "backbone: a Linear takes no images [2, 3, 224, 224]"),
        ({"val_data": Squares()}, "val_data is a Dataset, so data has to be one, too"),
        ({"method": "byl"}, "method: there is no method 'byl'; did you mean 'byol'?"),
    ],
)
def test_what_is_mistyped_is_refused_before_anything_is_written(places, changes, message):
    with pytest.raises(ConfigError) as error:
        solo_ext.pretrain(RECIPE, **{**SMALL, **changes})
    assert message in str(error.value) and not list(places.iterdir())


@pytest.mark.parametrize("method", ["byol", "res_dino", "projector_ema_mocov2plus"])
def test_a_method_alone_in_ones_own_trainer(method, tmp_path):
    views = torch.rand(8, 3, 32, 32)
    batches = [(torch.arange(8), [views, views.flip(3)], torch.full((8,), -1))] * 3
    module = solo_ext.METHODS[method]({"method_kwargs": {"proj_hidden_dim": 8}, "backbone": {"name": "resnet10_w16"}})
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert module.classifier is None and math.isfinite(trainer.callback_metrics["train_loss"])
    assert type(solo_ext.METHODS[method]({}).backbone).__name__ == "ResNet"
    bands = solo_ext.METHODS[method]({"data": {"dataset": "custom", "channels": 4, "no_labels": True}})
    assert bands.backbone.conv1.weight.shape == (64, 4, 7, 7)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"optimiser": {}}, "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ({"optimizer": {"learning_rate": 1}}, "unknown key 'optimizer.learning_rate'"),
        ({"method_kwargs": {"proj_dim": 1}}, "unknown key 'method_kwargs.proj_dim'"),
    ],
)
def test_a_method_is_strict_about_a_mapping(cfg, message):
    with pytest.raises(ConfigError) as error:
        solo_ext.METHODS["byol"](cfg)
    assert message in str(error.value)


def test_the_longer_way_takes_a_mapping_too(tmp_path):
    with pytest.raises(ConfigError, match=r"^backbone.name is missing$"):
        solo_ext.training.pretrain.pretrain({"method": "byol"})


def test_values_of_any_kind_reach_the_configuration(places):
    given = {
        "name": "it's, a [run]",
        "wandb": {"project": "a=b"},
        "gradient_clip_val": None,
        "momentum": {"stages": {"block4": 0.5}},
    }
    from solo_ext.api import _overrides, configured

    cfg = configured("pretrain", RECIPE, _overrides({**given, "checkpoint.dir": "~/x,y (1)"}, None))
    assert cfg.name == "it's, a [run]" and cfg.wandb.project == "a=b" and cfg.checkpoint.dir == "~/x,y (1)"
    assert cfg.momentum.stages == {"block4": 0.5} and cfg.gradient_clip_val is None
