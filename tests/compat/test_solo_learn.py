"""The contract with a real solo-learn checkout (SOLO_LEARN=<path>): keys, losses, gradients, weights, registry."""

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import fit, method_config, random_batches
from frameworks import SOLO_FRAMEWORKS, spec_of

from solo_ext.compat.solo_learn import register
from solo_ext.methods import METHODS


@pytest.fixture(autouse=True)
def _free_memory():
    """A trained module and its trainer refer to each other; a ResNet's optimizer state should not wait for Python."""
    yield
    gc.collect()


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


# framework, momentum.classifier, where there is a teacher to probe
WITH_AND_WITHOUT_PROBE = [(f, c) for f in SOLO_FRAMEWORKS for c in (False, True) if spec_of(f).teacher or not c]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("method", "classifier"), WITH_AND_WITHOUT_PROBE)
def test_keys_and_shapes(solo_learn, method, classifier, backbone):
    theirs, ours = pair(solo_learn, method, momentum__classifier=classifier, backbone__name=backbone)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("kwargs", [{"use_bn_in_head": True}, {"norm_last_layer": False}])
def test_keys_of_dinos_options(solo_learn, kwargs):
    theirs, ours = pair(solo_learn, "dino", **{f"method_kwargs__{key}": value for key, value in kwargs.items()})
    trained = [{n: p.requires_grad for n, p in model.named_parameters()} for model in (theirs, ours)]
    assert trained[0] == trained[1]


def assert_same_step(theirs, ours, batch):
    """Loss and every gradient of one training step."""
    theirs.log = theirs.log_dict = lambda *_, **__: None
    loss, expected = ours.training_step(batch, 0), theirs.training_step(batch, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == gradients.keys()
    # that of a bias before BatchNorm is 0 but for rounding
    rounding = 1e-6 * max(gradient.norm() for gradient in gradients.values())
    for name, p in ours.named_parameters():
        if name in gradients:
            assert (p.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm() + rounding, name


@pytest.mark.parametrize("dataset", ["cifar10", "imagenet100"])
@pytest.mark.parametrize(("method", "classifier"), WITH_AND_WITHOUT_PROBE)
def test_loss_and_gradients(solo_learn, method, classifier, dataset):
    theirs, ours = pair(solo_learn, method, data__dataset=dataset, momentum__classifier=classifier)
    assert_same_step(theirs, ours, random_batches(1, size=32)[0])


@pytest.mark.parametrize("method", SOLO_FRAMEWORKS)
def test_loss_and_gradients_of_a_resnet50(solo_learn, method):
    theirs, ours = pair(solo_learn, method, backbone__name="resnet50", data__dataset="imagenet100")
    # float64: eight images through 49 BatchNorms amplify rounding to more than 1e-5
    assert_same_step(theirs.double(), ours.double(), random_batches(1, size=32, dtype=torch.float64)[0])


@pytest.mark.parametrize("method", ["byol", "simclr"])
def test_loss_and_gradients_with_small_crops(solo_learn, method):
    theirs, ours = pair(solo_learn, method, data__num_small_crops=2)
    index, large, targets = random_batches(1, size=32)[0]
    small = random_batches(1, size=16, seed=1)[0][1]
    assert_same_step(theirs, ours, (index, [*large, *small], targets))


LARS = {"optimizer__name": "lars", "optimizer__kwargs": {"momentum": 0.9, "eta": 0.02, "exclude_bias_n_norm": True}}
RUNS = {
    "lars-clip-exclude": {**LARS, "optimizer__kwargs__clip_lr": True},
    "lars": {**LARS, "optimizer__kwargs__clip_lr": False, "optimizer__kwargs__exclude_bias_n_norm": False},
    "sgd": {"optimizer__name": "sgd", "optimizer__exclude_bias_n_norm_wd": True},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("method", SOLO_FRAMEWORKS)
def test_weights_and_teacher_after_ten_steps(solo_learn, method, run):
    """Optimizer, warm-up cosine schedule, EMA, queue and centre together; float64 so that only formulas can differ."""
    theirs, ours = pair(solo_learn, method, **RUNS[run], **spec_of(method).solo_learn)
    start = copy.deepcopy(ours.state_dict())
    batches = random_batches(5, batch=4, size=8, dtype=torch.float64)
    for model in (theirs, ours):
        fit(model.double(), batches, max_epochs=2)
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if spec_of(method).one_direction and name.startswith("momentum_") and ("running" in name or "tracked" in name):
            continue  # our teacher does not run the strong view
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.allclose(ours.backbone.conv1.weight, start["backbone.conv1.weight"].double(), rtol=1e-4)


def test_a_probe_on_the_teacher_runs_ressls_teacher_on_both_views(solo_learn):
    theirs, ours = pair(solo_learn, "ressl", momentum__classifier=True)
    batches = random_batches(3, batch=4, size=8, dtype=torch.float64)
    for model in (theirs, ours):
        fit(model.double(), batches, max_epochs=2)
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_register_adds_what_is_missing(solo_learn):
    from solo.methods import METHODS as registry
    from solo.methods.base import BaseMethod

    backbones = BaseMethod._BACKBONES
    before, backbones_before = dict(registry), dict(backbones)
    try:
        added = register()
        assert before.keys() & METHODS.keys() == set(SOLO_FRAMEWORKS)
        assert set(added) == METHODS.keys() - set(SOLO_FRAMEWORKS)
        assert all(issubclass(registry[name], METHODS[name]) for name in added)
        assert all(issubclass(registry[name], BaseMethod) for name in added)
        assert all(registry[name] is cls for name, cls in before.items())  # solo-learn's own stay its own
        assert {"resnet34", "resnet10_w16", "timm/resnet18"} <= backbones.keys() - backbones_before.keys()
        changed = {name for name, constructor in backbones_before.items() if backbones[name] is not constructor}
        assert changed == {"vit_tiny", "vit_small", "vit_base", "vit_large"}
        after = dict(backbones)
        assert register() == [] and backbones == after
    finally:
        for table, old in ((registry, before), (backbones, backbones_before)):
            table.clear()
            table.update(old)


@pytest.mark.parametrize("variant", ["", "projector_ema_", "res_"])
def test_solo_learns_own_tests_of_its_methods_pass_with_ours(solo_learn, variant, tmp_path):
    files = [f"tests/methods/test_{name}.py" for name in SOLO_FRAMEWORKS]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "solo_learns_own", "-p", "no:cacheprovider", *files],
        cwd=os.environ["SOLO_LEARN"],
        env={
            **os.environ,
            "SOLO_EXT_VARIANT": variant,
            "PYTHONPATH": f"{Path(__file__).parent}:{os.environ['SOLO_LEARN']}",
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and f"{len(files)} passed" in run.stdout, run.stdout + run.stderr
