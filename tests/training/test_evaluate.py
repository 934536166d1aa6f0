"""Linear and kNN evaluation of a run."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import config, names

from solo_ext.data import modules
from solo_ext.data.datasets import DataConfig, load_dataset
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.methods import backbone_of
from solo_ext.runs.checkpoints import load_checkpoint, save_checkpoint
from solo_ext.runs.encoder import bare_backbone, load_encoder
from solo_ext.schema import plain
from solo_ext.training import evaluate
from solo_ext.training.config import resolve, run_values
from solo_ext.training.evaluate import knn, linear
from solo_ext.training.pretrain import pretrain
from solo_ext.training.trainer_config import TrainerConfig
from solo_ext.zoo.export import export
from solo_ext.zoo.model import load_backbone


@pytest.mark.parametrize("cached", [False, True])
def test_linear_evaluation_of_a_run(whole, tmp_path, cached, caplog):
    options = {
        "pretrained_feature_extractor": str(whole.dir),
        "cache_features": cached,
        "scheduler__name": "none",
    }
    result = linear(config(tmp_path, "linear", max_epochs=2, **options))
    assert result.dir.parent == tmp_path / "linear" and "args.json" in names(result.dir)
    written = json.loads((whole.dir / "linear.json").read_text())
    assert written["acc1"] == result.metrics["val_acc1"] and written["protocol"]["augmented"] is not cached
    assert written["protocol"]["checkpoint"] == whole.checkpoint.name and written["epochs"] == 2
    assert written["protocol"]["recipe"] is None  # a configuration of its own
    assert "the encoder was trained with crop_size 12, not 28" in caplog.text  # where nothing else is said
    network = json.loads((result.dir / "args.json").read_text())
    assert (network["backbone"]["stem"], network["pretrain_method"]) == ("small", "byol")  # whatever is evaluated next
    backbone = load_encoder(whole.dir)[0].state_dict()
    if not cached:  # the encoder, its batch statistics included, has not moved
        after = load_checkpoint(result.checkpoint)["state_dict"]
        assert all(torch.equal(after[f"backbone.{k}"], x) for k, x in backbone.items())


def test_the_untrained_encoder_is_the_one_that_the_pretraining_started_from(tmp_path):
    cfg = config(tmp_path, optimizer__lr=0.0, scheduler__name="none", limit_train_batches=1, max_epochs=1)
    pretrained = pretrain(cfg)
    start = load_checkpoint(pretrained.checkpoint)["state_dict"]
    cfg = config(tmp_path, "linear", untrained=True, max_epochs=1)
    after = load_checkpoint(linear(cfg).checkpoint)["state_dict"]
    weights = [name for name in after if name.startswith("backbone.") and name.endswith("weight")]
    assert weights and all(torch.equal(after[name], start[name]) for name in weights)


def test_knn_evaluation_of_a_run(whole, capsys):
    raw = {
        "pretrained_feature_extractor": str(whole.dir),
        "data": {"dataset": "fashion_mnist_mini", "fraction": 0.01},
    }
    results = knn(resolve({**raw, "accelerator": "cpu", "knn_eval": {"k": [1, 20]}}, "knn"))
    assert json.loads((whole.dir / "knn.json").read_text())["results"] == results
    assert {(r["distance"], r["k"]) for r in results} >= {("cosine", 1), ("cosine", 20)}
    assert all(0 <= r["acc1"] <= r["acc5"] <= 100 for r in results) and "acc@1" in capsys.readouterr().out


def test_without_an_encoder_there_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(ConfigError, match="pretrained_feature_extractor is missing"):
        linear(config(tmp_path, "linear"))


class Caught(Exception):
    """The arguments of what would have trained or counted."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def caught(monkeypatch, name, command, cfg):
    def catch(*args, **kwargs):
        raise Caught(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, name, catch)
        with pytest.raises(Caught) as error:
            command(cfg)
    return error.value


def test_the_protocol_of_linear(whole, tmp_path, monkeypatch):
    """Random crops, another one each time, of shuffled images; the encoder in eval mode; the rest as configured."""
    options = {"pretrained_feature_extractor": str(whole.dir), "optimizer__weight_decay": 0.25}
    schedule = {"scheduler__name": "step", "scheduler__lr_decay_steps": [1, 2], "accumulate_grad_batches": 3}
    cfg = config(tmp_path, "linear", **options, **schedule, devices="2", label_smoothing=0.1)
    fitted, model, data, _ = caught(monkeypatch, "fit", linear, cfg).args
    assert (fitted.max_epochs, data.batch_size, fitted.optimizer.effective_lr) == (3, 16, 0.5 * 16 * 2 / 256)
    assert model.optimizer_cfg == fitted.optimizer and model.optimizer_cfg.weight_decay == 0.25
    assert model.scheduler_cfg.lr_decay_steps == [1, 2] and model.options.label_smoothing == 0.1
    assert not any(module.training for module in model.train().backbone.modules())
    views, orders = [], []
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        indexes = torch.cat([index for index, *_ in batches])
        views.append(torch.cat([view for _, (view,), _ in batches])[indexes.argsort()])
        orders.append(indexes.tolist())
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    assert all(not torch.equal(a, b) for a, b in zip(*views, strict=False))


