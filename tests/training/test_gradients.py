"""The gradient monitor, against `torch.autograd.grad` of the same loss with respect to the same activations."""

import copy
import csv
import math
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from conftest import random_batches, tiny_config
from lightning.pytorch.plugins.precision import MixedPrecision
from omegaconf import OmegaConf

from solo_ext.errors import ConfigError
from solo_ext.methods import METHODS
from solo_ext.runs.metrics import read_table
from solo_ext.training.callbacks.gradients import GradientMonitor, GradientsConfig
from solo_ext.training.config import resolve
from solo_ext.training.loggers import CSVMetrics
from solo_ext.training.pretrain import pretrain

BLOCKS = ["conv1", "block1", "block2", "block3", "block4", "projector"]


class Scaled(MixedPrecision):
    """16-bit precision's loss scale without its rounding."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

    def forward_context(self):
        return nullcontext()


def build(method: str, **changes):
    torch.manual_seed(0)
    return METHODS[method](tiny_config(method, **changes)).double()


def double(batches):
    return [(indexes, [view.double() for view in views], targets) for indexes, views, targets in batches]


def watched(model, batches, folder, every=1, views="first", **trainer) -> dict[int, dict[str, float]]:
    """{step: {column without its prefix: value}} of a training on `batches`."""
    logger = CSVMetrics(folder)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=logger,
        callbacks=[GradientMonitor(GradientsConfig(every=every, views=views))],
        **quiet,
        **trainer,
    ).fit(model, loader)
    found = {}
    for row in read_table(logger.path)[1]:
        norms = {k.removeprefix("grad_linf/"): float(v) for k, v in row.items() if k.startswith("grad_linf/") and v}
        found |= {int(row["step"]): norms} if norms else {}
    return found


def expected(model, batch, views="first") -> dict[str, float]:
    """By hand: the outputs of a resnet's layers and of the heads on the views, then the loss's gradient there."""
    model, outputs = copy.deepcopy(model).train(), {}
    backbone = model.backbone
    places = {"conv1": backbone.maxpool, "projector": model.projector}
    places |= {f"block{i}": getattr(backbone, f"layer{i}") for i in (1, 2, 3, 4)}
    places |= {"predictor": model.predictor} if hasattr(model, "predictor") else {}
    for name, module in places.items():
        module.register_forward_hook(lambda m, i, out, name=name: outputs.setdefault(name, []).append(out))
    model.log = model.log_dict = lambda *_, **__: None
    loss = model.training_step(batch, 0)
    kept = {name: outs[:1] if views == "first" else outs for name, outs in outputs.items()}
    return {
        name: max(gradient.abs().max().item() for gradient in torch.autograd.grad(loss, outs, retain_graph=True))
        for name, outs in kept.items()
    }


@pytest.mark.parametrize(
    "method, changes",
    [("byol", {}), ("res_mocov3", {}), ("projector_ema_byol", {"data__num_classes": 0}), ("simclr", {})],
)
@pytest.mark.parametrize("views", ["first", "all"])
def test_norms_equal_autograd(method, changes, views, tmp_path):
    """Of the last block at its map, before the average over places."""
    model, batches = build(method, **changes), double(random_batches(1))
    by_hand = expected(model, batches[0], views)
    assert watched(model, batches, tmp_path, views=views) == {0: pytest.approx(by_hand, rel=1e-9)}
    assert set(by_hand) == {*BLOCKS, *(["predictor"] if hasattr(model, "predictor") else [])}


def test_loss_scale_is_taken_out(tmp_path):
    batches = double(random_batches(2))
    plain = watched(build("byol"), batches, tmp_path)
    scaled = watched(build("byol"), batches, tmp_path, plugins=[Scaled()])
    assert list(plain) == list(scaled) == [0, 1]
    for step in plain:
        assert scaled[step] == pytest.approx(plain[step], rel=1e-6)


def test_accumulation_looks_at_the_first_batch_of_each_step_and_is_not_divided_by(tmp_path):
    batches = double(random_batches(4))
    found = watched(build("byol"), batches, tmp_path, accumulate_grad_batches=2)
    assert list(found) == [0, 1]
    assert found[0] == pytest.approx(watched(build("byol"), batches[:1], tmp_path)[0], rel=1e-9)


def test_every_few_steps_and_training_is_left_alone(tmp_path):
    batches = double(random_batches(5))
    watched_model, model = build("byol"), build("byol")
    assert list(watched(watched_model, batches, tmp_path, every=2, log_every_n_steps=3)) == [0, 2, 4]
    assert watched(model, batches, tmp_path, every=100)[0]
    for ours, theirs in zip(watched_model.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def run_config(folder, **gradients):
    view = {"horizontal_flip": {"prob": 0.5}, "crop_size": 12, "num_crops": 2}
    return resolve(
        OmegaConf.create(
            {
                "method": "byol",
                "method_kwargs": {"proj_hidden_dim": 8, "proj_output_dim": 4, "pred_hidden_dim": 8},
                "backbone": {"name": "resnet10_w16"},
                "data": {"dataset": "fashion_mnist_mini", "fraction": 0.01, "num_workers": 0},
                "augmentations": [view],
                "optimizer": {"name": "sgd", "batch_size": 25, "lr": 0.1},
                "gradients": gradients,
                "checkpoint": {"enabled": False, "dir": str(folder)},
                "max_epochs": 1,
                "limit_val_batches": 0,
                "accelerator": "cpu",
                "enable_progress_bar": False,
            }
        )
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_writes_them_to_its_metrics(enabled, tmp_path):
    folder = pretrain(run_config(tmp_path, enabled=enabled, every=1)).dir
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [f"grad_linf/{name}" for name in (*BLOCKS, "predictor")] if enabled else []
    assert [name for name in rows[0] if name.startswith("grad_linf/")] == columns
    for column in columns:
        assert all(0 < float(row[column]) < math.inf for row in rows) and len(rows) == 2


def test_a_wrong_interval_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"gradients\.every must be a whole number of at least 1, not 0"):
        run_config(tmp_path, every=0)
