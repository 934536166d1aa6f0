"""Which format reads what, the resident one, and images that cannot be read."""

import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from solo_ext.data import decode, loader, modules
from solo_ext.data.augmentations import AugmentationConfig
from solo_ext.data.datasets import DataConfig
from solo_ext.data.images import ArrayImages, FileImages
from solo_ext.data.loader import Skipped
from solo_ext.data.modules import PretrainData
from solo_ext.errors import ConfigError, DataError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COUNT = 12


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of six images of 20 x 16 px."""
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), np.uint8)
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def data(folder: Path, kind: str, batch_size=4, **options) -> PretrainData:
    config = DataConfig("custom", train_path=str(folder), format=kind, num_workers=0, **options)
    return PretrainData(config, [AugmentationConfig(crop_size=8, num_crops=2)], batch_size, seed=5)


def batches_of(kind, folder, **options) -> list:
    return list(data(folder, kind, **options).train_dataloader())


@pytest.fixture
def fresh():
    """Forgets what has been found out about this machine's libraries, before and after a test."""
    for found in (modules._without_dali, decode.jpeg_decoder):
        found.cache_clear()
    yield
    for found in (modules._without_dali, decode.jpeg_decoder):
        found.cache_clear()


ARRAYS, FILES = ArrayImages(np.zeros((2, 4, 4), np.uint8)), FileImages(Path(), np.array([b"a.png"]))


@pytest.mark.parametrize(
    "asked, images, device, dali, picked",
    [
        ("auto", ARRAYS, CPU, True, "tensor"),
        ("auto", ARRAYS, CUDA, True, "tensor"),
        ("auto", FILES, CPU, True, "image_folder"),  # where it is the faster one: see benchmarks/data.py
        ("auto", FILES, CUDA, True, "dali"),
        ("auto", FILES, CUDA, False, "image_folder"),
        ("image_folder", ARRAYS, CUDA, True, "image_folder"),
        ("dali", FILES, CPU, True, "dali"),
        ("tensor", FILES, CPU, False, "tensor"),
    ],
)
def test_auto_takes_the_fastest_that_works(monkeypatch, asked, images, device, dali, picked):
    monkeypatch.setattr(modules, "_without_dali", lambda: "" if dali else "is not there")
    assert modules.pick_format(DataConfig("custom", format=asked), images, device) == picked


@pytest.mark.parametrize("cuda, extra", [("12.8", "dali"), ("13.0", "dali-cuda13"), (None, "dali")])
def test_dali_not_installed_names_the_extra_of_torchs_cuda(fresh, monkeypatch, folder, cuda, extra):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    message = rf"needs NVIDIA DALI, which is not installed; pip install 'solo-ext\[{extra}\]', or use image_folder$"
    with pytest.raises(ConfigError, match=message):
        data(folder, "dali").check()


def test_a_broken_dali_is_left_out_and_named(fresh, monkeypatch, caplog):
    def broken(name):
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(modules, "find_spec", lambda name: name)
    monkeypatch.setattr(modules, "import_module", broken)
    for _ in range(2):
        assert modules.pick_format(DataConfig("custom", format="auto"), FILES, CUDA) == "image_folder"
    assert [r.getMessage() for r in caplog.records] == [
        "NVIDIA DALI is installed, but cannot be used here: libcuda.so.1: cannot open shared object file"
    ]
    with pytest.raises(ConfigError, match=r"DALI, which cannot be used here \(libcuda.*\); pip install .*, or use "):
        modules.pick_format(DataConfig("custom", format="dali"), FILES, CUDA)


def test_without_torchvisions_decoder_pillow_reads_jpeg_and_it_is_said_once(fresh, monkeypatch, caplog):
    Image.new("RGB", (16, 8), (200, 30, 40)).save(file := io.BytesIO(), "JPEG", quality=95)
    fast = decode.decode(file.getvalue())
    decode.jpeg_decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    for _ in range(2):
        slow = decode.decode(file.getvalue())
        assert slow.shape == fast.shape and (slow.int() - fast.int()).abs().max() <= 1
    assert len(caplog.records) == 1 and "torchvision does not decode JPEG here" in caplog.text


