"""What a YAML that is silent about a key means: solo-learn's defaults, or those of its recipes, as facts."""

import pytest
from conftest import METHODS, value_at
from frameworks import FRAMEWORKS
from omegaconf import OmegaConf

from solo_ext.training.config import resolve

HEADS = {"proj_output_dim": 256}
KWARGS = {  # solo-learn's code where it has a default, else its CIFAR recipes
    "byol": HEADS | {"proj_hidden_dim": 4096, "pred_hidden_dim": 4096, "proj_last_norm": False},
    "dino": HEADS
    | {"proj_hidden_dim": 2048, "num_prototypes": 65536, "use_bn_in_head": False, "norm_last_layer": True}
    | {"clip_grad": 0.0, "freeze_last_layer": 1, "student_temperature": 0.1, "teacher_temperature": 0.07}
    | {"warmup_teacher_temperature": 0.04, "warmup_teacher_temperature_epochs": 0},
    "mocov2plus": HEADS | {"proj_hidden_dim": 2048, "queue_size": 65536, "temperature": 0.2},
    "mocov3": HEADS | {"proj_hidden_dim": 4096, "pred_hidden_dim": 4096, "temperature": 0.2},
    "ressl": HEADS
    | {"proj_hidden_dim": 4096, "queue_size": 65536, "temperature_q": 0.1, "temperature_k": 0.04, "weak_probe": True},
    "simclr": HEADS | {"proj_hidden_dim": 2048, "temperature": 0.2, "negatives": "both"},
    "simsiam": {"proj_hidden_dim": 2048, "proj_output_dim": 2048, "pred_hidden_dim": 512},
}
COMMON = {
    "momentum.base_tau": 0.99,
    "momentum.final_tau": 1.0,
    "momentum.schedule": "cosine",
    "momentum.classifier": False,
    "momentum.inter": True,
    "optimizer.classifier_lr": 0.1,
    "optimizer.weight_decay": 0.0,
    "optimizer.exclude_bias_n_norm_wd": False,
    "optimizer.kwargs": {},
    "scheduler.name": "warmup_cosine",
    "scheduler.min_lr": 0.0,
    "scheduler.warmup_start_lr": 3e-5,
    "scheduler.warmup_epochs": 10.0,
    "scheduler.interval": "step",
    "knn_eval.enabled": False,
    "knn_eval.k": 20,
    "knn_eval.distance_func": "euclidean",
    "checkpoint.enabled": False,
    "checkpoint.dir": "trained_models",
    "checkpoint.frequency": 1,
    "checkpoint.keep_prev": False,
    "auto_resume.enabled": False,
    "wandb.enabled": False,
    "precision": "32-true",
    "seed": 5,
}


def resolved(**changes):
    silent = {
        "name": "silent",
        "backbone": {"name": "resnet18"},
        "data": {"dataset": "fashion_mnist_mini"},
        "optimizer": {"name": "sgd", "batch_size": 256, "lr": 0.1},
        "max_epochs": 1,
        "augmentations": [{"crop_size": 28, "num_crops": 2}],
        "method_kwargs": {},
    }
    return resolve(OmegaConf.merge(silent, changes), changes.pop("kind", "pretrain"))


@pytest.mark.parametrize("method", FRAMEWORKS)
def test_silent_configurations_of_a_pre_training(method):
    cfg = resolved(method=method)
    expected = COMMON | {f"method_kwargs.{key}": value for key, value in KWARGS[method].items()}
    assert {key: value_at(cfg, key) for key in expected} == expected
    others = {f for f in METHODS[method].Kwargs.__dataclass_fields__ if f not in KWARGS[method]}
    assert others == {"loss_scale"}, "a default that nothing holds"


def test_silent_configurations_of_a_knn_evaluation():
    cfg = resolve(OmegaConf.create({"name": "silent", "data": {"dataset": "fashion_mnist_mini"}}), "knn")
    assert value_at(cfg, "knn_eval") == {"k": [1, 20], "distance_func": ["cosine", "euclidean"], "T": [0.07]}
