"""A validation sees every image once, whatever the number of processes, for every size and format."""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from solo_ext.data.augmentations import AugmentationConfig
from solo_ext.data.datasets import DataConfig
from solo_ext.data.modules import PretrainData
from solo_ext.evaluation.linear import accuracy_at_k

BATCH, CLASSES = 3, 4
FORMATS = ["image_folder", "tensor", *["h5"] * bool(find_spec("h5py"))]
if find_spec("nvidia") and find_spec("nvidia.dali"):
    FORMATS.append("dali")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(2 * BATCH + 1):
        (folder / str(i % CLASSES)).mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(folder / str(i % CLASSES) / f"{i}.png")
    if "h5" in FORMATS:
        from solo_ext.data.h5 import write_h5

        write_h5(folder, folder / "all.h5")
        shutil.move(folder / "all.h5", folder.with_suffix(".h5"))
    return folder


@pytest.mark.parametrize("size", range(1, 2 * BATCH + 2))
@pytest.mark.parametrize("format", FORMATS)
def test_the_shares_hold_every_image_once(folder, format, size):
    path = folder.with_suffix(".h5") if format == "h5" else folder
    data = DataConfig("custom", train_path=str(path), format=format, num_workers=0)
    module = PretrainData(data, [AugmentationConfig(crop_size=16)], BATCH, 0)
    images = module.train_set.subset(np.arange(size))
    found, figures = [], []
    for processes in (1, 2, 3):
        shares = [list(module._in_order(images, processes, rank)) for rank in range(processes)]
        assert len({tuple(map(len, (targets for *_, targets in share))) for share in shares}) == 1, "they would wait"
        seen, hits, count = [], 0.0, 0
        for _, [view], targets in (batch for share in shares for batch in share):
            counted = targets != -1
            seen += [(round(x.sum().item(), 2), int(t)) for x, t in zip(view[counted], targets[counted], strict=True)]
            # a classifier that is wrong about the darker half
            guesses = torch.nn.functional.one_hot(torch.where(view[:, 0, 0, 0] > -0.6, targets, 0).clamp(0), CLASSES)
            labelled = int(counted.sum())  # as the steps log it
            hits, count = hits + accuracy_at_k(guesses.float(), targets)[0].item() * labelled, count + labelled
        found.append(sorted(seen))
        figures.append(round(hits / count, 3))
        assert len(seen) == len(set(seen)) == size
    assert found[0] == found[1] == found[2] and len({*figures}) == 1


def test_a_batch_without_labels_weighs_nothing():
    from solo_ext.evaluation.linear import LinearModel
    from solo_ext.optim import OptimizerConfig, SchedulerConfig

    class Logged(LinearModel):
        def log_dict(self, logs, **options):
            self.logged = {**logs, **options}

    backbone = torch.nn.Flatten()
    backbone.num_features = 12
    model = Logged(backbone, 3, OptimizerConfig(name="sgd", batch_size=2, lr=0.1), SchedulerConfig())
    images, targets = torch.rand(2, 3, 2, 2), torch.tensor([-1, -1])
    model.validation_step((torch.arange(2), [images], targets), 0)
    assert model.logged["val_loss"] == 0 and model.logged["batch_size"] == 0
    model.validation_step((torch.arange(2), [images], torch.tensor([1, -1])), 0)
    expected = torch.nn.functional.cross_entropy(model(images[:1])["logits"], torch.tensor([1]))
    assert torch.allclose(model.logged["val_loss"], expected) and model.logged["batch_size"] == 1


def test_the_processes_share_a_validation_and_the_probes(folder, monkeypatch):
    data = DataConfig("custom", train_path=str(folder), val_path=str(folder), num_workers=0)
    module = PretrainData(data, [AugmentationConfig(crop_size=16)], BATCH, 0)
    counts, bank = [], []
    for rank in range(2):
        monkeypatch.setattr(PretrainData, "_shard", lambda self, rank=rank: (2, rank))
        loaders = [module.val_dataloader(), *module.probe_dataloaders()]
        counts.append([sum(len(targets) for *_, targets in loader) for loader in loaders])
        bank += [round(x.sum().item(), 2) for _, [view], _ in loaders[1] for x in view]
    assert counts == [[BATCH + 1, BATCH + 1, BATCH + 1], [BATCH + 1, BATCH, BATCH + 1]]
    assert len(set(bank)) == len(module.train_set) == 2 * BATCH + 1
