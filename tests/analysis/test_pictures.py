"""Pictures of what encoders see: the numbers behind them, and files."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import whole  # noqa: F401, a fixture

from solo_ext.analysis import pictures
from solo_ext.cli.main import main
from solo_ext.data.datasets import MINI
from solo_ext.networks import BackboneConfig
from solo_ext.networks.backbones import build_backbone
from solo_ext.runs.checkpoints import open_checkpoint

pytest.importorskip("pytorch_grad_cam")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("images")
    with np.load(MINI) as arrays:
        for i, pixels in enumerate(arrays["test_images"][:6]):
            Image.fromarray(pixels).save(place / f"{i}.png")
    return place


@pytest.fixture
def rows(monkeypatch):
    """What is drawn."""
    drawn = []
    original = pictures._figure
    monkeypatch.setattr(pictures, "_figure", lambda given: (drawn.extend(given), original(given))[1])
    return drawn


def test_maps_of_features(whole, folder, tmp_path, rows):  # noqa: F811
    words = ["pictures", str(whole.dir), str(whole.dir), "--images", str(folder), "--kind", "features", "--count", "3"]
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        out = tmp_path / f"maps{suffix}"
        assert main([*words, "--out", str(out)]) == 0
        assert out.read_bytes().startswith(start)
    first, *maps = rows[: 1 + 2 * pictures.MAPS]
    assert len(first[1]) == 3 and first[1][0].shape == (12, 12, 3) and 0 <= first[1][0].min() <= first[1][0].max() <= 1
    encoder = pictures._seen("", open_checkpoint(whole.dir), pictures.read_images(str(folder), ""), False)
    backbone = encoder.backbone
    x = backbone.layer1(backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(encoder.inputs[:3])))))
    spread = x.flatten(2).std(2)
    for n, (label, shown) in enumerate(maps[: pictures.MAPS]):
        assert label == (f"byol · {whole.dir.name}" if n == 0 else "")
        for i, picture in enumerate(shown):
            channel = spread[i].argsort(descending=True)[n]
            assert picture == pytest.approx(x[i, channel].detach().numpy(), abs=1e-5)


def test_gradcam_is_its_formula(whole, monkeypatch):  # noqa: F811
    """Selvaraju et al., 2017: the last maps, weighted by the gradient's mean, where positive, from 0 to 1."""
    import pytorch_grad_cam.utils.image as drawing

    heats = []
    monkeypatch.setattr(drawing, "show_cam_on_image", lambda image, heat, use_rgb: heats.append(heat) or image)
    source = open_checkpoint(whole.dir)
    backbone = pictures.load_encoder(source)[0]
    images = torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    pictures._gradcam(pictures.Seen("", source, backbone, images, [*images.numpy()]))
    maps = []
    backbone.layer4.register_forward_hook(lambda module, args, out: maps.append(out))
    logits = pictures._classifier(source, "")(backbone(images))
    [gradient] = torch.autograd.grad(logits.amax(1).sum(), maps)
    formula = (gradient.mean((2, 3), keepdim=True) * maps[0]).sum(1).relu().detach()
    assert formula.shape[1:] == (3, 3) and sum(heat.max() > 0 for heat in heats) >= 3
    for heat, expected in zip(heats, formula, strict=True):
        middle = torch.from_numpy(heat)[8::16, 8::16]  # of each place of the map, which is drawn 16 px wide
        if expected.max() > 0:
            assert np.corrcoef(middle.flatten(), expected.flatten())[0, 1] > 0.98


def test_the_command_draws_gradcam(whole, folder, tmp_path, rows):  # noqa: F811
    words = ["pictures", str(whole.dir), "--images", str(folder), "--kind", "gradcam", "--out", str(tmp_path / "c.png")]
    assert main(words) == 0
    assert [picture.shape for picture in rows[1][1]] == [(12, 12, 3)] * 6


def test_the_nearest_neighbour_of_an_image_is_itself(whole, folder, tmp_path, rows):  # noqa: F811
    words = ["--images", str(folder), "--kind", "neighbours", "--bank", str(folder), "--out", str(tmp_path / "n.png")]
    assert main(["pictures", str(whole.dir), *words]) == 0
    with np.load(MINI) as arrays:
        for ours, pixels in zip(rows[1][1], arrays["test_images"], strict=False):
            assert ours[..., 0] * 255 == pytest.approx(pixels, abs=0.5)
    assert len(rows) == 1 + pictures.NEAREST


def test_the_stages_of_a_vit_have_maps():
    vit = build_backbone(BackboneConfig("vit_tiny", {"img_size": 32, "patch_size": 8, "depth": 4}))
    kept = []
    hook = pictures._stage(vit, "block4").register_forward_hook(lambda module, args, out: kept.append(out))
    vit(torch.randn(2, 3, 32, 32))
    hook.remove()
    assert pictures._as_maps(kept[0]).shape == (2, vit.num_features, 4, 4)
    assert torch.equal(pictures._as_maps(kept[0])[:, :, 1, 2], kept[0][:, 1 + 4 + 2])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--out", "a.jpg"], "must end in .png or .pdf"),
        (["--images", "nowhere"], "there is no folder 'nowhere'"),
        (["--kind", "neighbours"], "--bank: missing"),
        (["--kind", "maps"], "invalid choice: 'maps'"),
        (["--count", "0"], "--count must be at least 1"),
    ],
)
def test_mistakes(whole, folder, tmp_path, changes, said, capsys):  # noqa: F811
    words = [
        "pictures",
        str(whole.dir),
        "--images",
        str(folder),
        "--kind",
        "features",
        "--out",
        str(tmp_path / "a.png"),
    ]
    assert main([*words, *changes]) == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
