"""Every key of a command is read by it, or refused, or said to be unused; it is watched while the commands run."""

import dataclasses
import sys
from pathlib import Path

import pytest

from solo_ext.cli.main import main
from solo_ext.errors import ConfigError
from solo_ext.schema import Config
from solo_ext.training.compose import compose
from solo_ext.training.config import UNREAD, resolve, run_values
from solo_ext.training.evaluate import knn, linear
from solo_ext.training.pretrain import pretrain
from solo_ext.training.recipes import find

TINY = (
    "data.fraction=0.03",
    "max_epochs=2",
    "enable_progress_bar=false",
    "data.format=image_folder",
    "scheduler.warmup_epochs=0",
)
STEPS = ("scheduler.name=warmup_step", "scheduler.warmup_steps=1", "scheduler.lr_decay_steps=[1]")
ALL_ON = (
    "filters.enabled=true",
    "intra.weight=0.5",
    "gradients.enabled=true",
    "val_gap.enabled=true",
    "val_gap.per_class=true",
    "tensorboard.enabled=true",
    "momentum.classifier=true",
)
OTHERS = ("scheduler.name=step", "scheduler.lr_decay_steps=[1]", "intra.weight=0.5", "intra.distance=ce")
COPIES = ("schema.py", "dataclasses.py", "copy.py")  # reading there is no use
SEVERAL = {"collective_timeout"}  # read by runs of several processes
ELSEWHERE = {  # read by runs that are not made here
    *("data.train_path", "data.val_path", "data.download"),  # the bundled images have none
    *("wandb.entity", "wandb.project", "wandb.offline"),  # tests/training/test_loggers.py
    *(
        "data.num_classes",
        "data.num_large_crops",
        "data.num_small_crops",
        "data.info",
        "gap.place",
        "data.content",
    ),  # derived, for solo-learn's code
    *("pretrain_method", "backbone"),  # of a checkpoint without args.json
    "check.reference",  # tests/training/test_inputs.py
    *("auto_resume.max_hours", "optimizer.joint_batch"),  # where a run is continued
    "recipe",  # an evaluation finds out by itself which was taken
    "auto_augment",  # its one value is what is done
    *("checkpoint.enabled", "checkpoint.dir"),  # `linear`'s, which `run_values` gives to all
    *("encoder", "branch"),  # records of what is evaluated
    "name",  # a label
}


@pytest.fixture
def read(monkeypatch):
    """The full keys that are read from now on, beside the copies and the sections' own checks."""
    found = set()

    def watched(self, name):
        if not name.startswith("_") and name in type(self).__dataclass_fields__:
            caller = sys._getframe(1).f_code
            if Path(caller.co_filename).name not in COPIES and caller.co_name not in ("__post_init__", "reset"):
                found.add(f"{object.__getattribute__(self, '_section')}.{name}".lstrip("."))
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Config, "__getattribute__", watched, raising=False)
    return found


def keys(section):
    """The full keys of a typed configuration, with those of its sections."""
    for field in dataclasses.fields(section):
        value = object.__getattribute__(section, field.name)
        if isinstance(value, Config):
            yield from keys(value)
        else:
            yield f"{object.__getattribute__(section, '_section')}.{field.name}".lstrip(".")


