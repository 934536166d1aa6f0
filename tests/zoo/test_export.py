"""`solo-ext export`: what is written loads elsewhere by the lines it comes with, and a wrong file is never left."""

import dataclasses
import json
import os
import resource
import sys
from functools import cache
from importlib import import_module

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from solo_ext import networks
from solo_ext.errors import CheckpointError, ConfigError
from solo_ext.files import sha256, write_json
from solo_ext.methods import backbone_of
from solo_ext.runs.checkpoints import save_checkpoint
from solo_ext.runs.encoder import load_encoder
from solo_ext.runs.run import RECORDS, WEIGHTS
from solo_ext.zoo.export import BATCHES, RECORD, TARGETS, export, onnx, supporting
from solo_ext.zoo.export.safetensors import public

SIZE = 24  # pixels
SMALL_VIT = {"img_size": SIZE, "patch_size": 8, "depth": 2, "embed_dim": 48}
BACKBONES = {  # the configuration, and the targets that take it beside huggingface, onnx and safetensors
    "resnet18-small": ({"name": "resnet18"}, {"torchvision", "timm"}),
    "resnet18": (
        {"name": "resnet18", "stem": "imagenet", "kwargs": {"zero_init_residual": True}},
        {"torchvision", "timm", "detectron2"},
    ),
    "resnet50": ({"name": "resnet50", "kwargs": {"width_per_group": 4, "groups": 4}}, {"torchvision", "timm"}),
    "dilated": (
        {"name": "resnet50", "kwargs": {"width_per_group": 4, "replace_stride_with_dilation": [False, False, True]}},
        {"torchvision"},
    ),
    "resnet10_w16": ({"name": "resnet10_w16"}, set()),
    "last_norm": ({"name": "resnet18", "last_norm": True}, set()),
    "vit": ({"name": "vit_tiny", "kwargs": SMALL_VIT}, {"timm"}),
    "mocov3's vit": ({"name": "vit_tiny", "kwargs": {**SMALL_VIT, "stop_grad_conv1": True}}, {"timm"}),
    "timm": ({"name": "timm/test_resnet"}, {"timm"}),
    "resnet18-bands": ({"name": "resnet18", "stem": "imagenet"}, {"torchvision", "timm"}),  # four channels
    "resnet18-small-bands": ({"name": "resnet18", "stem": "small"}, {"torchvision", "timm"}),
    "vit-bands": ({"name": "vit_tiny", "kwargs": SMALL_VIT}, {"timm"}),
    "timm-bands": ({"name": "timm/test_resnet"}, {"timm"}),
}


def config_of(case: str) -> dict:
    bands = {"dataset": "custom", "channels": 4} if "bands" in case else {}
    return {
        "name": "tiny",
        "method": "mocov3" if "mocov3" in case else "byol",
        "backbone": {"kwargs": {}, **BACKBONES[case][0]},
        "data": {
            "dataset": "cifar10",
            "train_path": "/home/jane/cifar",
            "val_path": "cifar",
            "num_workers": 0,
            **bands,
        },
        "augmentations": [{"crop_size": SIZE}],
        "checkpoint": {"enabled": True, "dir": "trained_models"},
        "wandb": {"enabled": True, "entity": "jane", "project": "secret"},
    }


def randomised(config: dict, seed: int):
    """A backbone whose parameters and running statistics are all unlike initial ones, and unlike each other."""
    torch.manual_seed(seed)
    backbone = backbone_of(config)
    for name, tensor in backbone.state_dict().items():
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim == 1:
            tensor.normal_(std=0.1)
    return backbone.eval()


def make_run(folder, case: str = "resnet10_w16", teacher: bool = False):
    """A run folder; returns its student and, if it has one with a backbone, its teacher."""
    config = config_of(case)
    folder.mkdir(parents=True)
    encoders = [randomised(config, seed) for seed in (1, 2)[: 1 + teacher]]
    state = {"momentum_projector.0.weight": torch.zeros(1)}
    for prefix, encoder in zip(("backbone", "momentum_backbone"), encoders, strict=False):
        state |= {f"{prefix}.{name}": x for name, x in encoder.state_dict().items()}
    write_json(folder / "args.json", config)
    save_checkpoint({"state_dict": state, "epoch": 3, "global_step": 12}, folder / "tiny-ab12-ep=3.ckpt")
    return encoders


