"""Format `dali` on the CPU, with DALI itself, against image_folder: the same samples, boxes, views and complaints."""

import gc
import io
import logging
import os
import signal
import threading
import time
import weakref
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import SequentialSampler

from solo_ext.cli.main import main
from solo_ext.data.augmentations import AugmentationConfig, ColorJitterConfig, ProbConfig, RandomResizedCropConfig
from solo_ext.data.datasets import DataConfig
from solo_ext.data.images import ImageSet, read_folder
from solo_ext.data.loader import EpochSampler, Skipped, ViewDataset, ViewLoader
from solo_ext.data.modules import ClassificationData, PretrainData
from solo_ext.data.transforms import Transform
from solo_ext.errors import DataError

pytest.importorskip("nvidia.dali")
from nvidia.dali import Pipeline

from solo_ext.data.dali import DaliLoader

LEVELS = (0.0, 0.0, 0.0), (1 / 255,) * 3  # mean and std that leave values from 0 to 255
ALWAYS, WHOLE = ProbConfig(1.0), RandomResizedCropConfig(enabled=False)
TINY = [Transform.random(AugmentationConfig(crop_size=8), *LEVELS)]
CPU = torch.device("cpu")


def photo(number: int, width: int, height: int) -> Image.Image:
    """A part of one of scikit-learn's two photographs, China and a flower."""
    return Image.fromarray(load_sample_images().images[number % 2]).crop((7 * number, 0, 7 * number + width, height))


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three classes of eight photographs of other sizes, some of them in files of other kinds."""
    root = tmp_path_factory.mktemp("photos")
    turned = Image.Exif()
    turned[0x112] = 6  # orientation
    odd = {
        1: {"exif": turned},
        3: {"progressive": True},
        6: {"subsampling": 0},
    }
    for i in range(24):
        path = root / "abc"[i // 8] / f"{i:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        image = photo(i, 120 + 11 * i, 101 + 37 * (i % 5))
        if i in (10, 13):
            image = image.convert({10: "L", 13: "CMYK"}[i])
        path.write_bytes(jpeg(image, **odd.get(i, {})))
    photo(16, 120, 90).convert("RGBA").save(root / "c" / "16.png")
    (root / "c" / "16.jpg").unlink()
    return root


@pytest.fixture(scope="module")
def images(photos) -> ImageSet:
    return read_folder(photos, "data.train_path")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten small photographs."""
    (tmp_path / "images").mkdir()
    for i in range(10):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(jpeg(photo(i, 40 + i, 32)))
    return tmp_path / "images"


def dali(images: ImageSet, transforms=TINY, sampler=None, batch_size=4, drop_last=False, seed=5, threads=2, **options):
    sampler = sampler or SequentialSampler(images)
    skipped = Skipped(len(images), **options)
    shared = {"skipped": skipped, "sampler": sampler, "batch_size": batch_size, "drop_last": drop_last}
    return DaliLoader(ViewDataset(images, transforms, seed), CPU, threads=threads, **shared)


def folder_loader(images: ImageSet, transforms=TINY, sampler=None, batch_size=4, drop_last=False, **options):
    sampler = sampler or SequentialSampler(images)
    dataset, skipped = ViewDataset(images, transforms, 5), Skipped(len(images), **options)
    return ViewLoader(dataset, CPU, skipped=skipped, sampler=sampler, batch_size=batch_size, drop_last=drop_last)


def same(some, others) -> bool:
    """Whether two lists of batches are the same bits."""
    return len(some) == len(others) and all(
        torch.equal(a, b)
        for one, other in zip(some, others, strict=True)
        for a, b in zip([one[0], *one[1], one[2]], [other[0], *other[1], other[2]], strict=True)
    )


def differences(images: ImageSet, transforms: list[Transform]) -> list[torch.Tensor]:
    """Absolute differences from image_folder's views, of each transform, [N, 3, size, size]."""
    parts = []
    for ours, theirs in zip(dali(images, transforms), folder_loader(images, transforms), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[2], theirs[2])
        parts.append([(a - b).abs() for a, b in zip(ours[1], theirs[1], strict=True)])
    return [torch.cat(views) for views in zip(*parts, strict=True)]


# --- pixels ----------------------------------------------------------------------------------------------