def pretraining(folder, *overrides):
    file = find("fashion_mnist_mini/byol")
    return resolve(compose(file.parent, file.name, [*TINY, f"checkpoint.dir={folder}", *overrides]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pretrain(pretraining(tmp_path_factory.mktemp("runs"))).dir


def test_pretraining(tmp_path, read):
    configs = [pretraining(tmp_path, *ALL_ON), pretraining(tmp_path, *OTHERS)]
    configs.append(pretraining(tmp_path, *STEPS))
    for cfg in configs:
        pretrain(cfg)
    assert {key for cfg in configs for key in keys(cfg)} - read - ELSEWHERE - SEVERAL == set(UNREAD["pretrain"])


REFUSED = {"linear with cache_features": {"finetune", "label_smoothing", "mixup", "cutmix"}}


@pytest.mark.parametrize("command", ["linear", "linear with cache_features", "knn"])
def test_evaluations(run, read, command):
    kind, _, cached = command.partition(" ")
    overrides = ["data.fraction=0.1", "data.format=image_folder", "data.num_workers=0"]
    overrides += ["max_epochs=2"] if kind == "linear" else []
    overrides += ["cache_features=true"] if cached else []
    schedules = (
        [[], ["scheduler.name=warmup_cosine", "scheduler.warmup_epochs=1"], [*STEPS]] if kind == "linear" else [[]]
    )
    for schedule in schedules:
        cfg = resolve(run_values(run, kind, overrides + schedule), kind)
        {"linear": linear, "knn": knn}[kind](cfg)
    read.discard("optimizer.classifier_lr")  # null
    if command != "linear":
        read.discard("max_time")  # whose form is checked
    several = SEVERAL if command == "linear" else set()
    assert set(keys(cfg)) - read - ELSEWHERE - several - REFUSED.get(command, set()) == set(UNREAD[command])


def test_what_is_not_used_is_said_and_not_recorded(run, caplog):
    cfg = resolve(run_values(run, "knn", ["limit_train_batches=3", "deterministic=true"]), "knn")
    assert "knn does not use limit_train_batches, deterministic" in caplog.text
    assert cfg.limit_train_batches is None
    resolve(run_values(run, "linear", ["cache_features=true", "optimizer.classifier_lr=0.7"]), "linear")
    assert "linear with cache_features does not use optimizer.classifier_lr" in caplog.text
    caplog.clear()
    resolve(cfg, "knn")
    resolve(resolve(run_values(run, "linear"), "linear"), "linear")
    assert "not use" not in caplog.text


@pytest.mark.parametrize("option", ["finetune=true", "mixup=0.8", "cutmix=1", "label_smoothing=0.1"])
def test_cached_features_refuse_what_changes_images_or_encoder(run, option):
    with pytest.raises(ConfigError, match="cache_features must be false with finetune, mixup, cutmix or label_smoo"):
        resolve(run_values(run, "linear", ["cache_features=true", option]), "linear")


def test_a_linear_evaluation_has_callbacks_too(run, tmp_path):
    overrides = [f"checkpoint.dir={tmp_path}", "data.fraction=0.1", "max_epochs=1"]
    with pytest.raises(ConfigError, match=r"callbacks\.no_module\.Callback"):
        linear(resolve(run_values(run, "linear", [*overrides, "+callbacks={no_module.Callback: {}}"]), "linear"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["wandb.project=mine"], "wandb.project has no effect: wandb.enabled is false"),
        (["++gradients.every=3"], "gradients.every has no effect: gradients.enabled is false"),
        (["intra.distance=mse"], "intra.distance has no effect: intra.weight is 0.0"),
        (["intra.weight=1", "intra.temperature=3"], "intra.temperature has no effect: intra.distance is cosine"),
        (
            ["momentum.schedule=constant", "momentum.final_tau=1"],
            "momentum.final_tau has no effect: momentum.schedule is",
        ),
        (["momentum.stages=none", "momentum.base_tau=0.5"], "momentum.base_tau has no effect: momentum.stages is none"),
        (["scheduler.lr_decay_steps=[3]"], "scheduler.lr_decay_steps has no effect: scheduler.name is warmup_cosine"),
        (["scheduler.name=none", "scheduler.min_lr=1e-3"], "scheduler.min_lr has no effect: scheduler.name is none"),
        (["data.train_path=/my/images"], "data.train_path has no effect: data.dataset is fashion_mnist_mini"),
        (["data.corrupt_limit=0.5"], "data.corrupt_limit has no effect: data.corrupt is error"),
        (["data.num_classes=3"], "data.num_classes has no effect: it follows from other keys"),
        (["++optimizer.effective_lr=3"], "optimizer.effective_lr has no effect: it follows from other keys"),
        (["devices=1", "strategy=ddp"], "strategy has no effect: there is one process"),
        (["gradient_clip_algorithm=norm"], "gradient_clip_algorithm has no effect: gradient_clip_val is null"),
        (
            ["backbone.name=timm/test_vit", "backbone.stem=small"],
            "backbone.stem has no effect: backbone.name is timm/te",
        ),
        (
            ["augmentations.0.rrc.enabled=false", "augmentations.0.rrc.crop_min_scale=0.5"],
            "augmentations.0.rrc.crop_min_scale has no effect: augmentations.0.rrc.enabled is false",
        ),
        (
            ["augmentations.0.color_jitter.prob=0", "augmentations.0.color_jitter.hue=0.5"],
            "augmentations.0.color_jitter.hue has no effect: augmentations.0.color_jitter.prob is 0",
        ),
        (["momentum.stages=none", "gap.every=5"], "gap.every has no effect: momentum.stages is none"),
        (["momentum.stages=none", "val_gap.enabled=true"], "val_gap.enabled has no effect: momentum.stages is none"),
        (["momentum.stages=none", "val_gap.enabled=true", "val_gap.per_class=true"], ""),
        (
            ["momentum.stages={projector: 0.9}", "momentum.base_tau=0.9"],
            "base_tau has no effect: momentum.stages gives",
        ),
        (["method=simclr", "method_kwargs.negatives=opposite"], "negatives has no effect: momentum.stages is none"),
        (["method=dino", "method_kwargs.warmup_teacher_temperature=0.01"], "_epochs is 0"),
        (
            ["method=dino", "method_kwargs.loss_scale=paper"],
            "method_kwargs.loss_scale has no effect: dino has one scale",
        ),
        (["method=byol", "method_kwargs.loss_scale=paper"], ""),
        (["intra={distance: mse}"], "intra.distance has no effect: intra.weight is 0.0"),
        (["++wandb={project: mine}"], "wandb.project has no effect: wandb.enabled is false"),
        (["data.format=tensor", "data.num_workers=3"], "data.num_workers has no effect: data.format is tensor"),
        (["data.no_labels=true", "knn_eval.k=7"], "knn_eval.k has no effect: data.no_labels is true"),
        (["data.no_labels=true", "optimizer.classifier_lr=3"], "classifier_lr has no effect: data.no_labels is true"),
        (["checkpoint.enabled=false", "auto_resume.enabled=true"], "auto_resume.enabled has no effect: checkpoint.en"),
        (["method=simsiam", "momentum.inter=false"], "momentum.inter has no effect: momentum.stages is none"),
        (["method=simclr", "momentum.target=projector"], "momentum.target has no effect: momentum.stages is none"),
        (["method=simsiam", "momentum.target=predictor"], ""),
        (["augmentations.0.color_jitter.hue=0.1", "gradient_clip_val=1", "gradient_clip_algorithm=norm"], ""),
        (["checkpoint.enabled=false", "checkpoint.dir=here"], ""),
        (["intra.weight=1", "intra.distance=ce", "intra.temperature=3", "scheduler.min_lr=1e-4"], ""),
        (["wandb.enabled=true", "wandb.project=mine", "momentum.base_tau=0.5", "knn_eval.k=5"], ""),
    ],
)
def test_what_another_key_has_switched_off_is_said(overrides, said, caplog, capsys):
    method = next((text.removeprefix("method=") for text in overrides if text.startswith("method=")), "byol")
    overrides = [text for text in overrides if not text.startswith("method=")]
    assert main(["pretrain", f"fashion_mnist_mini/{method}", *overrides, "--cfg"]) == 0
    assert said in caplog.text and bool(said) == bool(caplog.records)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["knn_eval.distance_func=[euclidean]", "knn_eval.T=[0.5]"],
            "knn_eval.T has no effect: knn_eval.distance_func",
        ),
        (
            ["++backbone.kwargs.drop_path_rate=0.5"],
            "backbone.kwargs.drop_path_rate has no effect: the encoder is frozen",
        ),
        (["devices=2", "accelerator=cpu"], "knn does not use more than one of 2 devices"),
    ],
)
def test_of_an_evaluation_too(overrides, said, run, caplog, capsys):
    assert main(["knn", "--run", str(run), *overrides, "--cfg"]) == 0
    assert said in caplog.text


def test_a_cached_evaluation_is_one_process(run, caplog):
    cfg = resolve(run_values(run, "linear", ["cache_features=true", "devices=2", "accelerator=cpu"]), "linear")
    assert cfg.optimizer.effective_lr == pytest.approx(cfg.optimizer.lr * cfg.optimizer.batch_size / 256)
    assert "linear with cache_features does not use more than one of 2 devices" in caplog.text


def test_the_recipe_of_a_linear_evaluation_is_the_one_that_was_taken(run):
    values = run_values(run, "linear", ["++recipe=linear/imagenet/simclr"])
    assert values["recipe"] == "linear/fashion_mnist_mini/byol"


def test_a_yaml_is_no_recipe_that_was_taken(caplog, capsys):
    assert main(["linear", "fashion_mnist_mini/byol", "++recipe=linear/imagenet/simclr", "--cfg"]) == 0
    assert "recipe has no effect" in caplog.text and "recipe: null" in capsys.readouterr().out
