"""Linear and kNN evaluation of a run."""

import json

import pytest
import torch
from tiny_runs import config, names

from solo_ext.errors import ConfigError
from solo_ext.runs.checkpoints import load_checkpoint
from solo_ext.runs.encoder import load_encoder
from solo_ext.training.config import resolve
from solo_ext.training.evaluate import knn, linear
from solo_ext.training.pretrain import pretrain


@pytest.mark.parametrize("cached", [False, True])
def test_linear_evaluation_of_a_run(whole, tmp_path, cached):
    options = {
        "pretrained_feature_extractor": str(whole.dir),
        "cache_features": cached,
        "scheduler__name": "none",
    }
    result = linear(config(tmp_path, "linear", max_epochs=2, **options))
    assert result.dir.parent == tmp_path / "linear" and "args.json" in names(result.dir)
    written = json.loads((whole.dir / "linear.json").read_text())
    assert written["acc1"] == result.metrics["val_acc1"] and written["protocol"]["augmented"] is not cached
    assert written["protocol"]["checkpoint"] == whole.checkpoint.name and written["epochs"] == 2
    backbone = load_encoder(whole.dir)[0].state_dict()
    if not cached:  # the encoder, its batch statistics included, has not moved
        after = load_checkpoint(result.checkpoint)["state_dict"]
        assert all(torch.equal(after[f"backbone.{k}"], x) for k, x in backbone.items())


def test_the_untrained_encoder_is_the_one_that_the_pretraining_started_from(tmp_path):
    cfg = config(tmp_path, optimizer__lr=0.0, scheduler__name="none", limit_train_batches=1, max_epochs=1)
    pretrained = pretrain(cfg)
    start = load_checkpoint(pretrained.checkpoint)["state_dict"]
    cfg = config(tmp_path, "linear", untrained=True, max_epochs=1)
    after = load_checkpoint(linear(cfg).checkpoint)["state_dict"]
    weights = [name for name in after if name.startswith("backbone.") and name.endswith("weight")]
    assert weights and all(torch.equal(after[name], start[name]) for name in weights)


def test_knn_evaluation_of_a_run(whole, capsys):
    raw = {
        "pretrained_feature_extractor": str(whole.dir),
        "data": {"dataset": "fashion_mnist_mini", "fraction": 0.01},
    }
    results = knn(resolve({**raw, "accelerator": "cpu", "knn_eval": {"k": [1, 20]}}, "knn"))
    assert json.loads((whole.dir / "knn.json").read_text())["results"] == results
    assert {(r["distance"], r["k"]) for r in results} >= {("cosine", 1), ("cosine", 20)}
    assert all(0 <= r["acc1"] <= r["acc5"] <= 100 for r in results) and "acc@1" in capsys.readouterr().out


def test_without_an_encoder_there_is_nothing_to_evaluate(tmp_path):
    with pytest.raises(ConfigError, match="pretrained_feature_extractor is missing"):
        linear(config(tmp_path, "linear"))