@pytest.mark.parametrize("kind, dataset", [("dali", "fashion_mnist_mini"), ("h5", "fashion_mnist_mini")])
def test_a_format_that_cannot_read_the_set_is_refused(kind, dataset):
    with pytest.raises(ConfigError, match=f"'{kind}' does not read images in memory, .*one of tensor, image_folder"):
        PretrainData(DataConfig(dataset, format=kind), [AugmentationConfig(crop_size=8)], 4, 5).check()


# The resident set.


def test_auto_keeps_small_images_of_one_size(folder, tmp_path, caplog):
    def picked(path, **changes):
        module = data(path, "auto", **changes)
        module.setup()
        return module.format

    caplog.set_level("INFO", "solo_ext")
    assert picked(folder) == "tensor" and "auto takes tensor, all images in memory (" in caplog.text
    for name, size in (("large", (97, 20)), ("mixed", (20, 21))):
        images = tmp_path / name
        images.mkdir()
        for i in range(9):
            Image.new("RGB", (20, 20) if i < 8 else size).save(images / f"{i}.jpg")
        assert picked(images) == "image_folder"


def test_auto_keeps_what_fits(folder, monkeypatch):
    images = data(folder, "auto").train_set.images
    size = images.small_size
    needed = len(images) * 3 * size[0] * size[1]
    assert loader.kept_by_itself(images, CPU) == needed
    monkeypatch.setattr(loader, "LIMIT", needed - 1)
    assert loader.kept_by_itself(images, CPU) == 0


def test_the_size_is_that_of_the_decoded_image(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (8, 5)).save(tmp_path / "a.jpg", exif=exif)
    np.save(tmp_path / "b.npy", np.zeros((4, 7, 3), np.uint8))
    for name in ("a.jpg", "b.npy"):
        content = (tmp_path / name).read_bytes()
        for how in (decode.DecodeConfig(), decode.DecodeConfig(orientation="exif")):
            assert decode.size_of(content, how) == decode.decode(content, how).shape[1:]


def test_a_folder_of_equal_images_can_be_resident(folder):
    files, on_device = batches_of("image_folder", folder), batches_of("tensor", folder)
    for one, other in zip(files, on_device, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
        for a, b in zip(one[1], other[1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2 / 255 / 0.22)


def test_the_loaders_of_a_run_share_one_copy(folder):
    module = data(folder, "tensor", val_path=str(folder))
    train = module.train_dataloader()
    bank, val = module.probe_dataloaders()
    assert train.pixels.data_ptr() == bank.pixels.data_ptr() != val.pixels.data_ptr()


def test_images_of_other_sizes_cannot(folder):
    Image.new("RGB", (21, 16)).save(folder / "a" / "06.png")
    with pytest.raises(
        DataError, match=r"needs images of one size, .* 20 x 16 px \(image 0\) and 21 x 16 px \(image 3\)"
    ):
        batches_of("tensor", folder)


def test_nor_can_more_than_the_memory_holds(monkeypatch, folder):
    monkeypatch.setattr(loader, "SHARE", 1e-9)
    with pytest.raises(
        DataError, match=r"would take 0\.0 GiB of the [\d.]+ GiB that are free on cpu; use image_folder$"
    ):
        batches_of("tensor", folder)


# Images that cannot be read.


def spoil(path: Path, damage: str) -> Path:
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"no\nimage", "empty": b""}[damage])
    return path


def test_batches_rendered_together_are_those_rendered_alone(monkeypatch, folder):
    def loaders():
        module = data(folder, "tensor", batch_size=5, val_path=str(folder))
        return module.train_dataloader(), module.probe_dataloaders()[0]  # whose last batch is not full

    together = loaders()
    monkeypatch.setattr(loader, "CHUNK", 1)
    for many, one in zip(together, loaders(), strict=True):
        assert many.together >= 3 and one.together == 1
        for (indexes, views, targets), (indexes_, views_, targets_) in zip(many, one, strict=True):
            assert torch.equal(indexes, indexes_) and torch.equal(targets, targets_)
            for view, view_ in zip(views, views_, strict=True):
                torch.testing.assert_close(view, view_, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["image_folder", "tensor", "dali"])