# Largest difference inside and mean, in levels of 255. DALI does not round and clip between the two passes of a resize;
# of pixels beyond the edge it takes the outermost one, where Pillow leaves them out.
CROPS = {
    "bicubic": (Transform.random(AugmentationConfig(crop_size=64), *LEVELS), 10, 0.25),
    "bilinear": (Transform.random(AugmentationConfig(crop_size=64), *LEVELS, "bilinear"), 2, 0.25),
    "enlarged": (Transform.random(AugmentationConfig(crop_size=224), *LEVELS), 10, 0.25),
    "whole": (Transform.random(AugmentationConfig(rrc=WHOLE, crop_size=64), *LEVELS), 10, 0.25),
    "centre": (Transform(64, 73, *LEVELS), 1, 0.25),
    "centre, odd": (Transform(63, 90, *LEVELS), 1, 0.25),
    "squeezed": (Transform(50, None, *LEVELS), 2, 0.25),
}


@pytest.mark.parametrize("name", CROPS)
def test_crops_are_image_folders(images, name):
    transform, most, mean = CROPS[name]
    [off] = differences(images, [transform])
    assert off[..., 8:-8, 8:-8].max() <= most and off.max() <= 40 and off.mean() <= mean


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 7), (640, 3), (3, 640), (31, 33)])
def test_boxes_are_image_folders_whatever_the_size(tmp_path, size):
    """Noise, in which a box that is off by a pixel shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    for i in range(6):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    for off in differences(read_folder(tmp_path, "k"), [CROPS["bilinear"][0], CROPS["centre"][0]]):
        assert off[..., 4:-4, 4:-4].max() <= 3 and off.mean() < 2


JITTER = ColorJitterConfig(1.0, 0.4, 0.4, 0.4, 0.2)
OPERATIONS = {  # and the mean difference from image_folder's
    "brightness": ({"color_jitter": ColorJitterConfig(1.0, 0.4)}, 0.25),
    "contrast": ({"color_jitter": ColorJitterConfig(1.0, 0.0, 0.4)}, 0.25),
    "saturation": ({"color_jitter": ColorJitterConfig(1.0, 0.0, 0.0, 0.4)}, 0.25),
    "hue": ({"color_jitter": ColorJitterConfig(1.0, 0.0, 0.0, 0.0, 0.2)}, 0.25),
    "gray": ({"grayscale": ALWAYS}, 0.25),
    "blur": ({"gaussian_blur": ALWAYS}, 0.25),
    "solarize": ({"solarization": ALWAYS}, 0.25),
    "flip": ({"horizontal_flip": ALWAYS}, 0.25),
    "all of these": (
        {
            "color_jitter": JITTER,
            "grayscale": ProbConfig(0.2),
            "gaussian_blur": ALWAYS,
            "solarization": ALWAYS,
            "horizontal_flip": ALWAYS,
        },
        0.25,
    ),
    "equalize": ({"equalization": ALWAYS}, 3.0),  # makes many levels of a few
}


def test_every_operation_is_image_folders(images):
    transforms = [
        Transform.random(AugmentationConfig(crop_size=48, **parts), *LEVELS) for parts, _ in OPERATIONS.values()
    ]
    for (name, (_, bound)), off in zip(OPERATIONS.items(), differences(images, transforms), strict=True):
        assert off.mean() <= bound, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_makes_the_same_views(images):
    transforms = [transform for transform, *_ in CROPS.values()]
    dataset, sampler = ViewDataset(images, transforms, 5), SequentialSampler(images)
    skipped = Skipped(len(images))
    cuda = DaliLoader(dataset, torch.device("cuda"), skipped=skipped, threads=2, sampler=sampler, batch_size=4)
    for ours, theirs in zip(cuda, folder_loader(images, transforms), strict=True):
        assert all(tensor.is_cuda for tensor in (ours[0], *ours[1], ours[2]))
        assert torch.equal(ours[0].cpu(), theirs[0]) and torch.equal(ours[2].cpu(), theirs[2])
        for a, b in zip(ours[1], theirs[1], strict=True):
            assert (a.cpu() - b).abs().mean() < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_not_waited_for(images):
    dataset = ViewDataset(images, [CROPS["bicubic"][0]], 5)
    skipped, sampler = Skipped(len(images)), EpochSampler(len(images), 5)
    loader = DaliLoader(dataset, torch.device("cuda"), skipped=skipped, threads=2, sampler=sampler, batch_size=4)
    whole = list(loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = list(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(again, whole)


# --- samples, order, resume ------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_cover_an_epoch_once(images, world_size):
    for epoch in (0, 3):
        seen = []
        for rank in range(world_size):
            sampler = EpochSampler(len(images), 5, world_size, rank)
            sampler.set_epoch(epoch)
            found = torch.cat([indexes for indexes, _, _ in dali(images, sampler=sampler)]).tolist()
            assert found == [index for _, index in sampler]
            seen += found
        assert sorted(seen) == list(range(24))


@pytest.mark.parametrize(
    "batch_size, drop_last, sizes", [(5, False, [5] * 4 + [4]), (5, True, [5] * 4), (12, True, [12] * 2)]
)
def test_the_last_batch(images, batch_size, drop_last, sizes):
    loader = dali(images, batch_size=batch_size, drop_last=drop_last)
    for _ in range(2):  # a loader is iterated again and again
        batches = list(loader)
        assert [len(indexes) for indexes, _, _ in batches] == sizes and len(loader) == len(sizes)
        for indexes, [view], targets in batches:
            assert indexes.dtype == targets.dtype == torch.int64 and view.dtype == torch.float32
            assert view.shape == (len(indexes), 3, 8, 8) and view.is_contiguous()
            assert torch.equal(targets, torch.from_numpy(images.targets)[indexes])


def shuffled(images: ImageSet, epoch: int, seed: int = 5, threads: int = 2):
    loader = dali(images, TINY * 2, EpochSampler(len(images), seed), batch_size=5, seed=seed, threads=threads)
    loader.sampler.set_epoch(epoch)
    return loader


def test_views_depend_on_seed_and_epoch_only(images):
    torch.manual_seed(1)
    before, cores = torch.get_rng_state(), torch.get_num_threads()
    first = list(shuffled(images, 3))
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == cores
    assert not torch.equal(*first[0][1])
    assert all(same(first, list(shuffled(images, 3, threads=n))) for n in (1, 3, 9))
    assert not same(first, list(shuffled(images, 2))) and not same(first, list(shuffled(images, 3, seed=6)))


@pytest.mark.parametrize("epoch, batches", [(0, 1), (2, 3), (2, 5)])
def test_a_resumed_pass_is_the_rest_of_the_whole_one(images, epoch, batches):
    whole = list(shuffled(images, epoch))
    stopped = shuffled(images, epoch)
    for _ in zip(range(batches), stopped, strict=False):  # more are in the making
        state = stopped.state_dict()
    assert state == {"epoch": epoch, "batches": batches}
    resumed = shuffled(images, epoch)
    resumed.load_state_dict(state)
    assert same(list(resumed), whole[batches:])
    assert same(list(resumed), whole)  # the pass after it starts at the beginning


def test_a_pass_that_was_left_early_disturbs_no_other(images):
    whole, loader = list(shuffled(images, 1)), shuffled(images, 1)
    left = iter(loader)
    first = next(left)
    assert same(list(loader), whole) and same([first, *left], whole)
    for ours, theirs in zip(loader, shuffled(images, 1), strict=True):  # two at once
        assert same([ours], [theirs])


def test_a_loader_that_is_dropped_is_gone(images):
    before = set(threading.enumerate())  # those of other tests may end at any time
    loader = shuffled(images, 0)
    passing = iter(loader)
    next(passing)
    own = set(threading.enumerate()) - before
    assert own
    gone = weakref.ref(loader)
    del loader, passing
    for _ in range(100):
        gc.collect()
        if gone() is None and not any(thread.is_alive() for thread in own):
            break
        threading.Event().wait(0.05)
    assert gone() is None and not any(thread.is_alive() for thread in own)


def test_a_pipeline_is_kept_for_training_only(images):
    """Each has a GPU's memory: one of validation, whole or left early, gives it back."""

    def pipelines(loader: DaliLoader) -> list[Pipeline]:
        loader._renderer.submit(gc.collect).result()  # after what the pass has left to its thread
        return [found for found in gc.get_objects() if type(found) is Pipeline and found not in before]

    gc.collect()
    before = [found for found in gc.get_objects() if type(found) is Pipeline]
    training, validation = shuffled(images, 0), dali(images)
    list(training)
    assert len(pipelines(training)) == 1
    whole = list(validation)
    assert len(pipelines(validation)) == 1
    left = iter(validation)
    next(left)
    assert len(pipelines(validation)) == 2
    left.close()
    assert pipelines(validation) == [training._pipeline]
    assert same(list(validation), whole)


