"""Every registered method through the real commands, from its recipes: pre-training, resuming, linear, kNN."""

import math

import pytest
import torch
from frameworks import METHODS_TESTED, framework_of

from solo_ext.methods import METHODS
from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.runs.run import Run
from solo_ext.training import recipes
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.evaluate import knn, linear
from solo_ext.training.pretrain import pretrain

DATASET = "fashion_mnist_mini"
TINY = [  # two epochs of two steps
    *("accelerator=cpu", "enable_progress_bar=False", "max_epochs=2", "data.fraction=0.01", "optimizer.batch_size=24"),
    *("auto_resume.enabled=False", "limit_val_batches=1"),
]


def config(kind, method, *overrides):
    """Its recipe, or its framework's with its name, for the bundled images or else for others; a linear evaluation may
    be BYOL's."""
    root = recipes.scripts() / kind
    folders = sorted((folder for folder in root.glob("[!_]*")), key=lambda folder: folder.name != DATASET)
    candidates = [method, framework_of(method), *(["byol"] if kind == "linear" else [])]
    places = [(folder, name) for folder in folders for name in candidates if name in recipes.names(folder)]
    assert places, f"there is no recipe for {framework_of(method)} in {root}: add scripts/{kind}/<dataset>/<name>.yaml"
    folder, name = places[0]
    own = f"{'method' if kind == 'pretrain' else 'pretrain_method'}={method}"
    images = [f"data.dataset={DATASET}", "backbone.name=resnet10_w16"]
    cfg = compose(folder, f"{name}.yaml", [*TINY, own, *images, *overrides])
    for view in cfg.get("augmentations", ()):
        view.crop_size = min(view.crop_size, 28)
    return resolve(cfg, kind)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS_TESTED)
def test_trains_stops_resumes_and_is_evaluated(method, tmp_path):
    folder = f"checkpoint.dir={tmp_path}"
    options = [folder, "checkpoint.keep_prev=True", "knn_eval.enabled=False", "method_kwargs.proj_hidden_dim=64"]
    run = pretrain(config("pretrain", method, *options))
    assert run.metrics["tau"] >= 0.95 if METHODS[method].teacher_stages != "none" else "tau" not in run.metrics
    assert math.isfinite(run.metrics["train_loss"]) and 0 <= run.metrics["val_acc1"] <= 100
    last, first = Run(run.dir).checkpoints
    whole = load_checkpoint(last)
    assert whole["global_step"] == 4
    last.unlink()  # as if it had been stopped after the first epoch

    resumed = pretrain(config("pretrain", method, *options, f"resume_from_checkpoint={run.dir}"))
    again = load_checkpoint(resumed.checkpoint)
    assert resumed.dir == run.dir and again["global_step"] == 4
    for name, value in whole["state_dict"].items():
        assert torch.equal(again["state_dict"][name], value), name
    before = load_checkpoint(first)["state_dict"]
    assert not torch.equal(before["backbone.conv1.weight"], whole["state_dict"]["backbone.conv1.weight"])

    encoder = {"pretrained_feature_extractor": str(run.dir), "accelerator": "cpu"}
    data = {"dataset": "fashion_mnist_mini", "fraction": 0.02}
    neighbours = knn(resolve({**encoder, "data": data, "knn_eval": {"k": [1, 5]}}, "knn"))
    source = f"pretrained_feature_extractor={run.dir}"
    probe = linear(config("linear", method, folder, source, "cache_features=True"))
    for score in (*(row["acc1"] for row in neighbours), probe.metrics["val_acc1"]):
        assert 10 < score <= 100  # chance is 10
