"""`solo-ext check` on trainings with a fault that their configuration does not show, and on honest ones.

Each run has the schedule of the recipe's 25 epochs and is looked at after `EPOCHS`, as while it trains.
"""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import ROOT
from trials import ALL, trials

from solo_ext.data import loader, render, transforms
from solo_ext.data.views import draw_boxes
from solo_ext.methods import module
from solo_ext.momentum.teacher import Teacher
from solo_ext.optim import build_optimizer, build_scheduler
from solo_ext.runs.reference import Reference, judge
from solo_ext.runs.run import Run, find_runs
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve
from solo_ext.training.pretrain import pretrain

DEMO = ROOT / "scripts" / "pretrain" / "fashion_mnist_mini"
REFERENCES = ROOT / "zoo" / "references" / "fashion_mnist_mini"
EPOCHS = 5


class Until(pl.Callback):
    """Ends a run after some of its epochs."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def verdict(folder, recipe, *overrides, epochs=EPOCHS, callbacks=()):
    own = [f"checkpoint.dir={folder}", "checkpoint.enabled=false", "enable_progress_bar=false", "accelerator=cpu"]
    cfg = resolve(compose(DEMO, recipe, [*own, *overrides]))
    stop = [Until(epochs)] if epochs < cfg.max_epochs else []
    return judge(Run(pretrain(cfg, callbacks=[*stop, *callbacks]).dir), Reference.read(REFERENCES / f"{recipe}.json"))


FAULTS = {}


def fault(*curves):
    """A fault, put into the code by a monkeypatch or into the run by the callback that it returns; `curves`: one of
    these is named first."""

    def register(function):
        FAULTS[function.__name__] = function, curves
        return function

    return register


def batches(change):
    """A callback that changes each batch: (indexes, views, labels)."""

    class Changed(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, i):
            change(batch[1], batch[2])

    return Changed()


@fault("lr")
def doubled_lr(patch):
    patch.setattr(module, "build_optimizer", lambda groups, cfg, lr: build_optimizer(groups, cfg, 2 * lr))


@fault("lr")
def warm_up_of_another_length(patch):
    def build(optimizer, cfg, *rest):
        return build_scheduler(optimizer, dataclasses.replace(cfg, warmup_epochs=4), *rest)

    patch.setattr(module, "build_scheduler", build)


@fault("lr")
def schedule_by_epochs_instead_of_steps(patch):
    def build(optimizer, cfg, *rest):
        scheduler = build_scheduler(optimizer, cfg, *rest)
        return scheduler and {**scheduler, "interval": "epoch"}

    patch.setattr(module, "build_scheduler", build)


@fault("view_brightness", "view_std", "train_contrastive_loss")
def no_jitter(patch):
    patch.setattr(render, "_jitter", lambda x, order, factors: x)


@fault("view_detail", "view_std")
def blurred(patch):
    def blur(views, labels):
        for view in views:
            view.copy_(torch.nn.functional.avg_pool2d(view, 3, 1, 1))

    return batches(blur)


@fault("view_mean", "view_std")
def normalised_as_imagenet(patch):
    def wrong(views, labels):
        for view in views:
            view.mul_(0.353).add_(0.286 - 0.45).div_(0.225)

    return batches(wrong)


@fault("view_mean", "view_detail")
def crops_of_the_whole_image(patch):
    def whole(rrc, *rest):
        return draw_boxes(dataclasses.replace(rrc, crop_min_scale=1.0), *rest)

    patch.setattr(transforms, "draw_boxes", whole)


@fault()
def both_views_alike(patch):
    return batches(lambda views, labels: views[1].copy_(views[0]))


@fault("gap_sim", "gap_sim_feats", "weight_distance", "train_contrastive_loss")
def frozen_teacher(patch):
    patch.setattr(Teacher, "update", lambda self, *_: None)


@fault("gap_sim", "gap_sim_feats", "weight_distance")
def teacher_updated_once_an_epoch(patch):
    update = Teacher.update
    patch.setattr(Teacher, "update", lambda self, step, total: update(self, step, total) if step % 40 == 0 else None)


@fault("1 - tau", "gap_sim", "gap_sim_feats", "weight_distance")
def tau_that_swings_within_epochs(patch):
    """solo-learn's of May 2022: the steps of an epoch were taken for those of the run."""
    update = Teacher.update
    patch.setattr(Teacher, "update", lambda self, step, total: update(self, step % 40, 40))