def test_a_forked_process_destroys_no_pipeline(images):
    """Its threads are the parent's: destroying it would wait for them for ever."""
    gc.collect()
    gc.disable()
    try:
        loader = shuffled(images, 0)
        list(loader)
        garbage = [loader._pipeline]  # as a training leaves it until it is collected
        garbage.append(garbage)
        loader._pipeline = None
        del garbage
        child = os.fork()
        if not child:
            gc.collect()
            os._exit(0)
    finally:
        gc.enable()
    for _ in range(200):
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


# --- images that cannot be read --------------------------------------------------------------------------


def spoil(path: Path, damage: str) -> None:
    whole = path.read_bytes()
    scan, size = whole.index(b"\xff\xda") + 60, whole.index(b"\xff\xc0") + 5
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "no end": whole[:-2],
            "empty": b"",
            "text": b"no\nimage",
            "bomb": whole[:size] + b"\xff\xff\xff\xff" + whole[size + 4 :],
            "marker in a scan": whole[:scan] + b"\xff\x3d" + whole[scan + 2 :],
            "table": whole.replace(
                b"\xff\xc4", b"\xff\xc4\x00\x1f\x00" + b"\xff" * 16, 1
            ),  # DALI fails, and says not where
            "gone": b"",
            "CMYK": jpeg(Image.open(io.BytesIO(whole)).convert("CMYK")),
            "trailing": whole + bytes(100),
            "palette": jpeg(Image.open(io.BytesIO(whole)).convert("L")),
            "smaller": jpeg(Image.open(io.BytesIO(whole)).resize((9, 9))),
        }[damage]
    )
    if damage == "gone":
        path.unlink()


