"""Every registered method, and the frameworks' losses against their printed formulas."""

import pytest
import torch
from conftest import fit, random_batches, tiny_config

from solo_ext.methods import METHODS

CRITERION = {"data__num_classes": 0, "gap__enabled": False, "intra__weight": 0.0}


def build(method, seed=0, **changes):
    torch.manual_seed(seed)
    return METHODS[method](tiny_config(method, **changes))


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_its_checkpoint_loads_strictly(method, tmp_path):
    model = build(method, optimizer__name="adamw")
    before = model.backbone.layer4[0].conv1.weight.clone()
    trainer = fit(model, random_batches(3), max_epochs=2, val=random_batches(2, views=1, seed=1))
    assert torch.isfinite(trainer.callback_metrics["train_loss"])
    assert 0 <= trainer.callback_metrics["val_acc1"] <= 100
    assert not torch.equal(before, model.backbone.layer4[0].conv1.weight)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    build(method, seed=1).load_state_dict(state, strict=True)


@pytest.mark.parametrize("method", METHODS)
def test_declared_defaults_yield_to_the_configuration(method):
    cls = METHODS[method]
    assert build(method).intra.weight == cls.intra.weight
    assert build(method, intra__weight=0.5).intra.weight == 0.5
    assert build(method, momentum__stages="none", intra__weight=0.0).teacher.stages == []
    assert build(method, momentum__stages=None).teacher.stages == build(method).teacher.stages


def test_the_variants_are_what_the_papers_say():
    projector_only = build("projector_ema_byol")
    assert {k.split(".")[0] for k in projector_only.state_dict()} == {
        "backbone", "projector", "predictor", "classifier", "momentum_projector",
    }  # fmt: skip
    residual = build("res_mocov3")
    assert residual.intra.weight == 1.0 and residual.kwargs.loss_scale == "paper"
    assert hasattr(residual, "momentum_predictor")
    assert METHODS["res_moco"] is METHODS["res_mocov3"]


@pytest.mark.parametrize("method", ["byol", "mocov3"])
def test_a_baseline_has_no_key_that_solo_learn_lacks(method):
    prefixes = {key.split(".")[0] for key in build(method).state_dict()}
    assert prefixes == {
        "backbone", "projector", "predictor", "classifier", "momentum_backbone", "momentum_projector",
    }  # fmt: skip


def unit(v):
    return v / v.norm(dim=1, keepdim=True)


def cosine(a, b):
    return (unit(a) * unit(b)).sum(1).mean()


def contrast(q, k, temperature):
    logits = unit(q) @ unit(k).T / temperature
    return -(logits.diag() - torch.logsumexp(logits, 1)).mean()


# method, loss_scale, formula of (queries, keys) for two views
FORMULAS = [
    ("byol", "solo", lambda q, k: (2 - 2 * cosine(q[1], k[0])) + (2 - 2 * cosine(q[0], k[1]))),
    ("byol", "paper", lambda q, k: -0.5 * (cosine(q[0], k[1]) + cosine(q[1], k[0]))),  # paper A, Eq. 5
    ("res_byol", "paper", lambda q, k: 0.5 * (2 - 2 * cosine(q[0], k[1]) + 2 - 2 * cosine(q[1], k[0]))),
    ("mocov3", "solo", lambda q, k: 2 * 0.2 * (contrast(q[0], k[1], 0.2) + contrast(q[1], k[0], 0.2))),
    (
        "mocov3",
        "paper",
        lambda q, k: 0.5 * (contrast(q[0], k[1], 0.2) + contrast(q[1], k[0], 0.2)),
    ),  # paper B, Eq. 3
]


@pytest.mark.parametrize(("method", "scale", "formula"), FORMULAS, ids=lambda v: v if isinstance(v, str) else "")
def test_loss_and_gradient_equal_the_formula(method, scale, formula):
    model = build(method, method_kwargs__loss_scale=scale)
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 2, 12, 7, dtype=torch.float64, generator=generator)
    q = q.requires_grad_()
    loss = model.loss(list(q), list(k))
    (gradient,) = torch.autograd.grad(loss, q)
    expected = formula(q, k)
    (expected_gradient,) = torch.autograd.grad(expected, q)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("method", ["byol", "projector_ema_byol"])
def test_the_step_uses_the_teacher_on_the_other_view(method):
    """The whole step against a transcription of paper A's Alg. 1 with explicit networks."""
    model = build(method, **CRITERION, method_kwargs__loss_scale="paper")
    with torch.no_grad():
        for p in model.momentum_projector.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    _, (x1, x2), _ = batch = random_batches(1)[0]
    f, g, h, gm = model.backbone, model.projector, model.predictor, model.momentum_projector
    fm = getattr(model, "momentum_backbone", f)
    p1, p2 = h(g(f(x1))), h(g(f(x2)))
    with torch.no_grad():
        z1, z2 = gm(fm(x1)), gm(fm(x2))
    expected = -0.5 * cosine(p1, z2) - 0.5 * cosine(p2, z1)
    loss = model.training_step(batch, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(loss, list(f.parameters()))
    theirs = torch.autograd.grad(expected, list(f.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_small_crops_are_queries_but_never_targets():
    model = build("byol", **CRITERION, data__num_small_crops=2)
    index, large, targets = random_batches(1, size=32)[0]
    small = random_batches(1, size=16, seed=1)[0][1]
    views = [*large, *small]
    z, q = [], []
    with torch.no_grad():
        for x in views:
            out, entry = model._see(x)
            q.append(out["q"])
            z.append(model._teach(out, entry, "projector")["z"])
    expected = sum(2 - 2 * cosine(q[i], z[j]) for j in range(2) for i in range(4) if i != j)
    assert model.training_step((index, views, targets), 0).item() == pytest.approx(expected.item(), rel=1e-4)


def test_unlabelled_data_has_no_probe_and_partly_labelled_data_ignores_the_rest():
    assert build("byol", data__num_classes=0).classifier is None
    model = build("byol", gap__enabled=False)
    index, views, targets = random_batches(1)[0]
    targets[:4] = -1
    logits = model(views[0])["logits"]
    assert torch.isfinite(model.training_step((index, views, torch.full_like(targets, -1)), 0))
    total = model.training_step((index, views, targets), 0)
    ssl = build("byol", **CRITERION).training_step((index, views, targets), 0)
    assert torch.isfinite(total) and total > ssl
    assert logits.shape == (8, 10)


def test_the_effective_lr_wins_over_the_configured_one():
    model = build("byol", accumulate_grad_batches=4)
    assert model._lr("lr") == pytest.approx(0.05 * 4)  # solo-learn: times the accumulated batches
    model = build("byol", accumulate_grad_batches=4, optimizer__effective_lr=0.123)
    assert model._lr("lr") == 0.123
