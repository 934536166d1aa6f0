"""The parity certificate: it passes, and what is rendered or drawn otherwise fails it."""

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from certificate import compare as module
from certificate import reference
from certificate.cases import EVERYTHING
from certificate.compare import certify
from certificate.page import Check
from PIL import Image

from solo_ext.cli.main import main
from solo_ext.data import decode, loader, render, transforms, views
from solo_ext.data.augmentations import AugmentationConfig, ColorJitterConfig, ProbConfig, RandomResizedCropConfig
from solo_ext.errors import ConfigError, DataError

SMALL = replace(EVERYTHING, crop_size=32)
HERE = ["image_folder", "tensor", *["h5"] * bool(find_spec("h5py"))]
if find_spec("nvidia") and find_spec("nvidia.dali"):
    HERE.append("dali")


def failed(certificate) -> set[tuple[str, str]]:
    return {(check.part, check.operation) for check in certificate.checks if not check.ok}


@pytest.mark.parametrize("crop_size", [32, 112])
def test_all_formats_are_certified(crop_size):
    certificate = certify([replace(EVERYTHING, crop_size=crop_size)], draws=8)
    assert certificate.ok, failed(certificate)
    rendered = [check for check in certificate.checks if check.part == "rendered"]
    operations = [*module.BOUNDS, "decode"]
    operations.remove("resize")
    assert {(c.format, c.operation) for c in rendered} == {(f, o) for f in HERE for o in operations}
    assert {c.format for c in certificate.checks if c.part == "chain"} == set(HERE)
    assert {c.format for c in certificate.checks if c.part == "decoded"} == set(HERE)
    assert all((c.bound is None) == (c.operation == "decode") for c in certificate.checks)
    assert all(c.value < 1e-4 for c in rendered if c.operation == "decode")


# --- what is not solo-learn's chain has to fail ----------------------------------------------------------


def patched_views(monkeypatch, modules, **changes):
    """`draw_views` of these modules with fields set to something else."""

    def draw(aug, u):
        drawn = views.draw_views(aug, u)
        return drawn._replace(**{name: change(getattr(drawn, name)) for name, change in changes.items()})

    for place in modules:
        monkeypatch.setattr(place, "draw_views", draw)


def contrast_around_128(monkeypatch):
    def blend(operation, x, share, rest):
        if operation != render.CONTRAST:
            return original(operation, x, share, rest)
        return x.mul_(share.view(-1, 1, 1, 1)).add_(128 * rest.view(-1, 1, 1, 1)).clamp_(0, 255)

    original = render._blend
    monkeypatch.setattr(render, "_blend", blend)


def jitter_backwards(monkeypatch):
    monkeypatch.setattr(render, "JITTER_ORDERS", render.JITTER_ORDERS[:, ::-1])


def blur_doubled(monkeypatch):
    taps = render._blur_taps
    monkeypatch.setattr(render, "_blur_taps", lambda sigma: taps(np.minimum(2 * sigma, 2.0)))


def hue_backwards(monkeypatch):
    hue = render._hue
    monkeypatch.setattr(render, "_hue", lambda x, shift: hue(x, -shift))


def crop_off_by_one(monkeypatch):
    boxes = transforms.draw_boxes

    def draw(rrc, widths, heights, u):
        moved = np.add(boxes(rrc, widths, heights, u), [1, 0, 0, 0])
        return np.minimum(moved, np.stack([widths - moved[:, 2], heights, widths, heights], axis=1))

    monkeypatch.setattr(transforms, "draw_boxes", draw)


def epoch_ignored(monkeypatch):
    numbers = loader.uniforms
    monkeypatch.setattr(loader, "uniforms", lambda seed, epochs, *rest: numbers(seed, 0 * epochs, *rest))


@pytest.mark.parametrize(
    "fault, operation",
    [
        (blur_doubled, "blur"),
        (hue_backwards, "hue"),
        (contrast_around_128, "contrast"),
        (jitter_backwards, "jitter"),
        (crop_off_by_one, "crop"),
        (epoch_ignored, "crop"),
        (lambda m: patched_views(m, [transforms], flip=np.zeros_like), "flip"),
        (lambda m: patched_views(m, [transforms], gray=np.zeros_like), "grayscale"),
        (lambda m: patched_views(m, [transforms], factors=lambda f: f * [1.02, 1, 1, 1]), "brightness"),
        (lambda m: m.setattr(render, "LUMA", (1 / 3,) * 3), "grayscale"),
        (lambda m: m.setattr(render, "equalize", lambda x: x), "equalize"),
    ],
)
def test_a_wrong_renderer_fails(monkeypatch, fault, operation):
    fault(monkeypatch)
    monkeypatch.setattr(module, "PARAMETERS", 300)  # not what is tested here
    certificate = certify([SMALL], formats=["tensor"], draws=16)
    assert ("rendered", operation) in failed(certificate)
    assert not certificate.ok and str(certificate).count("FAILED") >= 2


def test_a_decoder_that_clips_fails(monkeypatch):
    monkeypatch.setattr(decode, "to_rgb", lambda image, how: image.convert("RGB"))
    monkeypatch.setattr(module, "PARAMETERS", 300)
    certificate = certify([SMALL], formats=["image_folder"], draws=1)
    kinds = {operation for part, operation in failed(certificate) if part == "decoded"}
    assert kinds == {"16-bit gray .png", "16-bit gray .tif", "float gray .tif"}