BAD = ["truncated", "no end", "empty", "text", "bomb", "marker in a scan", "table", "gone"]


@pytest.mark.parametrize("damage", BAD)
def test_error_names_the_file_as_image_folder_does(folder, damage):
    images = read_folder(folder, "k")
    spoil(folder / "6.jpg", damage)
    messages = []
    for loader in (dali(images), folder_loader(images)):
        with pytest.raises(DataError) as error:
            list(loader)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{folder / '6.jpg'}: not a readable image (") and "\n" not in messages[0]


def test_skip_takes_the_next_readable_image(folder, caplog):
    images = read_folder(folder, "k")
    for i, damage in {1: "truncated", 2: "gone", 5: "table", 9: "text"}.items():
        spoil(folder / f"{i}.jpg", damage)
    loader = dali(images, policy="skip", limit=0.4)
    with caplog.at_level(logging.WARNING, "solo_ext"):
        passes = [list(loader), list(loader)]
    assert torch.cat([indexes for indexes, _, _ in passes[0]]).tolist() == [0, 3, 3, 3, 4, 6, 6, 7, 8, 0]
    assert same(*passes) and len(loader.skipped.seen) == len(caplog.messages) == 4  # each is counted and told once
    for ours, theirs in zip(passes[0], folder_loader(images, policy="skip", limit=0.4), strict=True):
        assert torch.equal(ours[0], theirs[0]) and (ours[1][0] - theirs[1][0]).abs().mean() < 0.5
    with pytest.raises(DataError, match=r"^data.corrupt_limit: 3 of 10 images cannot be read, more than 0.2 of them"):
        list(dali(images, policy="skip", limit=0.2))


@pytest.mark.parametrize("damage", [*BAD, "smaller"])
def test_a_file_that_goes_bad_later_is_replaced_too(folder, damage):
    """Which DALI is the first to see, as it is not looked into again."""
    images = read_folder(folder, "k")
    loader = dali(images, policy="skip", limit=0.2)
    whole = list(loader)
    spoil(folder / "6.jpg", damage)
    passes, expected = [list(loader) for _ in range(2)], list(folder_loader(images, policy="skip", limit=0.2))
    found = [torch.cat([indexes for indexes, _, _ in batches]).tolist() for batches in (*passes, expected)]
    seen = 6 if damage in ("smaller", "marker in a scan") else 7  # DALI decodes up to the marker
    assert found[0] == found[1] == [0, 1, 2, 3, 4, 5, seen, 7, 8, 9] and same(*passes)
    assert damage == "marker in a scan" or found[2] == found[0]
    assert all(same([ours], [before]) for ours, before in zip(passes[0][::2], whole[::2], strict=True))
    assert [*loader.skipped.seen] == [6] * (seen == 7)


def test_an_image_that_dali_cannot_decode_ends_one_pipeline(folder):
    spoil(folder / "6.jpg", "table")
    images = read_folder(folder, "k")
    loader = dali(images, sampler=EpochSampler(len(images), 5), policy="skip", limit=0.2)
    list(loader)
    pipeline = loader._pipeline
    list(loader)
    assert loader._pipeline is pipeline


@pytest.mark.parametrize("h5", [False, True])
def test_python_looks_into_a_jpeg_once(photos, tmp_path, monkeypatch, h5):
    """DALI reads it, but from HDF5, which only Python can; of the rest, here a CMYK and a PNG file, Pillow sees all."""
    images = read_folder(photos, "k")
    if h5:
        pytest.importorskip("h5py")
        from solo_ext.data.h5 import read_h5, write_h5

        write_h5(photos, tmp_path / "photos.h5")
        images = read_h5(tmp_path / "photos.h5", "k")
    whole, looked, read = list(dali(images)), [], type(images.images).read
    monkeypatch.setattr(type(images.images), "read", lambda files, i: looked.append(i) or read(files, i))
    assert same(list(dali(images)), whole)  # in other loaders of the run, too
    assert sorted(looked) == (list(range(24)) if h5 else [13, 16])


@pytest.mark.parametrize("oddity", ["CMYK", "trailing", "palette"])
def test_odd_images_are_read(folder, oddity):
    spoil(folder / "6.jpg", oddity)
    [off] = differences(read_folder(folder, "k"), [Transform(24, 27, *LEVELS)])
    assert off.max() <= 1


# --- runs ------------------------------------------------------------------------------------------------


def config(path: Path, **options) -> DataConfig:
    return DataConfig("custom", train_path=str(path), format="dali", num_workers=2, **options)


@pytest.mark.parametrize("h5", [False, True])
def test_large_and_small_crops_of_a_data_module(photos, tmp_path, h5):
    path = photos
    if h5:
        pytest.importorskip("h5py")
        from solo_ext.data.h5 import write_h5

        path = tmp_path / "photos.h5"
        write_h5(photos, path)
    augmentations = [AugmentationConfig(crop_size=32, num_crops=2), AugmentationConfig(crop_size=16, num_crops=3)]
    module = PretrainData(config(path, val_path=str(path)), augmentations, 7, 5)
    loader = module.train_dataloader()
    assert isinstance(loader, DaliLoader)
    for indexes, views, targets in loader:
        assert [tuple(view.shape) for view in views] == [(7, 3, 32, 32)] * 2 + [(7, 3, 16, 16)] * 3
        assert torch.equal(targets, indexes // 8)
    bank, val = module.probe_dataloaders()
    assert torch.cat([targets for _, _, targets in bank]).tolist() == [i // 8 for i in range(24)]
    assert same(list(bank), list(val))


def test_a_folder_without_classes_is_unlabelled(folder):
    module = PretrainData(config(folder), [AugmentationConfig(crop_size=8)], 5, 5)
    assert torch.cat([targets for _, _, targets in module.train_dataloader()]).tolist() == [-1] * 10


@pytest.mark.parametrize("augment", [True, False])
def test_classification_is_image_folders(photos, augment):
    def module(kind):
        data = config(photos, val_path=str(photos), augmentations={"crop_size": 48})
        data.format = kind
        return ClassificationData(data, 5, 5, augment=augment)

    for name in ("train_dataloader", "val_dataloader"):
        ours, theirs = (list(getattr(module(kind), name)()) for kind in ("dali", "image_folder"))
        assert len(ours) == len(theirs) == (4 if augment and name == "train_dataloader" else 5)
        for (a, [x], s), (b, [y], t) in zip(ours, theirs, strict=True):
            assert torch.equal(a, b) and torch.equal(s, t)
            assert (x - y).abs().mean() < 0.25 / 255 / 0.224


def test_overfit_batches_repeats_the_first_ones(photos):
    class Recorder(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(1, 1), []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch[0].tolist())
            return self.layer(torch.ones(1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    off = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer, model = pl.Trainer(max_epochs=2, accelerator="cpu", overfit_batches=2, **off), Recorder()
    trainer.fit(model, datamodule=PretrainData(config(photos), [AugmentationConfig(crop_size=8)], 4, 5))
    assert model.seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert trainer.train_dataloader.threads == 2


def test_a_run(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "scripts" / "pretrain" / "custom" / "res_byol.yaml"
    words = [f"data.train_path={photos}", "data.format=dali", "data.num_workers=2", "backbone.name=resnet10_w16"]
    words += ["optimizer.batch_size=8", "max_epochs=1", "limit_train_batches=2", "accelerator=cpu", "precision=32"]
    words += ["method_kwargs.proj_hidden_dim=16", "method_kwargs.proj_output_dim=8", "method_kwargs.pred_hidden_dim=16"]
    assert main(["pretrain", str(recipe), *words, "enable_progress_bar=false"]) in (None, 0)
    assert list((tmp_path / "trained_models").rglob("*.ckpt"))
