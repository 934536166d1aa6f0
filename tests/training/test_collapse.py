"""The watch on collapse: what it reads, and what it says."""

import numpy as np
import pytest
import torch
from tiny_runs import config, rows

from solo_ext.errors import CollapseError, ConfigError
from solo_ext.methods.step import Passes, Rank, Step
from solo_ext.runs.run import Run
from solo_ext.training.pretrain import pretrain


def rank(*outputs):
    students = {i: {"projector": x} for i, x in enumerate(outputs)}
    step = Step(0, torch.arange(3), [], torch.zeros(3), Passes((), (), (), (), "projector", ()), students, {})
    return float(Rank()(step)["train_rankme"])


@pytest.mark.parametrize("shape", [(24, 8), (24, 300), (300, 8), (300, 280)])
@pytest.mark.parametrize("apart", [1.0, 0.05, 0.002])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rank_by_hand(shape, apart, dtype):
    """Also of outputs that are nearly equal, as they are in a collapse; of the first view."""
    generator = torch.Generator().manual_seed(1)
    center = torch.randn(shape[1], generator=generator)
    x, other = [(center + apart * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2)]
    singular = np.linalg.svd(x[:256].double().numpy(), compute_uv=False)
    p = singular / singular.sum()
    expected = float(np.exp(-sum(p * np.log(p))))
    assert rank(x, other) == pytest.approx(expected, rel=1e-5)


def test_the_ends_of_the_scale():
    assert rank(torch.eye(8)) == pytest.approx(8)
    assert rank(torch.ones(8, 5)) == pytest.approx(1)
    assert rank(torch.tensor([1.0, -1.0] * 8)[:, None] * torch.ones(16, 64)) == pytest.approx(1)


@pytest.fixture
def fallen(monkeypatch):
    def values(self, step):
        return {"train_rankme": torch.tensor(1.01 if step.number >= 3 else 3.0)}

    monkeypatch.setattr(Rank, "__call__", values)
    monkeypatch.setattr(Rank, "due", lambda self, step: True)


def told(caplog):
    return [r.message for r in caplog.records if "collapsed" in r.message]


def test_a_collapse_is_told_once_and_the_run_goes_on(tmp_path, fallen, caplog):
    cfg = config(tmp_path, max_epochs=4, limit_train_batches=3)
    run = pretrain(cfg)
    [text] = told(caplog)
    start = "the outputs have collapsed by the end of epoch 1: their effective rank (RankMe) is 1.01, "
    assert text.startswith(f"{start}below 1.3; their spread ")
    assert [float(row["train_rankme"]) for row in rows(run.dir) if row["train_rankme"]] == pytest.approx(
        [3.0] + [1.01] * 3
    )

    caplog.clear()
    pretrain(config(tmp_path, max_epochs=5, limit_train_batches=3, resume_from_checkpoint=str(run.dir)))
    assert not told(caplog)


def test_a_collapse_stops_a_run_that_can_be_continued(tmp_path, fallen, caplog):
    cfg = {"max_epochs": 4, "limit_train_batches": 3}
    for epoch in (1, 2):  # the same command goes on, to the end of the next epoch
        with pytest.raises(CollapseError, match=f"epoch {epoch}: .*; collapse=warn goes on"):
            pretrain(config(tmp_path, collapse="stop", **cfg))
        [folder] = (tmp_path / "byol").iterdir()
        assert Run(folder).checkpoints and not Run(folder).finished
    run = pretrain(config(tmp_path, collapse="warn", **cfg))
    assert run.dir == folder and len(told(caplog)) == 1


def test_nobody_looks_where_it_is_off(tmp_path, fallen, caplog):
    run = pretrain(config(tmp_path, max_epochs=2, limit_train_batches=3, collapse=False))  # as YAML reads a bare off
    assert not told(caplog) and "train_rankme" not in rows(run.dir)[0]
    with pytest.raises(ConfigError, match="collapse must be one of warn, stop, off, not 'yes'"):
        config(tmp_path, collapse="yes")