@fault("1 - tau")
def tau_of_another_base(patch):
    tau = Teacher.tau
    patch.setattr(Teacher, "tau", lambda self, *at: None if (t := tau(self, *at)) is None else 1 - 2 * (1 - t))


@fault("train_class_loss", "train_acc1", "val_acc1")
def shuffled_labels(patch):
    return batches(lambda views, labels: labels.copy_(labels[torch.randperm(len(labels))]))


@fault("steps")
def half_the_data(patch):
    rows = loader.EpochSampler.__iter__
    patch.setattr(loader.EpochSampler, "__iter__", lambda self: iter([*rows(self)][: len(self) // 2]))


@fault("train_contrastive_loss")
def another_temperature(patch):
    loss = module.LightningMethod.criterion

    def criterion(self, step):
        self.kwargs.temperature = 0.5
        return loss(self, step)

    patch.setattr(module.LightningMethod, "criterion", criterion)


@fault()
def loss_times_ten(patch):
    """Which AdamW does not feel, and the logged loss shows."""
    loss = module.LightningMethod.criterion
    patch.setattr(module.LightningMethod, "criterion", lambda self, step: 10 * loss(self, step))


@fault()
def probe_that_trains_the_encoder(patch):
    def leaking(self, step):
        features = [step.students[i]["backbone"] for i in step.passes.probed]
        return self._probe(self.classifier, features, step.labels, "train_", step.metrics)

    patch.setattr(module.LightningMethod, "_probe_term", leaking)


@fault()
def norms_in_eval_mode(patch):
    class Eval(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, i):
            for layer in module.backbone.modules():
                if isinstance(layer, torch.nn.BatchNorm2d):
                    layer.eval()

    return Eval()


@fault()
def frozen_backbone(patch):
    class Frozen(pl.Callback):
        def on_fit_start(self, trainer, module):
            module.backbone.requires_grad_(False)

    return Frozen()


@fault()
def clipped_gradients(patch):
    class Clip(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            torch.nn.utils.clip_grad_value_(module.parameters(), 1e-5)

    return Clip()


@fault()
def no_predictor(patch):
    class Identity(pl.Callback):
        def on_fit_start(self, trainer, module):
            module.predictor.forward = lambda x: x

    return Identity()


@fault("val_acc1", "val_loss")
def validation_labels_of_another_order(patch):
    class Wrong(pl.Callback):
        def on_validation_batch_start(self, trainer, module, batch, i, loader=0):
            batch[2].add_(1).remainder_(10)

    return Wrong()


@pytest.mark.parametrize("name", trials(list(FAULTS)))
def test_a_fault_is_found(tmp_path, monkeypatch, name):
    function, curves = FAULTS[name]
    callback = function(monkeypatch)
    found = verdict(tmp_path, "mocov3", "seed=50", callbacks=[callback] if callback else [])
    assert not found.asked  # by the configuration
    assert found.departures, "nothing departs"
    assert not curves or found.departures[0].curve in curves, found


def test_norms_that_are_not_synchronised_are_found(tmp_path):
    words = ["fashion_mnist_mini/mocov3", "devices=2", "strategy=ddp", "sync_batchnorm=false", "accelerator=cpu"]
    words += ["optimizer.batch_size=62", "callbacks={test_off_track.Until: {epochs: 1}}", f"checkpoint.dir={tmp_path}"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    }
    subprocess.run([sys.executable, "-m", "solo_ext", "pretrain", *words], env=environment, check=True, timeout=300)
    [run] = find_runs(tmp_path)
    found = judge(run, Reference.read(REFERENCES / "mocov3.json"))
    assert found.asked == ["optimizer.batch_size: 125 -> 124"] and found.departures[0].curve == "bn_images"


HONEST = [("mocov3", seed) for seed in range(100, 110)]
HONEST += [(file.stem, 100) for file in sorted(REFERENCES.glob("*.json")) if file.stem != "mocov3"]


@pytest.mark.skipif(not ALL, reason="make test-faults trains to the end")
@pytest.mark.parametrize("recipe, seed", HONEST)
def test_an_honest_run_is_on_track_to_its_end(tmp_path, recipe, seed):
    """So a change that costs accuracy fails here."""
    found = verdict(tmp_path, recipe, f"seed={seed}", epochs=math.inf)
    assert found.on_track, str(found)
