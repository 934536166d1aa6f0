"""solo-learn's own YAMLs, unchanged, train here what they train there (SOLO_LEARN=<path of a checkout>)."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SOLO_LEARN
from omegaconf import OmegaConf

from solo_ext import schema
from solo_ext.methods import METHODS
from solo_ext.training.compose import compose
from solo_ext.training.config import resolve

SCRIPTS = Path(SOLO_LEARN or "") / "scripts"
NO_CHECKOUT = pytest.param("-", marks=pytest.mark.skip(reason="set SOLO_LEARN=<path of a solo-learn checkout>"))
STEPS_PER_EPOCH = 2


def yamls(kind: str) -> list:
    """The YAMLs of our methods, as <folder>/<name>."""
    files = sorted((SCRIPTS / kind).glob("*/*.yaml")) if SOLO_LEARN else []
    return [f"{f.parent.name}/{f.stem}" for f in files if f.stem.removesuffix("_vit") in METHODS] or [NO_CHECKOUT]


def composed(kind: str, name: str, folder: Path, wandb: str = "private"):
    """The YAML, changed only where its folders are not there."""
    file = SCRIPTS / kind / f"{name}.yaml"
    raw = compose(file.parent, file.name, [f"wandb={wandb}"])
    if raw.data.dataset == "custom":
        for label in "abc":
            (folder / label).mkdir()
        raw.data.train_path = raw.data.val_path = str(folder)
    return raw


def leaves(node, at: str = "") -> dict:
    if not node or not isinstance(node, dict | list):
        return {at: None if node == "None" else node}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {key: value for name, child in items for key, value in leaves(child, f"{at}.{name}".lstrip(".")).items()}


def assert_every_value_is_read(raw, kind: str) -> None:
    cfg, expected = (leaves(values) for values in (schema.plain(resolve(raw, kind)), OmegaConf.to_container(raw)))
    unused = METHODS[raw.method].unused_kwargs if kind == "pretrain" else ()
    unused = (*(f"method_kwargs.{key}" for key in unused), "hydra.", "augmentations_cfg", "wandb_cfg")
    expected = {key: value for key, value in expected.items() if not key.startswith(unused)}
    assert {key: cfg[key] for key in expected} == expected


@pytest.mark.parametrize("wandb", ["private", "mhug"])
@pytest.mark.parametrize("name", yamls("linear"))
def test_linear_yaml_is_read(solo_learn, name, wandb, tmp_path):
    assert_every_value_is_read(composed("linear", name, tmp_path, wandb), "linear")


@pytest.mark.parametrize("name", yamls("pretrain"))
def test_pretraining_is_the_same(solo_learn, name, tmp_path):
    raw = composed("pretrain", name, tmp_path)
    assert_every_value_is_read(raw, "pretrain")
    theirs, ours = solo_learns(raw), METHODS[raw.method](resolve(raw))

    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert ours.large_crops == theirs.num_large_crops
    assert ours.cfg.data.num_small_crops == theirs.num_small_crops
    same_kwargs(theirs, ours)
    same_optimization(theirs, ours)
    same_tau(theirs, ours)


def solo_learns(raw):
    """Its method, built as its main_pretrain.py builds it."""
    from solo.args.pretrain import parse_cfg
    from solo.methods import METHODS as SOLO

    cfg = copy.deepcopy(raw)
    OmegaConf.set_struct(cfg, False)
    cfg = parse_cfg(cfg)
    return SOLO[cfg.method](cfg)


def same_kwargs(theirs, ours) -> None:
    kwargs = dataclasses.asdict(ours.kwargs)
    attributes = {key: getattr(theirs, key) for key in kwargs if hasattr(theirs, key)}
    assert {key: kwargs[key] for key in attributes} == attributes
    assert (
        kwargs["loss_scale"] == type(ours).loss_scale != "paper" and ours.intra.weight == 0 and ours.cfg.momentum.inter
    )
    kept_elsewhere = {key for key in kwargs if "temperature" in key} - attributes.keys()
    if kept_elsewhere:  # DINO's
        loss = theirs.dino_loss_func
        assert kwargs["student_temperature"] == loss.student_temp
        for epoch in (0, 1, 20, 49, 50, ours.cfg.max_epochs - 1):
            ours._trainer = SimpleNamespace(current_epoch=epoch)
            assert ours.teacher_temperature == pytest.approx(loss.teacher_temp_schedule[epoch])


def same_optimization(theirs, ours) -> None:
    (one, schedule), (other, own_schedule) = optimization(theirs), optimization(ours)
    names = {id(p): name for model in (theirs, ours) for name, p in model.named_parameters()}
    assert type(one).__name__ == type(other).__name__
    assert len(one.param_groups) == len(other.param_groups)
    for a, b in zip(one.param_groups, other.param_groups, strict=True):
        assert [names[id(p)] for p in a["params"]] == [names[id(p)] for p in b["params"]]
        options = {key: plain(value) for key, value in a.items() if key not in ("params", "lr", "initial_lr")}
        assert {key: plain(b[key]) for key in options} == options
    pairs = list(zip(other.param_groups, one.param_groups, strict=True))
    for step in range(STEPS_PER_EPOCH * ours.cfg.max_epochs):
        for own, expected in pairs:
            # SimSiam's predictor: its lr is constant there from the second step on, the first is the warm-up's
            if step or not own.get("static_lr"):
                assert own["lr"] == pytest.approx(expected["lr"], rel=1e-6), step
        for optimizer, scheduler in ((one, schedule), (other, own_schedule)):
            optimizer.step()
            scheduler.step()


def plain(value):
    return list(value) if OmegaConf.is_list(value) or isinstance(value, tuple) else value


def optimization(model):
    """Optimizer and learning rate schedule of a run with `STEPS_PER_EPOCH`."""
    epochs = model.cfg.max_epochs
    model._trainer = SimpleNamespace(
        estimated_stepping_batches=STEPS_PER_EPOCH * epochs,
        num_training_batches=STEPS_PER_EPOCH,
        accumulate_grad_batches=1,
        max_epochs=epochs,
    )
    made = model.configure_optimizers()
    if isinstance(made, dict):
        return made["optimizer"], made["lr_scheduler"]["scheduler"]
    [optimizer], [entry] = made
    return optimizer, entry["scheduler"]


def same_tau(theirs, ours) -> None:
    total = 1000
    if not hasattr(theirs, "momentum_updater"):
        assert ours.teacher.tau(0, total) is None
        return
    for step in (0, 1, 250, 999, 1000):
        if step:
            theirs.momentum_updater.update_tau(step, total)
        assert ours.teacher.tau(step, total) == pytest.approx(theirs.momentum_updater.cur_tau, abs=1e-12)