def test_the_protocol_of_cached_linear(whole, tmp_path, monkeypatch):
    options = {"pretrained_feature_extractor": str(whole.dir), "cache_features": True, "seed": 7}
    options["data__augmentations"] = {"crop_size": 12}
    call = caught(monkeypatch, "fit_cached_linear", linear, config(tmp_path, "linear", **options))
    optimizer = call.kwargs["optimizer"]
    assert (optimizer.batch_size, optimizer.rates()[0]) == (16, 0.5 * 16 / 256)
    assert (call.kwargs["epochs"], call.kwargs["seed"], call.kwargs["scheduler"].name) == (3, 7, "warmup_cosine")
    assert_features_of_whole_images(call.args, whole)


def test_the_protocol_of_knn(whole, monkeypatch):
    options = ["data.fraction=0.01", "knn_eval.k=[3,5]", "knn_eval.distance_func=[cosine]", "knn_eval.T=[0.2]"]
    call = caught(monkeypatch, "knn_accuracy", knn, resolve(run_values(whole.dir, "knn", options), "knn"))
    assert call.kwargs == {"k": [3, 5], "distance": "cosine", "temperature": 0.2}
    assert_features_of_whole_images(call.args, whole)


def assert_features_of_whole_images(features, run):
    """Bank: of the training images; queries: of all test images; un-augmented, by the encoder in eval mode."""
    backbone = load_backbone(run.dir)
    for split, (found, labels) in (("train", features[:2]), ("test", features[2:])):
        images = load_dataset(DataConfig("fashion_mnist_mini", fraction=0.01), split)
        assert labels.tolist() == images.targets.tolist()
        chosen = range(0, len(images), 10)
        pixels = torch.stack([backbone.transform(Image.fromarray(np.asarray(images.images[i])[0])) for i in chosen])
        with torch.no_grad():
            torch.testing.assert_close(found[::10], backbone(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_the_images_are_read_for_the_device_that_evaluates_them(whole, tmp_path, monkeypatch, kind):
    """`cpu:0` works as `cpu` does, and yet is another device: it stands for a GPU."""
    devices, make_loader = [], modules.make_loader

    def noted(data, views, device, **batching):
        devices.append(device)
        return make_loader(data, views, device, **batching)

    monkeypatch.setattr(modules, "make_loader", noted)
    monkeypatch.setattr(TrainerConfig, "first_device", torch.device("cpu", 0))
    options = {"pretrained_feature_extractor": str(whole.dir)}
    if kind == "knn":
        data = {"dataset": "fashion_mnist_mini", "fraction": 0.01}
        knn(resolve({**options, "data": data, "accelerator": "cpu", "knn_eval": {"k": [1]}}, "knn"))
    else:
        linear(config(tmp_path, "linear", max_epochs=1, cache_features=True, scheduler__name="none", **options))
    assert devices and {*devices} == {torch.device("cpu", 0)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_reads_the_images_that_it_evaluates(whole):
    data = {"dataset": "fashion_mnist_mini", "fraction": 0.01}
    raw = {"pretrained_feature_extractor": str(whole.dir), "data": data, "knn_eval": {"k": [1]}}
    on_gpu, on_cpu = (knn(resolve({**raw, "accelerator": accelerator}, "knn")) for accelerator in ("gpu", "cpu"))
    assert [row["acc1"] for row in on_gpu] == pytest.approx([row["acc1"] for row in on_cpu], abs=1)


def test_what_is_named_twice_counts_once(whole, capsys):
    raw = {"pretrained_feature_extractor": str(whole.dir), "data": {"dataset": "fashion_mnist_mini", "fraction": 0.01}}
    twice = {"k": [20, 1, 20], "distance_func": ["cosine", "cosine"], "T": [0.07, 0.1, 0.07]}
    rows = knn(resolve({**raw, "accelerator": "cpu", "knn_eval": twice}, "knn"))
    assert [(row["k"], row["T"]) for row in rows] == [(20, 0.07), (1, 0.07), (20, 0.1), (1, 0.1)]
    assert all(row["acc1"] <= row["acc5"] <= 100 for row in rows)


def test_the_encoder_of_a_linear_run_keeps_its_view(whole, tmp_path):
    """Crop size, mean and std go with it to the next evaluation and to other code."""
    view = {"crop_size": 20, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    options = {"pretrained_feature_extractor": str(whole.dir), "pretrain_method": "byol", "data__augmentations": view}
    run = linear(config(tmp_path, "linear", max_epochs=1, scheduler__name="none", **options)).dir
    cfg = resolve(run_values(run, "knn"), "knn")
    assert plain(cfg.data.augmentations) == view and cfg.pretrain_method == "byol"
    transform = load_backbone(run).transform
    assert transform.size == 20 and transform.mean.tolist() == pytest.approx(view["mean"])
    assert transform.std.tolist() == pytest.approx(view["std"])


def further(checkpoint, epoch):
    """A later checkpoint beside `checkpoint`, of the same network with other weights."""
    content = load_checkpoint(checkpoint)
    content["state_dict"] = {key: x * 1.5 if x.ndim > 1 else x for key, x in content["state_dict"].items()}
    path = checkpoint.with_name(re.sub(r"ep=\d+", f"ep={epoch}", checkpoint.name))
    save_checkpoint({**content, "epoch": epoch}, path)
    return path


def test_an_interrupted_evaluation_does_not_continue_with_another_encoder(whole, tmp_path):
    """Its checkpoint has the encoder that it began with, which has been trained further in the meantime."""
    encoder = tmp_path / "encoder"
    shutil.copytree(whole.dir, encoder)
    options = {"pretrained_feature_extractor": str(encoder), "scheduler__name": "none", "max_epochs": 2}
    first = linear(config(tmp_path, "linear", checkpoint__keep_prev=True, **options)).dir
    (first / "result.json").unlink()
    [last] = first.glob("*ep=1.ckpt")
    last.unlink()
    later = further(next(encoder.glob("*ep=2.ckpt")), 3)
    with pytest.raises(CheckpointError, match=r"was trained with another encoder: [0-9a-f]{64} -> [0-9a-f]{64}"):
        linear(config(tmp_path, "linear", resume_from_checkpoint=str(first), **options))
    second = linear(config(tmp_path, "linear", **options))
    evaluated, trained = (load_checkpoint(file)["state_dict"] for file in (second.checkpoint, later))
    assert torch.equal(evaluated["backbone.conv1.weight"], trained["backbone.conv1.weight"])
    assert second.dir != first
    later.unlink()
    assert linear(config(tmp_path, "linear", **options)).dir == first  # which goes on where the encoder is back


def vit_run(folder, method="byol", **kwargs):
    """The folder of a pre-training of a small ViT whose weights are those of the initialisation."""
    vit = {"img_size": 28, "patch_size": 14, "depth": 1, **kwargs}
    cfg = config(folder, method=method, backbone__name="vit_tiny", backbone__kwargs=vit)
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(plain(cfg) | {"method": method}))
    state = {f"backbone.{key}": x for key, x in bare_backbone(plain(cfg)).state_dict().items()}
    save_checkpoint({"state_dict": state}, folder / "x-ep=0.ckpt")
    return folder


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_a_crop_that_the_encoder_cannot_take_is_refused(tmp_path, kind):
    overrides = ["data.augmentations.crop_size=24", "data.fraction=0.1", f"checkpoint.dir={tmp_path}"]
    cfg = resolve(run_values(vit_run(tmp_path / "vit"), kind, overrides), kind)
    with pytest.raises(ConfigError, match=r"backbone.name: vit_tiny cannot take crops of 24 px: Input height"):
        {"knn": knn, "linear": linear}[kind](cfg)
    assert names(tmp_path) == ["vit"] and names(tmp_path / "vit") == ["args.json", "checkpoints.json", "x-ep=0.ckpt"]


@pytest.mark.parametrize("run", ["small stem", "twelve heads"])
def test_the_untrained_encoder_of_a_run_is_its_network_whatever_the_images(whole, tmp_path, run):
    folder = whole.dir if run == "small stem" else vit_run(tmp_path / "vit", "mocov3")
    overrides = ["untrained=true", "data.dataset=custom", "data.train_path=a", "data.val_path=b"]
    cfg = resolve(run_values(folder, "knn", overrides), "knn")
    trained, untrained = (str(backbone) for backbone in (load_encoder(folder)[0], backbone_of(cfg).eval()))
    assert untrained == trained and cfg.backbone.kwargs.get("num_heads", 12) == 12


def test_a_mistyped_method_gives_no_untrained_encoder_other_heads(tmp_path):
    options = {"untrained": True, "backbone__name": "vit_tiny", "pretrain_method": "moco_v3"}
    with pytest.raises(CheckpointError, match=r"vit_tiny has other heads by .*not 'moco_v3'; did you mean 'mocov3'"):
        linear(config(tmp_path, "linear", **options))


def test_another_method_than_the_encoders_is_said(whole, tmp_path, caplog):
    options = {"pretrained_feature_extractor": str(whole.dir), "cache_features": True, "scheduler__name": "none"}
    linear(config(tmp_path, "linear", pretrain_method="dino", max_epochs=1, **options))
    assert "pretrain_method is dino, but the encoder's is byol" in caplog.text


def test_the_encoder_of_a_linear_run_is_the_teachers_where_it_was(whole, tmp_path):
    exported = export(whole.dir, "safetensors", tmp_path / "exported", teacher=True).folder
    options = {"pretrained_feature_extractor": str(exported), "scheduler__name": "none", "max_epochs": 1}
    run = linear(config(tmp_path, "linear", **options)).dir
    assert export(run, "safetensors", tmp_path / "again").record["teacher"] is True