@pytest.mark.parametrize(
    "fault, parameter",
    [
        (lambda m: m.setattr(views, "CROP_RATIO", (0.6, 1 / 0.6)), "crop's width / height, 32 x 32 px"),
        (lambda m: m.setattr(views, "BLUR_RADIUS", (0.1, 2.4)), "gaussian_blur: radius"),
        (lambda m: patched_views(m, [module], flip=np.zeros_like), "horizontal_flip: whether"),
        (lambda m: patched_views(m, [module], order=lambda order: np.minimum(order, 3)), "color_jitter: order"),
        (lambda m: patched_views(m, [module], factors=lambda f: f * 1.03), "brightness: factor"),
    ],
)
def test_a_wrong_distribution_fails(monkeypatch, fault, parameter):
    fault(monkeypatch)
    assert ("drawn", parameter) in failed(certify([SMALL], formats=["tensor"], draws=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"solarize": np.ones_like},
        {"blur": np.zeros_like},
        {"gray": np.ones_like},
        {"factors": lambda factors: np.add(factors, [0.4, 0, 0, 0])},
    ],
)
def test_the_whole_chain_fails_where_the_parts_cannot(monkeypatch, changes):
    """The same fault in what is rendered and in its yardstick."""
    patched_views(monkeypatch, [transforms, reference], **changes)
    monkeypatch.setattr(module, "PARAMETERS", 300)
    found = failed(certify([SMALL], formats=["tensor"], draws=32))
    assert "chain" in {part for part, _ in found}


# --- what it is asked for --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Images of three sizes, one of them gray."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(40, 50), (60, 40), (40, 50)]):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size)
        (coarse.convert("L") if i == 2 else coarse).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def test_images_of_any_sizes(folder):
    aug = AugmentationConfig(
        rrc=RandomResizedCropConfig(enabled=False),
        color_jitter=ColorJitterConfig(0.5, 0.4, 0.0, 0.0, 0.0),
        horizontal_flip=ProbConfig(0.5),
        crop_size=24,
    )
    certificate = certify([aug, replace(aug, num_crops=6), replace(aug, crop_size=20)], str(folder), draws=4)
    assert len({check.images for check in certificate.checks}) == 2  # the second is the first
    # tensor needs one size, and says so
    assert [reason.split(" ")[0] for reason in certificate.left_out] == ["tensor"] * 2
    operations = {check.operation for check in certificate.checks if check.part == "rendered"}
    assert operations == {"resize", "brightness", "jitter", "flip", "all"}
    assert "crop's left" not in str(certificate)
    with pytest.raises(DataError, match=r"^data\.format: 'tensor' needs images of one size"):
        certify([aug], str(folder), ["tensor"])


def test_what_cannot_be_certified(folder):
    with pytest.raises(ConfigError, match=r"^--formats must be one of .*, not 'tensr'; did you mean 'tensor'"):
        certify([SMALL], formats=["tensr"])
    with pytest.raises(ConfigError, match=r"^--device: there is no device 'cuda:99' here; use cpu$"):
        certify([SMALL], device="cuda:99")
    with pytest.raises(DataError, match=r"^--images: there is no folder"):
        certify([SMALL], images=str(folder / "nowhere"))


def test_without_a_checkout_it_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("solo_ext.cli.data.__file__", str(tmp_path / "solo_ext" / "cli" / "data.py"))
    assert main(["data", "certify"]) == 2
    assert capsys.readouterr().err.startswith("solo-ext: error: data certify needs a checkout of solo-ext")


def test_values_are_held_against_their_bounds():
    assert (
        Check("", "rendered", "", "", "bias", -0.5, 0.5).ok and not Check("", "rendered", "", "", "bias", -0.6, 0.5).ok
    )
    assert Check("", "drawn", "", "", "p", 1e-3, 1e-4).ok and not Check("", "drawn", "", "", "p", 1e-5, 1e-4).ok
    assert Check("", "rendered", "", "", "difference", 9.0).ok
    assert not Check("", "chain", "", "", "p", float("nan"), 1e-4).ok


def test_the_command(tmp_path, monkeypatch, capsys, folder):
    out = tmp_path / "certificate.json"
    words = ["scripts/pretrain/cifar10/simclr.yaml", "--formats", "tensor", "--draws", "4", "--json", str(out)]
    assert main(["data", "certify", *words]) == 0
    page, record = capsys.readouterr().out, json.loads(out.read_text())
    assert record["ok"] and record["environment"]["cpu"] and "| brightness" in page
    assert page.rstrip().endswith("values are inside their bounds.") and "Certified: " in page
    assert all(check["ok"] and isinstance(check["value"], float) for check in record["checks"])
    hue_backwards(monkeypatch)
    with pytest.raises(SystemExit) as exit:
        main(["data", "certify", *words])
    assert exit.value.code == 1 and not json.loads(out.read_text())["ok"]
    assert main(["data", "certify", "--draws", "0"]) == 2
    assert main(["data", "certify", "no.yml"]) == 2
    assert main(["data", "certify", "--images", str(folder / "0.png")]) == 2