@pytest.fixture
def run_folder(tmp_path):
    make_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function: case -> run folder and its student; for tests that leave the folder as it is."""

    @cache
    def make(case: str):
        folder = tmp_path_factory.mktemp("runs") / "run"
        return folder, *make_run(folder, case)

    return make


def features(network, case: str = ""):
    torch.manual_seed(5)
    channels = 4 if "bands" in case else 3
    with torch.no_grad():
        return network(torch.randn(3, channels, SIZE, SIZE))


def loaded(report, monkeypatch):
    """The network that the report's lines of code give, run in the folder."""
    monkeypatch.chdir(report.folder)
    scope = {"torch": torch, "torchvision": torchvision, "timm": timm, "safetensors": safetensors}
    exec("\n".join(report.load), scope)
    return scope["model"].eval()


@pytest.mark.parametrize("to", ["torchvision", "timm", "safetensors"])
@pytest.mark.parametrize("case", BACKBONES)
def test_the_target_computes_the_same(case, to, runs, tmp_path, monkeypatch):
    run, student = runs(case)
    works = BACKBONES[case][1] | {"onnx", "safetensors"} | ({"huggingface"} if "bands" not in case else set())
    assert {name for name, why in supporting(student).items() if why is None} == works
    out = tmp_path / "out"
    if to not in works:
        with pytest.raises(ConfigError, match=f"^--to {to} has no place for this network: .*; possible: .*safetensors"):
            export(run, to, out)
        assert not out.exists()
        return
    report = export(run, to, out, dtype="float32")
    network = load_encoder(out)[0] if to == "safetensors" else loaded(report, monkeypatch)
    ours, theirs = features(student, case), features(network, case)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * ours.abs().max().item())
    assert (
        report.record["difference"] <= report.record["bound"] == 1e-5
        and report.record["images"] == sum(BATCHES)
        and report.record["rounding"] is None
    )
    assert sorted(report.record["matched"]) == sorted(student.state_dict()) and not report.record["unexpected"]
    classifier = [] if to == "safetensors" else ["head" if "vit" in case else "fc"]
    assert report.record["missing"] == [f"{name}.{tensor}" for name in classifier for tensor in ("weight", "bias")]


