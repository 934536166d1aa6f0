"""Heads, backbones and the row of stages."""

import copy
import math
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import own_backbones
from torch import nn
from trials import trials

from solo_ext.errors import ConfigError
from solo_ext.networks import BACKBONES, BackboneConfig, DINOHead, build_backbone, mlp
from solo_ext.networks.backbones import check_sizes
from solo_ext.networks.heads import WeightNormLinear
from solo_ext.networks.stages import stage_row

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 5, "num_heads": 2}


def tiny_vit(method="dino", **kwargs):
    return build_backbone(BackboneConfig("vit_tiny", TINY | kwargs), own=own_backbones(method))


# Heads.


@pytest.mark.parametrize("last_norm", [False, True, "affine"])
def test_mlp_ends_as_asked(last_norm):
    head = mlp([6, 5, 4], last_norm=last_norm)
    assert [type(layer) for layer in head[:4]] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    if not last_norm:
        assert len(head) == 4
        return
    assert head[4].affine == (last_norm == "affine")
    z = head(torch.randn(64, 6))
    torch.testing.assert_close(z.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(0, unbiased=False), torch.ones(4), rtol=0, atol=1e-2)


@pytest.mark.parametrize("norm", [False, True])
def test_dino_head_by_hand(norm):
    head = DINOHead(6, 10, 4, 7, norm=norm).double()
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(8, 6).double()

    def layer(x, linear, bn=None):
        x = x @ linear.weight.T + linear.bias
        if bn is not None:
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * bn.weight + bn.bias
        return x

    h, m = x, head.mlp
    for i in (0, 3) if norm else (0, 2):
        h = layer(h, m[i], m[i + 1] if norm else None)
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    h = layer(h, m[-1])
    h = h / h.norm(dim=1, keepdim=True)
    v, g = head.last_layer.weight_v, head.last_layer.weight_g
    expected = torch.stack([h @ (g[k] * v[k] / v[k].pow(2).sum().sqrt()) for k in range(7)], dim=1)
    torch.testing.assert_close(head(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(head)(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_dino_head_starts_as_printed(norm_last_layer):
    head = DINOHead(64, 512, 32, 100, norm_last_layer=norm_last_layer)
    for layer in head.mlp[::2]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and not layer.bias.any()
    assert head.last_layer.weight_g.requires_grad != norm_last_layer
    assert torch.equal(head.last_layer.weight_g, torch.ones(100, 1))
    assert 0.95 / math.sqrt(32) < head.last_layer.weight_v.abs().max() <= 1 / math.sqrt(32)


def test_weight_norm_equals_pytorchs():
    ours, theirs = WeightNormLinear(5, 9), nn.utils.parametrizations.weight_norm(nn.Linear(5, 9, bias=False))
    with torch.no_grad():
        ours.weight_g.copy_(torch.rand(9, 1))
        theirs.parametrizations.weight.original0.copy_(ours.weight_g)
        theirs.parametrizations.weight.original1.copy_(ours.weight_v)
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight_v.grad, theirs.parametrizations.weight.original1.grad)
    torch.testing.assert_close(ours.weight_g.grad, theirs.parametrizations.weight.original0.grad)


# Backbones.


def test_last_norm_is_a_batch_norm_on_the_pooled_features():
    """ProjectorEMA, Table C.8."""
    plain = build_backbone(BackboneConfig("resnet10_w16"))
    backbone = build_backbone(BackboneConfig("resnet10_w16", last_norm=True))
    extra = backbone.state_dict().keys() - plain.state_dict().keys()
    assert extra == {f"fc.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    feats = backbone(torch.randn(32, 3, 16, 16))
    torch.testing.assert_close(feats.mean(0), torch.zeros(128), rtol=0, atol=1e-4)
    assert stage_row({"backbone": backbone})[-1].holds("fc.weight")


def test_mocov3_positions_equal_the_printed_formula():
    """Chen et al., 2021, Sec. 4.2: sine and cosine in two dimensions, frequencies 10000^-(k / (D/4)); none for cls."""
    vit = tiny_vit("mocov3")
    expected = torch.zeros(1, 17, 16)
    for row in range(4):
        for column in range(4):
            for k in range(4):
                w = 10000 ** (-k / 4)
                values = (math.sin(row * w), math.cos(row * w), math.sin(column * w), math.cos(column * w))
                for quarter, value in enumerate(values):
                    expected[0, 1 + 4 * row + column, 4 * quarter + k] = value
    torch.testing.assert_close(vit.pos_embed.detach(), expected, rtol=0, atol=1e-6)
    assert not vit.pos_embed.requires_grad


@pytest.mark.parametrize("frozen", [False, True])
def test_mocov3_vit_starts_as_printed(frozen):
    vit = tiny_vit("res_mocov3", stop_grad_conv1=frozen, embed_dim=64)
    bounds = {
        "patch_embed.proj.weight": math.sqrt(6 / (3 * 4 * 4 + 64)),
        "blocks.2.attn.qkv.weight": math.sqrt(6 / (64 + 64)),
        "blocks.2.mlp.fc1.weight": math.sqrt(6 / (64 + 256)),
    }
    tensors = dict(vit.named_parameters())
    for name, bound in bounds.items():
        assert 0.98 * bound < tensors[name].abs().max() <= bound, name
    assert not any(p.any() for name, p in tensors.items() if name.endswith("bias"))
    assert 0 < vit.cls_token.abs().max() < 1e-5
    assert {name for name, p in tensors.items() if not p.requires_grad} == {
        "pos_embed", *(["patch_embed.proj.weight", "patch_embed.proj.bias"] if frozen else [])
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "heads"),
    [("mocov3", 12), ("res_mocov3", 12), ("res_moco", 12), ("projector_ema_mocov3", 12), ("dino", 6), ("mocov2plus", 6),
     (None, 6)],
)  # fmt: skip
def test_the_mocov3_family_has_its_own_vit(method, heads):
    vit = build_backbone(BackboneConfig("vit_small", {"img_size": 32, "depth": 1}), own=own_backbones(method))
    assert (vit.blocks[0].attn.num_heads, vit.pos_embed.requires_grad) == (heads, heads == 6)
    assert vit(torch.randn(2, 3, 32, 32)).shape == (2, vit.num_features) == (2, 384)


def test_names_of_all_backbones_are_accepted():
    for name in BACKBONES:
        BackboneConfig(name)


@pytest.mark.parametrize(
    ("name", "kwargs", "method", "words"),
    [
        ("vit_tiny", {"depht": 3}, "dino", "depht"),
        ("vit_tiny", {"stop_grad_conv1": True}, "dino", "stop_grad_conv1"),
        ("vit_tiny", TINY | {"num_heads": 3}, "dino", "num_heads"),
        ("vit_tiny", TINY | {"embed_dim": 18}, "mocov3", "divisible by 4 for sine-cosine positions, not 18"),
        ("vit_tiny", TINY | {"reg_tokens": 2}, "mocov3", "class token"),
        ("vit_tiny", TINY | {"class_token": False, "global_pool": "avg"}, "mocov3", "class token"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name, kwargs, method, words):
    with pytest.raises(ConfigError, match=r"backbone\.kwargs") as error:
        build_backbone(BackboneConfig(name, kwargs), own=own_backbones(method))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vit_tiny", "timm/test_vit"])
def test_last_norm_is_for_resnets(name):
    with pytest.raises(ConfigError, match=r"backbone\.last_norm is for resnet18, .*" + name):
        build_backbone(BackboneConfig(name, last_norm=True))


# Stages.

ROWS = {
    "resnet10_w16": lambda: build_backbone(BackboneConfig("resnet10_w16", last_norm=True)),
    "resnet50": lambda: build_backbone(BackboneConfig("resnet50"), small_images=True),
    "vit": tiny_vit,
    "vit-mocov3": lambda: tiny_vit("mocov3"),
    "vit-registers": lambda: tiny_vit(reg_tokens=2, no_embed_class=True, pre_norm=True, global_pool="avg", depth=4),
    "vit-map": lambda: tiny_vit(global_pool="map", class_token=False, depth=13),
    "vit-any-size": lambda: tiny_vit(dynamic_img_size=True),
    "deit": lambda: build_backbone(
        BackboneConfig("timm/deit_tiny_distilled_patch16_224", {"img_size": 16, "patch_size": 4, "embed_dim": 12})
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_stages_are_the_backbone(name):
    """Run one after the other they give its output; each output is where it is said to be; no tensor is left out."""
    torch.manual_seed(0)
    network = nn.Module()
    network.backbone = ROWS[name]().eval()
    row = stage_row({"backbone": network.backbone})
    assert [stage.name for stage in row] == ["conv1", "block1", "block2", "block3", "block4"]
    seen = {}
    for stage in row:
        module = network.get_submodule(stage.output)
        module.register_forward_hook(lambda _, __, output, key=stage.name: seen.update({key: output}))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network.backbone(x)
        hooked = dict(seen)
        for stage in row:
            x = stage(network.backbone, x)
            torch.testing.assert_close(x, hooked[stage.name], rtol=0, atol=0)
    torch.testing.assert_close(x, expected, rtol=0, atol=0)
    for path in network.backbone.state_dict():
        assert sum(stage.holds(path) for stage in row) == 1, path


@pytest.mark.parametrize("depth", range(4, 14))
def test_a_vits_blocks_are_quarters_of_its_depth(depth):
    row = stage_row({"backbone": tiny_vit(depth=depth)})
    groups = [[path for path in stage.owns if path.startswith("blocks")] for stage in row[1:]]
    assert list(chain(*groups)) == [f"blocks.{k}" for k in range(depth)]
    assert {len(group) for group in groups} <= {depth // 4, -(-depth // 4)}


@pytest.mark.parametrize(
    ("name", "kwargs"), [("vit_tiny", TINY | {"depth": 3}), ("timm/resnet10t", {}), ("timm/test_convnext", {})]
)
def test_a_backbone_without_stages_is_one(name, kwargs):
    row = stage_row({"backbone": build_backbone(BackboneConfig(name, kwargs))})
    assert [stage.name for stage in row] == ["backbone"]


@pytest.mark.parametrize("norm", [False, True])
def test_stages_of_heads(norm):
    row = stage_row(
        {"projector": DINOHead(6, 8, 4, 7, norm=norm), "predictor": mlp([7, 5, 4], last_norm=True)},
        {"projector": "head"},
    )
    assert {stage.name: stage.owns for stage in row} == {
        "projector.fc1": ("mlp.0", "mlp.1", "mlp.2") if norm else ("mlp.0", "mlp.1"),
        "projector.fc2": ("mlp.3", "mlp.4", "mlp.5") if norm else ("mlp.2", "mlp.3"),
        "projector.fc3": ("mlp.6" if norm else "mlp.4", "normalize"),
        "projector.prototypes": ("last_layer",),
        "predictor.fc1": ("0", "1", "2"),
        "predictor.fc2": ("3", "4"),
    }
    assert [stage.output for stage in row][2:] == ["head.normalize", "head", "predictor.2", "predictor"]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("resnet18", {"weights": "DEFAULT"}), ("timm/resnet10t.c3_in1k", {"pretrained": True})],
    ids=["torchvision", "timm"],
)
def test_initial_weights_without_a_network_are_one_sentence(tmp_path, name, kwargs):
    code = f"""
from solo_ext.errors import ConfigError
from solo_ext.networks import BackboneConfig, build_backbone
try:
    build_backbone(BackboneConfig({name!r}, {kwargs!r}))
except ConfigError as error:
    print(error)
"""
    proxy = dict.fromkeys(["https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"], "http://127.0.0.1:9")
    environment = {**os.environ, **proxy, "HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    sentence = f"backbone.kwargs: the initial weights of '{name}' are not here and cannot be fetched: "
    assert done.stdout.splitlines()[-1].startswith(sentence) and not done.returncode, done.stderr


# Of each of timm's families, the smallest.
FAMILIES = Path(__file__).with_name("timm_families.txt").read_text().split()


@pytest.mark.parametrize("model", trials(FAMILIES, 0.05))
def test_a_timm_backbone_has_the_width_that_comes_out(model):
    backbone = build_backbone(BackboneConfig(f"timm/{model}"))
    check_sizes(backbone, model, [backbone.default_cfg["input_size"][-1]])


@pytest.mark.parametrize("model", ["mobilenetv3_small_050", "ghostnet_050", "lcnet_035", "efficientvit_b0"])
def test_a_timm_backbone_with_a_layer_after_its_pooling(model):
    backbone = build_backbone(BackboneConfig(f"timm/{model}"))
    check_sizes(backbone, model, [64])


def test_a_crop_that_a_vit_is_not_built_for_names_the_key_that_helps():
    def advice(sizes, **kwargs):
        vit = build_backbone(BackboneConfig("vit_tiny", {"depth": 1, "img_size": 32, **kwargs}))
        with pytest.raises(ConfigError) as error:
            check_sizes(vit, "x", sizes)
        return re.findall(r"backbone\.kwargs\.(\w+=\w+)", str(error.value))

    assert advice([48]) == ["img_size=48"] and advice([48, 32]) == ["dynamic_img_size=true"]
    for sizes, kwargs in (([48], {"img_size": 48}), ([48, 32], {"dynamic_img_size": True})):
        check_sizes(build_backbone(BackboneConfig("vit_tiny", {"depth": 1, **kwargs})), "x", sizes)
    with pytest.raises(ConfigError, match=r"48 px \(data.augmentations.crop_size=32 suits it\): "):
        check_sizes(build_backbone(BackboneConfig("vit_tiny", {"depth": 1, "img_size": 32})), "x", [48], built=True)


@pytest.mark.parametrize("model", ["mixer_s32_224", "levit_128s", "hiera_tiny_224"])
def test_so_does_one_for_any_network_of_timm_that_is_built_for_a_size(model):
    with pytest.raises(
        ConfigError, match=r"cannot take crops of 96 px \(backbone.kwargs.img_size=96 makes one that can"
    ):
        check_sizes(build_backbone(BackboneConfig(f"timm/{model}")), model, [96])
    backbone = build_backbone(BackboneConfig(f"timm/{model}", {"img_size": 96}))
    check_sizes(backbone, model, [96])
    with pytest.raises(ConfigError, match=r"cannot take crops of 64 px: "):  # nothing makes one for both
        check_sizes(backbone, model, [96, 64])


# solo-learn's.


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("vit_tiny", {}), ("vit_small", {"patch_size": 8, "img_size": 32}), ("vit_base", {"img_size": 32})],
    ids=["vit_tiny", "vit_small", "vit_base"],
)
@pytest.mark.parametrize("method", ["mocov3", "dino"])
def test_vits_are_solo_learns(solo_learn, name, method, kwargs):
    from solo.backbones import vit

    theirs, ours = (
        getattr(vit, name)(method, **kwargs).eval(),
        build_backbone(BackboneConfig(name, kwargs), own=own_backbones(method)).eval(),
    )
    expected = theirs.state_dict()
    assert list(expected) == list(ours.state_dict())
    if method == "mocov3":
        torch.testing.assert_close(ours.pos_embed, theirs.pos_embed, rtol=0, atol=1e-6)
    ours.load_state_dict(expected)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    x = torch.randn(2, 3, *[kwargs.get("img_size", 224)] * 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_dino_head_is_solo_learns(solo_learn, norm, norm_last_layer):
    from solo.methods.dino import DINOHead as SoloHead

    theirs = SoloHead(12, 9, norm, norm_last_layer, hidden_dim=16, bottleneck_dim=6).double()
    ours = DINOHead(12, 16, 6, 9, norm, norm_last_layer).double()
    assert [(n, p.shape, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(8, 12).double()
    for head in (ours, theirs):
        head(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-12)
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name].grad, rtol=1e-9, atol=1e-9, msg=name)


def test_the_stem_may_stand_in_kwargs_which_stay_the_callers():
    kwargs = {"stem": "small"}
    assert BackboneConfig("resnet10_w16", kwargs).stem == "small" and kwargs == {"stem": "small"}
    assert build_backbone(BackboneConfig("resnet10_w16", kwargs)).conv1.kernel_size == (3, 3)
    with pytest.raises(ConfigError, match=r"backbone\.stem must be one of"):
        BackboneConfig("resnet10_w16", {"stem": "tiny"})
    with pytest.raises(ConfigError, match=r"backbone\.kwargs must be a mapping"):
        BackboneConfig("resnet10_w16", 5)


@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize("name", [*BACKBONES, "mocov3", "timm/test_vit", "timm/test_resnet", "timm/test_convnext"])
def test_a_first_layer_for_any_number_of_channels(name, channels):
    method = name if name == "mocov3" else None
    kwargs = TINY if name.startswith("vit") or method else {}
    cfg = BackboneConfig("vit_tiny" if method else name, {**kwargs, **({"depth": 1} if kwargs else {})})
    side = 160 if name == "timm/test_vit" else 32
    for small in (False, True):
        backbone = build_backbone(cfg, small, own_backbones(method) if method else None, channels)
        check_sizes(backbone, name, [kwargs.get("img_size", side)], channels=channels)
        rgb = build_backbone(cfg, small, own_backbones(method) if method else None)
        different = [key for key, x in rgb.state_dict().items() if x.shape != backbone.state_dict()[key].shape]
        assert [key for key in different if rgb.state_dict()[key].shape[1] == 3] == different and len(different) == 1


def test_a_first_layer_starts_as_torchvisions():
    """A Gaussian of variance 2 / fan-out, whatever comes in."""
    backbone = build_backbone(BackboneConfig("resnet50"), channels=13)
    assert backbone.conv1.weight.shape == (64, 13, 7, 7) and backbone.conv1.bias is None
    assert abs(backbone.conv1.weight.std().item() / (2 / (64 * 7 * 7)) ** 0.5 - 1) < 0.02
    assert backbone.conv1.stride == (2, 2) and backbone.conv1.padding == (3, 3)


def test_a_network_of_ones_own_takes_what_it_takes():
    message = r"^backbone\.name: x cannot take crops of 9 px of 4 channels \(data\.channels\): .* to have 3 channels"
    with pytest.raises(ConfigError, match=message):
        check_sizes(build_backbone(BackboneConfig("resnet10_w16")), "x", [9], channels=4)
    own = {"resnet18": lambda: build_backbone(BackboneConfig("resnet18"), channels=5)}
    assert build_backbone(BackboneConfig("resnet18"), own=own, channels=4).conv1.in_channels == 5
