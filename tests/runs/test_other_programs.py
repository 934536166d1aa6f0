"""Weights in the layouts of other programs: they are found, evaluated, and begin a pre-training."""

import argparse

import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch
from tiny_runs import config

from solo_ext.errors import CheckpointError
from solo_ext.networks import BackboneConfig, build_backbone
from solo_ext.runs.encoder import load_encoder
from solo_ext.training.pretrain import pretrain

NETWORK = {"backbone": {"name": "resnet10_w16", "kwargs": {}, "stem": "imagenet"}}


def network(seed, name="resnet10_w16", **kwargs):
    torch.manual_seed(seed)
    return build_backbone(BackboneConfig(name, kwargs, stem="imagenet" if name.startswith("resnet") else "auto"))


def under(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


STUDENT, TEACHER = network(1).state_dict(), network(2).state_dict()
FC = {"fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}
HEAD = {"fc.0.weight": torch.zeros(64, 128), "fc.1.running_mean": torch.zeros(64)}
OLD = {name: x for name, x in STUDENT.items() if not name.endswith("num_batches_tracked")}
LAYOUTS = {  # -> content, and whether there is a teacher in it
    "torchvision": (STUDENT | FC, False),
    "without counters": (OLD | FC, False),
    "data parallel": ({"state_dict": under("module.", STUDENT | FC)}, False),
    "compiled": ({"model": under("_orig_mod.", STUDENT)}, False),
    "compiled inside": ({"state_dict": under("backbone._orig_mod.", STUDENT)}, False),
    "moco": (
        {
            "arch": "resnet18",
            "state_dict": under("module.encoder_k.", TEACHER | FC) | under("module.encoder_q.", STUDENT | FC),
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
        },
        True,
    ),
    "moco v3": (
        {"state_dict": under("module.momentum_encoder.", TEACHER) | under("module.base_encoder.", STUDENT | HEAD)},
        True,
    ),
    "dino": (
        {
            "teacher": under("backbone.", TEACHER) | under("head.", HEAD),
            "student": under("module.backbone.", STUDENT) | under("module.head.", HEAD),
            "args": argparse.Namespace(arch="resnet"),
        },
        True,
    ),
    "byol": (under("target_encoder.net.", TEACHER) | under("online_encoder.net.", STUDENT | HEAD), True),
    "simsiam": ({"state_dict": under("module.encoder.", STUDENT | HEAD) | {"module.predictor.0.weight": FC}}, False),
    "timm's ema": ({"state_dict": STUDENT | FC, "state_dict_ema": TEACHER | FC}, True),
    "solo-learn": (
        {"state_dict": under("momentum_backbone.", TEACHER) | under("backbone.", STUDENT), "epoch": 3},
        True,
    ),
    "solo-learn before 1.0.3": ({"state_dict": under("encoder.", STUDENT)}, False),
}


def equal(found, expected):
    return all(torch.equal(found[name], x) for name, x in expected.items() if "num_batches" not in name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_other_programs(tmp_path, layout, caplog):
    content, both = LAYOUTS[layout]
    torch.save(content, tmp_path / "x.pth")
    with caplog.at_level("INFO", "solo_ext"):
        encoder, run = load_encoder(tmp_path / "x.pth", NETWORK)
    assert run is None and equal(encoder.state_dict(), STUDENT)
    assert layout.startswith("solo-learn") or f"all {len(STUDENT)} tensors of resnet10_w16, from " in caplog.text
    assert ("state_dict_ema" in caplog.text) == (layout == "timm's ema")
    alone = ("compiled", "compiled inside", "dino", "solo-learn", "solo-learn before 1.0.3")
    assert ("left out beside them: fc" in caplog.text) == (layout not in alone)
    if both:
        assert equal(load_encoder(tmp_path / "x.pth", NETWORK, teacher=True)[0].state_dict(), TEACHER)
    else:
        with pytest.raises(CheckpointError, match="holds no backbone of a teacher"):
            load_encoder(tmp_path / "x.pth", NETWORK, teacher=True)


def test_a_file_that_holds_the_teacher_alone(tmp_path):
    torch.save({"teacher": under("module.", TEACHER)}, tmp_path / "x.pth")
    for teacher in (False, True):
        assert equal(load_encoder(tmp_path / "x.pth", NETWORK, teacher)[0].state_dict(), TEACHER)


def test_timms_safetensors(tmp_path):
    vit = network(3, "timm/test_vit")
    head = {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    safetensors.torch.save_file(vit.state_dict() | head, tmp_path / "model.safetensors")
    encoder, _ = load_encoder(tmp_path / "model.safetensors", {"backbone": {"name": "timm/test_vit"}})
    assert equal(encoder.state_dict(), vit.state_dict())


@pytest.mark.parametrize(
    "held, asked, difference",
    [
        (("resnet34", {}), ("resnet18", {}), "unexpected (first layer1.2.conv1.weight)"),
        (("resnet18", {}), ("resnet34", {}), "missing (first layer1.2.conv1.weight)"),
        (("resnet18", {}), ("resnet10_w16", {}), "of another shape (first conv1.weight: [64, 3, 7, 7] instead of [16"),
        (("timm/test_vit", {"depth": 5}), ("timm/test_vit", {"depth": 4}), "unexpected (first blocks.4."),
        (("timm/test_vit", {}), ("resnet18", {}), "missing (first conv1.weight)"),
    ],
    ids=["deeper", "less deep", "wider", "a deeper ViT", "another kind"],
)
def test_another_network_is_refused_with_the_difference(tmp_path, held, asked, difference):
    torch.save({"model": under("module.", network(1, held[0], **held[1]).state_dict())}, tmp_path / "x.pth")
    stem = {"stem": "imagenet"} if asked[0].startswith("resnet") else {}
    with pytest.raises(CheckpointError) as error:
        load_encoder(tmp_path / "x.pth", {"backbone": {"name": asked[0], "kwargs": asked[1], **stem}})
    assert difference in str(error.value)


class Start(pl.Callback):
    def on_train_start(self, trainer, module):
        self.state = {name: x.clone() for name, x in module.state_dict().items()}


def start_of(folder, **changes):
    pretrain(config(folder, max_epochs=1, limit_train_batches=1, **changes), callbacks=[start := Start()])
    return start.state


@pytest.mark.parametrize("layout", ["torchvision", "dino", "solo-learn"])
@pytest.mark.parametrize("buffers", ["own", "ema"])
def test_a_pretraining_begins_with_weights_of_other_programs(tmp_path, layout, buffers):
    torch.save(LAYOUTS[layout][0], tmp_path / "x.pth")
    options = {"backbone__stem": "imagenet", "momentum__buffers": buffers}
    state = start_of(tmp_path / "a", pretrained_feature_extractor=str(tmp_path / "x.pth"), **options)
    for prefix in ("backbone.", "momentum_backbone."):
        assert equal({name: state[prefix + name] for name in STUDENT}, STUDENT)
    plain = start_of(tmp_path / "b", **options)
    heads = [name for name in plain if "backbone" not in name]
    assert heads and all(torch.equal(state[name], plain[name]) for name in heads)


def test_a_pretraining_begins_with_the_encoder_of_a_run_and_resumes_without_it(tmp_path, monkeypatch):
    first = pretrain(config(tmp_path / "first", seed=6))
    trained = load_encoder(first.dir)[0].state_dict()
    cfg = {"pretrained_feature_extractor": str(first.dir), "max_epochs": 1}
    pretrain(config(tmp_path / "next", **cfg), callbacks=[start := Start()])
    assert equal({name: start.state[f"backbone.{name}"] for name in trained}, trained)

    [folder] = (tmp_path / "next" / "byol").iterdir()
    pretrain(config(tmp_path / "next", **cfg | {"max_epochs": 2, "resume_from_checkpoint": str(folder)}))
    with pytest.raises(
        CheckpointError, match=r"holds a resnet10_w16 .* with stem=small, but backbone.stem is imagenet"
    ):
        pretrain(config(tmp_path / "other", **cfg, backbone__stem="imagenet"))


def test_weights_alone_are_not_resumed(tmp_path):
    torch.save(STUDENT, tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=r"weights only.*; pretrained_feature_extractor=.*x.pth begins a pre-train"
    ):
        pretrain(config(tmp_path / "a", resume_from_checkpoint=str(tmp_path / "x.pth")))


def test_of_two_networks_in_a_file_the_one_that_fits_is_taken(tmp_path):
    narrow = network(4, width=8).state_dict()
    torch.save({"model": under("small.", narrow) | under("large.", STUDENT)}, tmp_path / "x.pth")
    assert equal(load_encoder(tmp_path / "x.pth", NETWORK)[0].state_dict(), STUDENT)