class Tied(nn.Module):
    """One tensor under two names, as CoaT's position encodings."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(3, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.first(x.mean((2, 3))) + self.second(x.amax((2, 3)))


def test_shared_tensors_are_written_once_for_each_name(tmp_path, monkeypatch):
    monkeypatch.setitem(networks.BACKBONES, "tied", Tied)
    monkeypatch.setitem(BACKBONES, "tied", ({"name": "tied"}, set()))
    [student] = make_run(tmp_path / "run", "tied")
    report = export(tmp_path / "run", "safetensors", tmp_path / "out", dtype="float32")
    assert sorted(report.record["matched"]) == sorted(student.state_dict())
    assert torch.equal(features(load_encoder(tmp_path / "out")[0]), features(student))


@pytest.mark.parametrize(
    ("to", "case", "dtype"),
    [("torchvision", "resnet18", "float16"), ("timm", "vit", "bfloat16"), ("safetensors", "resnet10_w16", "float16")],
)
def test_rounded_matrices(to, case, dtype, runs, tmp_path):
    run, student = runs(case)
    report = export(run, to, tmp_path / "out", dtype=dtype)
    file = next(path for path in (tmp_path / "out").iterdir() if path.suffix in (".pth", ".safetensors"))
    stored = torch.load(file, weights_only=True) if file.suffix == ".pth" else safetensors.torch.load_file(file)
    for name, x in student.state_dict().items():
        rounded_tensor = x.to(getattr(torch, dtype)) if x.ndim > 1 else x
        assert stored[name].dtype == rounded_tensor.dtype and stored[name].equal(rounded_tensor), name
    rounded = backbone_of(config_of(case)).eval()
    rounded.load_state_dict(stored)
    ours, theirs = features(student), features(rounded)
    moved = ((ours - theirs).abs().max() / ours.abs().max()).item()
    assert report.record["difference"] <= 1e-5 < moved / 3 < report.record["rounding"]["difference"] < 3 * moved
    assert 0.99 < report.record["rounding"]["cosine"] < 1
    assert f"rounding to {dtype} moved them" in str(report)


def test_weights_that_float16_cannot_hold(run_folder, tmp_path):
    config = config_of("resnet10_w16")
    state = {f"backbone.{name}": x for name, x in randomised(config, 1).state_dict().items()}
    state["backbone.conv1.weight"][0] = 1e5
    save_checkpoint({"state_dict": state}, run_folder / "tiny-ab12-ep=4.ckpt")
    with pytest.raises(CheckpointError, match=r"conv1\.weight does not fit into float16; --dtype bfloat16"):
        export(run_folder, "safetensors", tmp_path / "out")
    assert export(run_folder, "safetensors", tmp_path / "out", dtype="bfloat16").record["difference"] <= 1e-5


@pytest.mark.parametrize("case", ["resnet10_w16", "mocov3's vit", "vit-bands"])
def test_onnx(case, runs, tmp_path, capfd):
    import onnxruntime

    run, student = runs(case)
    report = export(run, "onnx", tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [RECORD, "tiny-ab12.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "tiny-ab12.onnx")
    network = lambda x: torch.from_numpy(session.run(["features"], {"images": x.numpy()})[0])  # noqa: E731
    ours = features(student, case)
    torch.testing.assert_close(features(network, case), ours, rtol=0, atol=1e-4 * ours.abs().max().item())
    assert (
        report.record["difference"] <= 1e-4
        and json.loads((tmp_path / "out" / RECORD).read_text())["opset"] == onnx.OPSET
    )


def test_onnx_without_the_newer_exporter_and_without_packages(run_folder, tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError

    monkeypatch.setattr(onnx, "_trace", fails)
    assert export(run_folder, "onnx", tmp_path / "out").record["difference"] <= 1e-4
    monkeypatch.setattr(onnx, "_trace_as_before", lambda *args: import_module("onnx").ModelProto())
    with pytest.raises(CheckpointError, match="ONNX does not take this network: "):
        export(run_folder, "onnx", tmp_path / "other")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"needs onnxscript, .*: pip install 'solo-ext\[onnx\]'"):
        export(run_folder, "onnx", tmp_path / "other")


@pytest.mark.parametrize("teacher", [False, True])
def test_student_and_teacher(teacher, tmp_path, run):
    encoders = make_run(tmp_path / "run", teacher=True)
    words = ["--teacher"] * teacher
    status, out, _ = run("export", tmp_path / "run", "--to", "safetensors", "--dtype", "float32", *words)
    folder = tmp_path / "exports" / f"tiny-ab12{'-teacher' * teacher}-safetensors"
    assert status == 0 and str(folder.relative_to(tmp_path)) in out
    assert features(load_encoder(folder)[0]).equal(features(encoders[teacher]))
    assert json.loads((folder / RECORD).read_text())["teacher"] is teacher
    if teacher:  # and it stays one
        assert features(load_encoder(folder, teacher=True)[0]).equal(features(encoders[1]))
    else:
        with pytest.raises(CheckpointError, match="holds no backbone of a teacher"):
            load_encoder(folder, teacher=True)
    status, out, _ = run("export", folder, "--to", "safetensors", "--out", "again")
    assert status == 0 and f"the {'teacher' if teacher else 'student'} of model.safetensors" in out


@pytest.mark.parametrize("to", ["timm", "torchvision", "safetensors"])
def test_every_export_says_how_its_images_are_made(to, runs, tmp_path):
    report = export(runs("resnet18")[0], to, tmp_path / "out")
    image = json.loads((tmp_path / "out" / RECORD).read_text())["preprocessing"]
    assert (image["input_size"], image["crop_mode"], image["interpolation"]) == ([3, SIZE, SIZE], "squash", "bilinear")
    assert image["mean"] == [0.4914, 0.4822, 0.4465] and image["std"] == [0.247, 0.243, 0.261]
    assert "mean [0.4914, 0.4822, 0.4465]" in str(report)


def test_an_exported_run_is_a_run(tmp_path, run):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").write_text("epoch,step\n3,12\n")
    write_json(tmp_path / "run" / "environment.json", {"host": "ab", "command": ["/home/jane/solo-ext", "seed=1"]})
    report = export(tmp_path / "run", "safetensors", tmp_path / "entry")
    weights = tmp_path / "entry" / WEIGHTS
    recorded = json.loads((tmp_path / "entry" / RECORDS).read_text())[WEIGHTS]
    assert recorded == {"epoch": 3, "step": 12, "sha256": sha256(weights), "size": weights.stat().st_size}
    assert set(report.record["files"]) | {RECORD} == {path.name for path in (tmp_path / "entry").iterdir()}
    for name, file in report.record["files"].items():
        path = tmp_path / "entry" / name
        assert file == {"size": path.stat().st_size, "sha256": sha256(path)}
        assert not any(word in path.read_bytes() for word in (b"jane", b"/home", b"secret", str(tmp_path).encode()))
    assert str(tmp_path) not in (tmp_path / "entry" / RECORD).read_text()

    for i in range(6):  # the images have to be named again, for no path of this machine went along
        folder = tmp_path / "images" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (250 * (i % 2), 9 * i, 0)).save(folder / f"{i}.png")
    data = ("data.dataset=custom", *(f"data.{split}_path={tmp_path / 'images'}" for split in ("train", "val")))
    status, out, err = run("knn", "--run", tmp_path / "entry", "--k", 1, *data)
    assert status == 0 and "100.0" in out, err
    again = export(tmp_path / "entry", "safetensors", tmp_path / "again")
    assert (
        again.record["files"][WEIGHTS] == report.record["files"][WEIGHTS]
        and again.record["rounding"]["difference"] == 0
    )
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_encoder(tmp_path / "entry")


def test_what_is_private_stays_here():
    config = {
        "name": "byol",
        "backbone": {"name": "timm/x", "kwargs": {"class_token": True, "checkpoint_path": "w.pth"}},
        "data": {"dataset": "custom", "train_path": "images", "val_path": None, "format": "h5"},
        "checkpoint": {"enabled": True, "dir": "runs"},
        "resume_from_checkpoint": "a.ckpt",
        "pretrained_feature_extractor": "b.ckpt",
        "wandb": {"enabled": False, "entity": "jane", "project": "x"},
        "devices": [0, 1],
        "notes": ["~/x", "fine", "file:///x"],
        "other": "/home/jane",
    }
    assert public(config) == {
        "name": "byol",
        "backbone": {"name": "timm/x", "kwargs": {"class_token": True}},
        "data": {"dataset": "custom", "val_path": None, "format": "h5"},
        "checkpoint": {"enabled": True},
        "wandb": {"enabled": False},
        "devices": [0, 1],
        "notes": ["fine"],
    }
    command = {
        "/home/jane/bin/solo-ext": "solo-ext",
        "pretrain": "pretrain",
        "scripts/pretrain/cifar10/byol.yaml": "scripts/pretrain/cifar10/byol.yaml",
        "/home/jane/x/scripts/pretrain/cifar10/byol.yaml": "scripts/pretrain/cifar10/byol.yaml",
        "data.train_path=/home/jane/my images/train": "data.train_path=train",
        "++data.val_path='/home/o'brien/val'": "++data.val_path=val",
        "x=[/home/jane/a,b/c,~/d]": "x=[a,b/c,d]",
        "wandb.entity=jane": "wandb.entity=***",
        "checkpoint.dir=jane/runs": "checkpoint.dir=***",
        "--run=../jane/tiny-ep=3.ckpt": "--run=tiny-ep=3.ckpt",
        "C:\\Users\\jane\\x": "x",
        "~jane": "***",
        "seed=1": "seed=1",
        "optimizer.lr=0.3/2": "optimizer.lr=0.3/2",
    }
    environment = {"cpu": "x", "host": "ab", "command": list(command), "data": {"train": {"path": "/x", "images": 5}}}
    expected = {"cpu": "x", "command": list(command.values()), "data": {"train": {"images": 5}}}
    assert public({**environment, "before": [environment]}) == {**expected, "before": [expected]}


# What must not be left behind.


def swap(source):
    tensors = dict(source.tensors)
    one, other = "layer1.0.bn1.weight", "layer1.0.bn2.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]
    return dataclasses.replace(source, tensors=tensors)


def change_eps(network):
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3


FAULTS = [(fault, to) for fault in ("swapped", "eps") for to in ("torchvision", "timm", "safetensors")]


@pytest.mark.parametrize(("fault", "to"), [*FAULTS, ("left out", "torchvision")])  # the others load strictly
def test_the_proof_finds_a_fault(fault, to, runs, tmp_path, monkeypatch):
    run, _ = runs("resnet18-small")
    module = import_module(f"solo_ext.zoo.export.{to}")
    write = module.export

    def faulty(source, folder):
        if fault == "swapped":
            source = swap(source)
        elif fault == "left out":
            tensors = {name: x for name, x in source.tensors.items() if name != "layer3.0.bn1.running_var"}
            source = dataclasses.replace(source, tensors=tensors)
        product = write(source, folder)
        if fault == "eps":
            change_eps(product.network)
        return product

    monkeypatch.setattr(module, "export", faulty)
    with pytest.raises(CheckpointError, match=rf"features of --to {to} differ from ours by \d.*, more than 1e-05"):
        export(run, to, tmp_path / "exports" / "out")
    assert not os.listdir(tmp_path)


def test_features_that_prove_nothing(run_folder, tmp_path):
    state = {f"backbone.{name}": 0 * x for name, x in randomised(config_of("resnet10_w16"), 1).state_dict().items()}
    save_checkpoint({"state_dict": state}, run_folder / "tiny-ab12-ep=4.ckpt")
    with pytest.raises(CheckpointError, match="features of random images are all 0 or not finite"):
        export(run_folder, "safetensors", tmp_path / "out")
    state["backbone.bn1.bias"][0] = torch.nan
    save_checkpoint({"state_dict": state}, run_folder / "tiny-ab12-ep=4.ckpt")
    with pytest.raises(CheckpointError, match=r"bn1\.bias is not finite$"):
        export(run_folder, "safetensors", tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_a_full_disk(run_folder, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1000, 100_000, 354_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match=r"out cannot be written: File too large$"):
                export(run_folder, "safetensors", tmp_path / "new" / "deep" / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == ["run"]


MISTAKES = {
    "export ./run --to torchvison": "--to: there is no 'torchvison'; did you mean 'torchvision'?",
    "export ./run --to jax": f"--to: there is no 'jax' (one of {', '.join(TARGETS)})",
    "export ./run": "the following arguments are required: --to (see solo-ext export --help)",
    "export ./rum --to timm": "rum does not exist",
    "export run/tiny-ab12-ep=4.ckpt --to timm": "run/tiny-ab12-ep=4.ckpt does not exist; did you mean 'tiny-ab12-ep=3.",
    "export ./damaged --to safetensors": "damaged/tiny-ab12-ep=3.ckpt is damaged: it differs from its SHA-256",
    "export bare.ckpt --to safetensors": "bare.ckpt has no args.json beside it",
    "export ./run --to safetensors --out run": "--out: run exists; name another folder, or remove it",
    "export ./run --to safetensors --out run/args.json": "--out: run/args.json exists",
    "export ./run --to safetensors --out run/args.json/x": "run/args.json/x cannot be written: Not a directory",
    "export ./run --to safetensors --out /proc/x/y": "/proc/x/y cannot be written: ",
    "export ./run --to safetensors --dtype float": "--dtype: --to safetensors has no 'float'; did you mean 'float32'?",
    "export ./run --to onnx --dtype float16": "--dtype: --to onnx has no 'float16'; did you mean 'float32'?",
    "export ./run --to detectron2 --dtype bfloat16": "--dtype: --to detectron2 has no 'bfloat16'",
    "export ./run --to timm --push jane/x": "--push goes with --to huggingface, not --to timm",
    "export ./run --to torchvision": "--to torchvision has no place for this network: its ResNets are resnet18, "
    "resnet34 and resnet50; possible: huggingface, onnx, safetensors",
    "export ./heads --to safetensors --teacher": "holds no backbone of a teacher",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes(line, run_folder, tmp_path, run):
    if "/damaged " in line:
        make_run(tmp_path / "damaged")
        path = tmp_path / "damaged" / "tiny-ab12-ep=3.ckpt"
        path.write_bytes(path.read_bytes()[:-10])
    if "/heads " in line:
        make_run(tmp_path / "heads")
    if " bare" in line:
        torch.save({"state_dict": {"backbone.x": torch.zeros(1)}}, tmp_path / "bare.ckpt")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*line.split())
    assert status == 2 and not out and MISTAKES[line] in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(run_folder, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
        export(run_folder, "safetensors", tmp_path / "out")
    tmp_path.chmod(0o700)