def test_crops_that_grow_are_those_of_a_loader_of_that_size(folder, kind):
    """4 px in epoch 0, 6 in epochs 1 and 2, then 8; evaluations see the last size from the start."""
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    config = DataConfig("custom", train_path=str(folder), val_path=str(folder), format=kind, num_workers=0)

    def module(size, **more):
        return PretrainData(config, [AugmentationConfig(crop_size=size, num_crops=2, **more)], 4, seed=5)

    growing = module(8, progressive=[[1, 4], [3, 6]])
    train = growing.train_dataloader()
    for epoch, size in enumerate([4, 6, 6, 8, 8]):
        fixed = module(size).train_dataloader()
        for batches in (train, fixed):
            batches.sampler.set_epoch(epoch)
        for (indexes, views, _), (indexes_, views_, _) in zip(train, fixed, strict=True):
            assert torch.equal(indexes, indexes_) and views[0].shape[2:] == (size, size)
            assert all(map(torch.equal, views, views_))
    assert next(iter(growing.probe_dataloaders()[0]))[1][0].shape[2:] == (8, 8)


@pytest.mark.parametrize("kind", ["image_folder", "tensor"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_error_names_the_file(folder, kind, damage):
    path = spoil(folder / "a" / "04.png", damage)
    with pytest.raises(DataError) as error:
        batches_of(kind, folder)
    assert str(error.value).startswith(f"{path}: not a readable image (") and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["image_folder", "tensor"])
def test_skip_takes_the_next_image_and_counts(folder, kind, caplog):
    bad = [spoil(folder / "a" / "04.png", "truncated"), spoil(folder / "a" / "06.png", "text")]  # indexes 2 and 3
    module = data(folder, kind, corrupt="skip", corrupt_limit=0.2)
    loader = module.train_dataloader()
    with caplog.at_level(logging.WARNING, "solo_ext"):
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            seen = [
                (i, t)
                for indexes, _, targets in loader
                for i, t in zip(indexes.tolist(), targets.tolist(), strict=True)
            ]
            # in the places of 2 and 3 stands 4
            assert sorted(i for i, _ in seen) == [0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 10, 11]
            assert all(module.train_set.targets[i] == target for i, target in seen)
    assert sorted(record.message.split(": ", 1)[1].split(": not")[0] for record in caplog.records) == sorted(
        map(str, bad)
    )


def test_more_than_the_limit_is_an_error():
    skipped = Skipped(200, "skip", 0.01)
    skipped.add([(7, "seven"), (7, "seven"), (8, "eight")])
    with pytest.raises(
        DataError, match=r"^data\.corrupt_limit: 3 of 200 images cannot be read, more than 0\.01 .*: nine$"
    ):
        skipped.add([(7, "seven"), (9, "nine")])


def test_a_set_without_a_readable_image_ends(folder):
    for path in folder.rglob("*.png"):
        spoil(path, "empty")
    with pytest.raises(DataError, match=f"none of {COUNT} images can be read; the last: "):
        batches_of("image_folder", folder, corrupt="skip", corrupt_limit=1.0)


@pytest.mark.parametrize("kind", ["image_folder", "h5", "tensor", "dali"])
def test_any_number_of_processes_goes_on_inside_an_epoch(folder, tmp_path, kind):
    """Two processes begin, three and one go on, each after a batch: the samples and views of one, to the bit."""
    if kind in ("h5", "dali"):
        pytest.importorskip({"h5": "h5py", "dali": "nvidia.dali"}[kind])
    if kind == "h5":
        from solo_ext.data.h5 import write_h5

        write_h5(folder, folder := tmp_path / "images.h5")

    def joint(processes: int, epoch: int, start: int) -> list[tuple]:
        """The batches of all, joined in their order, from number `start` of the epoch on."""
        ranks = []
        for rank in range(processes):
            set_ = data(folder, kind, batch_size=6 // processes)
            set_.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
            loader = set_.train_dataloader()
            loader.load_state_dict({"epoch": epoch, "batches": start})
            loader.sampler.set_epoch(epoch)
            ranks.append([(rows, torch.stack(views, 1)) for rows, views, _ in loader])
        return [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*ranks, strict=True)]

    whole = [*joint(1, 0, 0), *joint(1, 1, 0)]
    parts = [*joint(2, 0, 0)[:1], *joint(3, 0, 1), *joint(3, 1, 0)[:1], *joint(1, 1, 1)]
    assert len(whole) == len(parts) == 4 and len({*whole[0][0].tolist(), *whole[1][0].tolist()}) == COUNT
    for mine, theirs in zip(parts, whole, strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
