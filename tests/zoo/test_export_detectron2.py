"""`--to detectron2`: torchvision's ResNets under detectron2's names, against its graph and, where it is, against it.

detectron2 is the installed one, or DETECTRON2=<path of a checkout>, compiled or not (its pure Python dependencies do).
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize

from solo_ext.files import write_json
from solo_ext.networks.backbones import BackboneConfig, build_backbone
from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.zoo import export as zoo
from solo_ext.zoo.export import detectron2 as export

MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)
FPN = [
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2),
]


def random_backbone(name: str, **kwargs):
    """In eval mode, with BatchNorms that are nothing like new ones."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name, **kwargs)).eval()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                torch.nn.init.normal_(tensor, std=0.3)
            for tensor in (module.running_var, module.weight):
                torch.nn.init.uniform_(tensor, 0.3, 1.5)
    return backbone


def difference(actual, expected) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def exported(folder: Path, name: str, **kwargs):
    """A backbone, the report of its export from a run folder, and its two files."""
    backbone, run = random_backbone(name, **kwargs), folder / "run"
    run.mkdir()
    save_file(backbone.state_dict(), run / "model.safetensors")
    view = {"crop_size": 64, "mean": MEAN, "std": STD}
    write_json(run / "args.json", {"backbone": {"name": name, **kwargs}, "augmentations": [view]})
    report = zoo.export(run, "detectron2", folder / "out")
    return backbone, report, [folder / "out" / f"run.{suffix}" for suffix in ("pth", "yaml")]


def graph(weights, x):
    """The map of res5 by detectron2's graph, written down: STRIDE_IN_1X1 False, BatchNorms of eps 1e-5 in eval mode."""

    def conv(x, name, stride=1):
        kernel = weights[f"{name}.weight"]
        norm = {key: weights[f"{name}.norm.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
        return F.batch_norm(F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2), **norm, eps=1e-5)

    x = F.max_pool2d(conv(x, "stem.conv1", stride=2).relu(), kernel_size=3, stride=2, padding=1)
    blocks = {(int(match[1]), int(match[2])) for name in weights if (match := re.match(r"res(\d)\.(\d+)\.", name))}
    for stage, block in sorted(blocks):
        path, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
        if f"{path}.conv3.weight" in weights:
            y = conv(conv(conv(x, f"{path}.conv1").relu(), f"{path}.conv2", stride).relu(), f"{path}.conv3")
        else:
            y = conv(conv(x, f"{path}.conv1", stride).relu(), f"{path}.conv2")
        shortcut = conv(x, f"{path}.shortcut", stride) if f"{path}.shortcut.weight" in weights else x
        x = (y + shortcut).relu()
    return x


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "timm/resnet50", "timm/resnet101"])
@torch.no_grad()
def test_the_graph_gives_the_backbones_map(name):
    backbone = random_backbone(name)
    depth = int(name.rpartition("resnet")[2])
    assert export.supports(backbone) is None and export.depth_of(backbone) == depth
    x = torch.randn(2, 3, 75, 64)
    weights, expected = export.convert(backbone.state_dict()), export.feature_map(backbone, x)
    assert difference(graph(weights, x), expected) <= 1e-5
    assert difference(export.network(weights, depth)(x), expected) <= 1e-5


@pytest.mark.parametrize(("name", "depth", "width"), [("resnet18", 18, 64), ("resnet50", 50, 256)])
def test_files(tmp_path, name, depth, width):
    backbone, report, files = exported(tmp_path, name, last_norm=True)
    state = backbone.state_dict()
    stored = load_checkpoint(files[0])  # which reads tensors and plain values only
    assert stored["matching_heuristics"] is True and stored["__author__"] != "Caffe2"
    weights = stored["model"]
    assert {"stem.conv1.weight", "res2.1.conv2.norm.running_var", "res5.0.conv1.weight"} <= set(weights)
    assert torch.equal(weights["res5.0.shortcut.weight"], state["layer4.0.downsample.0.weight"])
    assert (
        set(report.record["matched"]) == set(weights)
        and not report.record["missing"]
        and not report.record["unexpected"]
    )
    dropped = json.loads((tmp_path / "out" / "export.json").read_text())["dropped"]
    assert dropped == [key for key in state if key.startswith("fc.") or key.endswith(".num_batches_tracked")]
    assert len(weights) + len(dropped) == len(state)

    config = OmegaConf.load(files[1])
    model, resnets = config.MODEL, config.MODEL.RESNETS
    assert (str(files[0]), depth, width) == (model.WEIGHTS, resnets.DEPTH, resnets.RES2_OUT_CHANNELS)
    assert config.INPUT.FORMAT == "RGB" and resnets.STRIDE_IN_1X1 is False and model.BACKBONE.FREEZE_AT == 0
    for actual, expected in ((model.PIXEL_MEAN, MEAN), (model.PIXEL_STD, STD)):
        assert actual == pytest.approx([255 * value for value in expected])
    assert ("Res5ROIHeads" in files[1].read_text()) == (depth < 50)


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("resnet18", {"stem": "small"}, "backbone.stem: small"),
        ("resnet10_w16", {}, "this SlimResNet differs"),
        ("vit_tiny", {}, "this VisionTransformer differs"),
        ("timm/resnet50d", {}, "this ResNet differs"),
        ("resnet50", {"kwargs": {"replace_stride_with_dilation": [False, False, True]}}, "this ResNet differs"),
    ],
)
def test_what_detectron2_cannot_hold(name, kwargs, reason):
    backbone = build_backbone(BackboneConfig(name, **kwargs))
    assert export.depth_of(backbone) is None and re.search(reason, export.supports(backbone))


@pytest.fixture
def detectron2(monkeypatch):
    """Makes it importable; skips where it is neither installed nor at DETECTRON2."""
    if path := os.environ.get("DETECTRON2"):
        monkeypatch.syspath_prepend(path)
    else:
        pytest.importorskip(
            "detectron2", reason="set DETECTRON2=<path of a detectron2 checkout> to load our files in it"
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("detectron2")
@pytest.mark.parametrize(
    ("name", "head"), [("resnet18", "fpn"), ("resnet34", "fpn"), ("resnet50", "fpn"), ("resnet50", "c4")]
)
def test_detectron2_loads_it(tmp_path, name, head):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    backbone, _, (_, settings) = exported(tmp_path, name)
    config = get_cfg()  # by default of a C4 detector
    config.merge_from_list(["MODEL.DEVICE", "cpu", *(FPN if head == "fpn" else [])])
    config.merge_from_file(str(settings))
    model = build_model(config).eval()
    checkpointer, reports = DetectionCheckpointer(model), []
    checkpointer._log_incompatible_keys = reports.append
    checkpointer.resume_or_load(config.MODEL.WEIGHTS, resume=False)
    (report,) = reports
    assert not report.unexpected_keys and not report.incorrect_shapes
    assert not [key for key in report.missing_keys if re.search(r"\b(stem|res\d)\.", key)]
    assert any(key.startswith("roi_heads.") for key in report.missing_keys)  # the detector's own layers are new

    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    x = normalize(image / 255, MEAN, STD)[None]
    with torch.no_grad():
        pixels = model.preprocess_image([{"image": image}]).tensor
        if head == "fpn":
            actual = model.backbone.bottom_up(pixels)["res5"]
        else:
            actual = model.roi_heads.res5(model.backbone(pixels)["res4"])
        expected = export.feature_map(backbone, x)
    assert difference(pixels, x) <= 1e-5
    assert difference(actual, expected) <= 1e-5
