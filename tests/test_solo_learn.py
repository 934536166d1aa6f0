"""The contract with a real solo-learn checkout (SOLO_LEARN=<path>): keys, losses, gradients, weights, registry."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fit, method_config, random_batches
from PIL import Image

from solo_ext.methods import METHODS, register
from solo_ext.runtime.checkpoint import load_backbone


def pair(solo_learn, method, **changes):
    """solo-learn's method and ours, with the same weights."""
    from solo.methods import METHODS as SOLO

    cfg = method_config(method, **{"optimizer__kwargs": {"momentum": 0.9}, **changes})
    torch.manual_seed(0)
    theirs = SOLO[method](copy.deepcopy(cfg))
    torch.manual_seed(1)
    ours = METHODS[method](copy.deepcopy(cfg))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("method", ["byol", "mocov3"])
def test_keys_and_shapes(solo_learn, method, classifier, backbone):
    theirs, ours = pair(solo_learn, method, momentum__classifier=classifier, backbone__name=backbone)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.parametrize("dataset", ["cifar10", "imagenet100"])
@pytest.mark.parametrize("method", ["byol", "mocov3"])
def test_loss_and_gradients(solo_learn, method, dataset):
    theirs, ours = pair(solo_learn, method, data__dataset=dataset, momentum__classifier=True)
    batch = random_batches(1, size=32)[0]
    theirs.log_dict = lambda *_, **__: None
    loss, expected = ours.training_step(batch, 0), theirs.training_step(batch, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            reference = gradients[name].grad
            assert (p.grad - reference).norm() <= 1e-5 * reference.norm() + 1e-12, name


OPTIMIZERS = [
    ("lars", {"momentum": 0.9, "eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True}),
    ("lars", {"momentum": 0.9, "eta": 0.02, "clip_lr": False, "exclude_bias_n_norm": False}),
    ("sgd", {"momentum": 0.9}),
]


@pytest.mark.parametrize(("optimizer", "kwargs"), OPTIMIZERS, ids=["lars-clip-exclude", "lars", "sgd"])
@pytest.mark.parametrize("method", ["byol", "mocov3"])
def test_weights_and_teacher_after_ten_steps(solo_learn, method, optimizer, kwargs):
    """Optimizer, warm-up cosine schedule and EMA together; float64 so that only formulas can differ."""
    theirs, ours = pair(
        solo_learn, method, optimizer__name=optimizer, optimizer__kwargs=kwargs,
        optimizer__exclude_bias_n_norm_wd=optimizer == "sgd",
    )  # fmt: skip
    batches = [(i, [x.double() for x in views], y) for i, views, y in random_batches(5)]
    for model in (theirs, ours):
        fit(model.double(), batches, max_epochs=2)
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_register_adds_what_is_missing(solo_learn):
    from solo.methods import METHODS as registry

    before = dict(registry)
    try:
        added = register()
        assert {"projector_ema_byol", "res_mocov3", "res_byol", "res_moco"} <= set(added)
        assert all(registry[name] is cls for name, cls in before.items())  # solo-learn's own stay its own
    finally:
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize("method", ["res_mocov3", "projector_ema_byol"])
def test_solo_learns_own_script_trains_our_methods(solo_learn, method, tmp_path):
    """main_pretrain.py with solo-learn's YAML for custom data, on a few images; our kNN reads what it wrote."""
    for folder in ("a", "b"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / folder / f"{i}.png")
    run_script = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    script = f"import sys, runpy, solo_ext; solo_ext.register(); {run_script}"
    overrides = [
        f"method={method}",
        "data.train_path=images",
        "~data.val_path",
        "data.format=image_folder",
        "data.num_workers=0",
        "optimizer.batch_size=8",
        "max_epochs=1",
        "accelerator=cpu",
        "devices='1'",
        "strategy=auto",
        "precision=32",
        "wandb.enabled=False",
        "sync_batchnorm=False",
        "auto_resume.enabled=False",
        "augmentations.0.crop_size=32",
        "augmentations.1.crop_size=32",
        "++method_kwargs.temperature=0.2",
    ]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(solo_learn)])
    yaml = ["--config-path", str(solo_learn / "scripts" / "pretrain" / "custom"), "--config-name", "byol.yaml"]
    command = [sys.executable, "-c", script, str(solo_learn / "main_pretrain.py"), *yaml, *overrides]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    [checkpoint] = (tmp_path / "trained_models" / method).rglob("*.ckpt")
    backbone, run = load_backbone(checkpoint.parent)
    assert run["method"] == method and backbone(torch.randn(2, 3, 32, 32)).shape == (2, 512)
