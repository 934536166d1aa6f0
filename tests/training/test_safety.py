"""Checkpoints at the right moments, and an end where the loss or a weight is not finite."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import config
from torch import nn

from solo_ext.errors import NonFiniteError
from solo_ext.methods import METHODS
from solo_ext.runs.checkpoints import find_checkpoint, load_checkpoint
from solo_ext.runs.run import RECORDS
from solo_ext.training.pretrain import pretrain
from solo_ext.training.resume import ExactResume
from solo_ext.training.safety import check_finite


@pytest.mark.parametrize("frequency", [1, 2, 3, 4])
@pytest.mark.parametrize("keep_prev", [False, True])
def test_the_last_epoch_is_always_saved(tmp_path, frequency, keep_prev):
    options = {
        "checkpoint__frequency": frequency,
        "checkpoint__keep_prev": keep_prev,
        "limit_train_batches": 1,
    }
    result = pretrain(config(tmp_path, max_epochs=4, limit_val_batches=0, **options))
    expected = sorted({*range(0, 4, frequency), 3})[0 if keep_prev else -2 :]
    saved = sorted(path.name for path in result.dir.glob("*.ckpt"))
    assert saved == [f"tiny-{result.dir.name}-ep={n}.ckpt" for n in expected]
    assert list(json.loads((result.dir / RECORDS).read_text())) == saved


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_a_finite_checkpoint(tmp_path, monkeypatch):
    original = METHODS["byol"].training_step

    def training_step(self, batch, i):
        return original(self, batch, i) * (math.nan if self.global_step == 4 else 1)

    monkeypatch.setattr(METHODS["byol"], "training_step", training_step)
    with pytest.raises(NonFiniteError, match="became NaN or infinite at step 4 "):
        pretrain(config(tmp_path))
    [folder] = (tmp_path / "byol").iterdir()
    state = load_checkpoint(find_checkpoint(folder))["state_dict"]
    assert all(x.isfinite().all() for x in state.values()) and "ep=0" in find_checkpoint(folder).name


def test_weights_that_are_not_finite_are_not_saved():
    module = nn.Linear(2, 2)
    check_finite(module, 1)
    with torch.no_grad():
        module.weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"after 7 steps 1 of 2 tensors .*first: weight"):
        check_finite(module, 7)


def test_what_a_network_draws_follows_from_seed_epoch_batch_and_rank():
    def drawn(seed=1, epoch=2, batch=3, rank=0):
        trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        ExactResume(seed).on_train_batch_start(trainer, None, None, batch)
        return torch.rand(()).item(), np.random.rand(), random.random()

    others = [drawn(seed=2), drawn(epoch=3), drawn(batch=4), drawn(rank=1)]
    assert drawn() == drawn() and len({drawn(), *others}) == 5
