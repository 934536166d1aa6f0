"""Encoders out of checkpoints: the student's, the teacher's, an exported one, and what does not fit."""

import hashlib
import json

import pytest
import safetensors.torch
import torch
from conftest import build, tiny_config

from solo_ext.data.datasets import DATASETS, DatasetInfo
from solo_ext.errors import CheckpointError
from solo_ext.networks import BackboneConfig, build_backbone
from solo_ext.runs.checkpoints import find_checkpoint, save_checkpoint
from solo_ext.runs.encoder import bare_backbone, eval_transform, evaluation_view, load_encoder, network_of
from solo_ext.runs.run import RECORDS
from solo_ext.schema import plain
from solo_ext.training.config import resolve

CIFAR = {"backbone": {"name": "resnet18", "kwargs": {}}, "data": {"dataset": "cifar10"}, "method": "byol"}


def run_folder(tmp_path, name="resnet18", prefix="backbone.", kwargs=None, **args):
    backbone = build_backbone(BackboneConfig(name, kwargs or {}), small_images=True)
    state = {prefix + key: x for key, x in backbone.state_dict().items()} | {
        "classifier.weight": torch.zeros(10, backbone.num_features),
        "momentum_" + prefix + "conv1.weight": torch.zeros(1),
    }
    save_checkpoint({"state_dict": state}, tmp_path / "x-ep=1.ckpt")
    if args:
        (tmp_path / "args.json").write_text(json.dumps(args))
    return backbone


@pytest.mark.parametrize("prefix", ["backbone.", "encoder."])
def test_load_encoder_from_a_run_folder_also_of_solo_learns_older_names(tmp_path, prefix):
    original = run_folder(tmp_path, prefix=prefix, **CIFAR)
    backbone, args = load_encoder(tmp_path)
    assert args == CIFAR and not backbone.training
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(x), original.eval()(x))


def test_a_checkpoint_of_another_network_is_refused_with_what_it_holds(tmp_path):
    run_folder(tmp_path, "resnet50", **{**CIFAR, "backbone": {"name": "resnet50"}})
    with pytest.raises(CheckpointError, match=r"holds a resnet50 \(features 2048\), but backbone.name is resnet18"):
        load_encoder(tmp_path, CIFAR)
    (tmp_path / "args.json").unlink()
    with pytest.raises(CheckpointError, match=r"backbone.name has to say"):
        load_encoder(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"with 2048 features, not a resnet18 .features 512.: .*first layer1.0.conv"
    ):
        load_encoder(tmp_path, CIFAR)


def test_an_evaluations_kwargs_are_added_to_the_runs_own(tmp_path):
    timms = {"name": "timm/test_vit", "kwargs": {"drop_rate": 0.25}}
    run_folder(tmp_path, "timm/test_vit", **{**CIFAR, "backbone": timms})
    backbone, _ = load_encoder(tmp_path, {"backbone": {"name": "timm/test_vit", "kwargs": {"drop_path_rate": 0.5}}})
    assert backbone.blocks[-1].drop_path1.drop_prob == 0.5 and backbone.pos_drop.p == 0 and backbone.head_drop.p == 0.25


def test_the_wrong_stem_is_a_mismatch_too(tmp_path):
    run_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 of another shape .*; backbone\.stem=small has its"):
        load_encoder(tmp_path, {**CIFAR, "data": {"dataset": "imagenet"}})


@pytest.mark.parametrize("stages", ["full", "block4", "projector"])
def test_the_teachers_encoder_is_the_students_before_its_first_stage(tmp_path, stages):
    method = build("byol", momentum__stages=stages)
    with torch.no_grad():
        for name, x in method.named_parameters():
            if name.startswith("momentum_backbone."):
                x.add_(1)
    config = {"method": "byol", "backbone": {"name": "resnet10_w16"}, "data": {"dataset": "cifar10"}}
    (tmp_path / "args.json").write_text(json.dumps(config))
    torch.save({"state_dict": method.state_dict()}, tmp_path / "x-ep=0.ckpt")
    if stages == "projector":
        with pytest.raises(CheckpointError, match="the teacher begins after the backbone"):
            load_encoder(tmp_path, teacher=True)
        return
    student, teacher = (dict(load_encoder(tmp_path, teacher=t)[0].named_parameters()) for t in (False, True))
    raised = {name for name, x in teacher.items() if torch.equal(x, student[name] + 1)}
    same = {name for name, x in teacher.items() if torch.equal(x, student[name])}
    assert raised == {name for name in teacher if stages == "full" or name.startswith("layer4")}
    assert raised | same == teacher.keys()


def test_safetensors_in_a_run_folder(tmp_path):
    original = run_folder(tmp_path, **CIFAR)
    [checkpoint] = tmp_path.glob("*.ckpt")
    checkpoint.unlink()
    data = safetensors.torch.save(original.state_dict())
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    record = {"model.safetensors": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}}
    (tmp_path / RECORDS).write_text(json.dumps(record))
    assert find_checkpoint(tmp_path) == path
    loaded = load_encoder(tmp_path)[0].state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in original.state_dict().items())
    for damaged, said in ((data[:-1], "differs from its SHA-256"), (b"<html>", "differs from its SHA-256")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=said):
            load_encoder(tmp_path)
    (tmp_path / RECORDS).unlink()
    for damaged, said in ((data[:-1], "is damaged"), (b"<html>", "but a web page"), (b"", "is empty")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=said):
            load_encoder(tmp_path)


def args_of(method: str, **changes) -> dict:
    """The args.json of a pre-training."""
    return plain(
        resolve(tiny_config(method, augmentations=[{"crop_size": 28, "num_crops": 2}], max_epochs=1, **changes))
    )


def test_a_run_carries_the_heads_of_its_methods_vit(tmp_path):
    vit = {"name": "vit_tiny", "kwargs": {"img_size": 28, "patch_size": 7, "depth": 1, "embed_dim": 24}}
    args = args_of("mocov3", backbone=vit, data__dataset="fashion_mnist_mini")
    assert args["backbone"]["kwargs"]["num_heads"] == 12
    original = bare_backbone(args).eval()
    save_checkpoint(
        {"state_dict": {f"backbone.{k}": x for k, x in original.state_dict().items()}}, tmp_path / "x-ep=1.ckpt"
    )
    images = torch.randn(2, 3, 28, 28)
    for method in ("mocov3", "of_somebody_else"):
        (tmp_path / "args.json").write_text(json.dumps(args | {"method": method}))
        with torch.no_grad():
            assert torch.allclose(load_encoder(tmp_path)[0](images), original(images), atol=1e-6)
    with pytest.raises(CheckpointError, match=r"backbone.kwargs.num_heads is 6, but the encoder has 12"):
        load_encoder(tmp_path, {"backbone": {"name": "vit_tiny", "kwargs": {"num_heads": 6}}})
    (tmp_path / "args.json").unlink()
    bare = {"backbone": {"name": "vit_tiny", "kwargs": args["backbone"]["kwargs"] | {"num_heads": 12}}}
    load_encoder(tmp_path, bare)
    del bare["backbone"]["kwargs"]["num_heads"]
    with pytest.raises(CheckpointError, match=r"vit_tiny has other heads by .*mocov3.*; pretrain_method has to say"):
        load_encoder(tmp_path, bare)
    with pytest.raises(CheckpointError, match=r"has to say, not 'moco_v3'; did you mean 'mocov3'"):
        load_encoder(tmp_path, bare | {"pretrain_method": "moco_v3"})
    load_encoder(tmp_path, bare | {"pretrain_method": "mocov3"})


@pytest.mark.parametrize(
    ("kwargs", "held"),
    [
        ({"num_heads": 6}, "3"),
        ({"act_layer": "relu"}, "its default"),
        ({"global_pool": "avg", "fc_norm": False}, "its default"),
        ({"num_heads": 3, "depth": 1, "drop_path_rate": 0.5, "dynamic_img_size": True}, None),
    ],
)
def test_kwargs_that_the_run_did_not_set_are_refused_where_they_make_another_network(tmp_path, kwargs, held):
    """Of the same weights: no shape tells."""
    vit = {"name": "vit_tiny", "kwargs": {"img_size": 28, "patch_size": 7, "depth": 1}}
    run_folder(tmp_path, "vit_tiny", kwargs=vit["kwargs"], **{**CIFAR, "backbone": vit})
    added = {"backbone": {"name": "vit_tiny", "kwargs": kwargs}}
    if held:
        key, value = next(iter(kwargs.items()))
        with pytest.raises(CheckpointError, match=f"backbone.kwargs.{key} is {value}, but the encoder has {held}"):
            load_encoder(tmp_path, added)
        return
    x = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path, added)[0](x), load_encoder(tmp_path)[0](x))


@pytest.mark.parametrize(("key", "value", "held"), [("stem", "imagenet", "small"), ("last_norm", True, "False")])
def test_another_stem_or_last_norm_than_the_runs_is_refused(tmp_path, key, value, held):
    run_folder(tmp_path, **CIFAR)
    with pytest.raises(CheckpointError, match=f"with {key}={held}, but backbone.{key} is {value}"):
        load_encoder(tmp_path, {"backbone": {"name": "resnet18", key: value}})


def test_a_run_carries_what_is_known_of_its_dataset(monkeypatch):
    """Read where the dataset, of somebody's module, is not registered."""
    info = DatasetInfo(3, (0.2,) * 3, (0.1,) * 3, None, image_size=28, small_images=True, eval_std=(0.3,) * 3)
    monkeypatch.setitem(DATASETS, "theirs", info)
    args = args_of("byol", data__dataset="theirs")
    known = eval_transform(args)
    monkeypatch.delitem(DATASETS, "theirs")
    unknown = eval_transform(json.loads(json.dumps(args)))
    for transform in (known, unknown):
        assert transform.mean.tolist() == pytest.approx([0.2] * 3) and transform.std.tolist() == pytest.approx(
            [0.3] * 3
        )
        assert transform.shorter is None
    assert network_of(args)["backbone"]["stem"] == "small"
    assert evaluation_view(args)["std"] == [0.3] * 3


def test_an_evaluation_shows_images_as_the_first_view_does():
    first, small = {"crop_size": 28, "mean": [0.2] * 3, "std": [0.3] * 3}, {"crop_size": 16, "mean": [0.7] * 3}
    args = args_of("byol") | {"augmentations": [first, small]}
    assert evaluation_view(args) == first
