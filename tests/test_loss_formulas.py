"""Every framework's loss against its formula in float64: alone, in a whole step, over a run with queue and centre."""

import random
from collections import deque
from types import SimpleNamespace

import formulas
import numpy as np
import pytest
import torch
from conftest import fit, own_kwargs, random_batches, tiny_config
from formulas import directions, mean

from solo_ext.methods import METHODS
from solo_ext.methods.dino import DINO

FRAMEWORKS = ["byol", "dino", "mocov2plus", "mocov3", "ressl", "simclr", "simsiam"]
CRITERION = {"data__num_classes": 0, "gap__enabled": False, "intra__weight": 0.0}  # the framework's loss alone
WIDTH, QUEUE = 5, 7  # of the compared outputs; keys
TEMPERATURES = [
    *("temperature", "temperature_q", "temperature_k"),
    *("student_temperature", "teacher_temperature", "warmup_teacher_temperature"),
]


def build(method, seed=0, **changes):
    """(model in float64, its numbers): temperatures drawn from `seed`, the queue and the centre, where it has them."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    numbers = {name: draw.uniform(0.05, 1) for name in TEMPERATURES}
    widths = {"proj_output_dim": WIDTH, "num_prototypes": WIDTH, "queue_size": QUEUE}
    kwargs = own_kwargs(method, **numbers, **widths)
    model = METHODS[method](tiny_config(method, **{**CRITERION, **kwargs, **changes})).double()
    if hasattr(model, "dino_loss_func"):
        model.dino_loss_func.center.normal_()
        numbers["center"] = model.dino_loss_func.center[0].clone()
    if hasattr(model, "queue"):  # keys as rows
        numbers["queue"] = (model.queue if method.endswith("ressl") else model.queue.mT).clone()
    return model, SimpleNamespace(**numbers)


def two_temperatures(n, q, k):
    """DINO at an epoch after the warm-up."""
    return mean(
        directions(lambda s, t: formulas.dino(s, t, n.center, n.student_temperature, n.teacher_temperature), q, k)
    )


def queue_per_view(n, q, k):
    """MoCo v2+: a query of view i is told from the earlier keys of view j, whose key it has to find."""
    return mean(
        formulas.queue_nce(q[i], k[j], n.queue[j], n.temperature)
        for i in range(len(q))
        for j in range(len(k))
        if i != j
    )


def one_direction(n, q, k):
    return formulas.relational(q[0], k[0], n.queue, n.temperature_q, n.temperature_k)


def contrast(n, q, k):
    return directions(lambda a, b: formulas.info_nce(a, b, n.temperature), q, k)


SIMSIAM = lambda n, q, k: mean(directions(formulas.negative_cosine, q, k))  # noqa: E731
NT_XENT = lambda n, q, k: formulas.nt_xent(q, n.temperature)  # noqa: E731
NT_XENT_MOMENTUM = lambda n, q, k: formulas.nt_xent(q, n.temperature, k)  # noqa: E731
MOMENTUM = {"momentum__stages": "full"}
BOTH = {**MOMENTUM, "method_kwargs__negatives": "both"}
OPPOSITE = {**MOMENTUM, "method_kwargs__negatives": "opposite"}
SOLO, PAPER = {"method_kwargs__loss_scale": "solo"}, {"method_kwargs__loss_scale": "paper"}

# method, configuration, formula of (numbers, queries [V, B, D], keys [V, B, D])
CASES = {
    "byol, solo": ("byol", SOLO, lambda n, q, k: sum(directions(formulas.cosine_distance, q, k))),
    "byol, paper A": ("byol", PAPER, lambda n, q, k: mean(directions(formulas.negative_cosine, q, k))),
    "byol, paper B": ("res_byol", PAPER, lambda n, q, k: mean(directions(formulas.cosine_distance, q, k))),
    "dino, solo": ("dino", SOLO, two_temperatures),
    "dino, paper": ("dino", PAPER, two_temperatures),
    "mocov2plus, solo": ("mocov2plus", SOLO, queue_per_view),
    "mocov2plus, paper": ("mocov2plus", PAPER, queue_per_view),
    "mocov3, solo": ("mocov3", SOLO, lambda n, q, k: 2 * n.temperature * sum(contrast(n, q, k))),
    "mocov3, paper": ("mocov3", PAPER, lambda n, q, k: mean(contrast(n, q, k))),
    "ressl, solo": ("ressl", SOLO, one_direction),
    "ressl, paper": ("ressl", PAPER, one_direction),
    "simclr, solo": ("simclr", SOLO, NT_XENT),
    "simclr, paper": ("simclr", PAPER, NT_XENT),
    "simclr, momentum, both, solo": ("simclr", BOTH | SOLO, NT_XENT_MOMENTUM),
    "simclr, momentum, both, paper": ("simclr", BOTH | PAPER, NT_XENT_MOMENTUM),
    "simclr, momentum, opposite, solo": ("simclr", OPPOSITE | SOLO, lambda n, q, k: mean(contrast(n, q, k))),
    "simclr, momentum, opposite, paper": ("simclr", OPPOSITE | PAPER, lambda n, q, k: mean(contrast(n, q, k))),
    "simsiam, solo": ("simsiam", SOLO, SIMSIAM),
    "simsiam, paper": ("simsiam", PAPER, SIMSIAM),
}


def assert_equal(actual, expected):
    """To 1e-9 of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max()))


@pytest.mark.parametrize(("large", "small", "images"), [(2, 0, 4), (2, 2, 3), (3, 0, 2)])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_formula(case, large, small, images):
    method, changes, formula = CASES[case]
    crops, views = {"data__num_large_crops": large}, (large + small, large)
    if method == "ressl":  # a strong and a weak view, whatever the others have
        crops, views = {}, (1, 1)
    model, numbers = build(method, seed=images, **crops, **changes)
    q, k = (3 * torch.randn(n, images, WIDTH, dtype=torch.float64, requires_grad=True) for n in views)
    loss = model.loss(list(q), [] if model.own_targets and not model.teacher.stages else list(k))
    gradient, none = torch.autograd.grad(loss, [q, k], allow_unused=True)
    assert none is None
    expected = formula(numbers, q, k.detach())
    (expected_gradient,) = torch.autograd.grad(expected, q)
    assert loss.shape == ()
    assert_equal(loss, expected)
    assert_equal(gradient, expected_gradient)


# which weights make the keys: the framework's, all momentum, the projector's only, the student's own
TARGETS = {
    "declared": {},
    "full": {"momentum__stages": "full"},
    "projector": {"momentum__stages": "projector"},
    "student": {"momentum__stages": "full", "momentum__inter": False},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", FRAMEWORKS)
def test_a_whole_step_equals_the_formula(method, target):
    """Explicit networks: student f, g, h and target fm, gm; two large crops and, but for ReSSL, a small one."""
    small = 0 if method == "ressl" else 1
    model, numbers = build(method, data__num_small_crops=small, **TARGETS[target])
    for name, p in model.named_parameters():
        if name.startswith("momentum_"):
            p.data += 0.1 * torch.randn_like(p)
    index, views, labels = random_batches(1, batch=4, size=32)[0]
    views = [x.double() for x in views]
    views += [torch.randn(4, 3, 16, 16, dtype=torch.float64)] * small

    f, g, h = model.backbone, model.part("projector"), getattr(model, "predictor", torch.nn.Identity())
    fm, gm = f, g
    if target != "student":
        fm, gm = getattr(model, "momentum_backbone", f), getattr(model, f"momentum_{model.parts['projector']}", g)
    q = [h(g(f(x))) for x in (views[:1] if method == "ressl" else views)]
    with torch.no_grad():
        k = [gm(fm(x)) for x in (views[1:] if method == "ressl" else views[:2])]
    momentum = method == "simclr" and target in ("full", "projector")
    _, _, formula = CASES["simclr, momentum, both, solo" if momentum else f"{method}, solo"]
    expected = formula(numbers, q, k)

    loss = model.training_step((index, views, labels), 0)
    assert_equal(loss, expected)
    weights = [p for p in model.backbone.parameters() if p.requires_grad]
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(x, weights)]) for x in (loss, expected)]
    assert_equal(*gradients)


def recorded(model):
    """The list that takes what `model.loss` is given and gives, step by step."""
    steps, loss = [], model.loss

    def record(queries, keys):
        for q in queries:
            q.retain_grad()
        steps.append((queries, keys, loss(queries, keys)))
        return steps[-1][2]

    model.loss = record
    return steps


def assert_step(step, formula, numbers):
    queries, keys, loss = step
    q = torch.stack([q.detach() for q in queries]).requires_grad_()
    expected = formula(numbers, q, keys)
    assert_equal(loss.detach(), expected.detach())
    (gradient,) = torch.autograd.grad(expected, q)
    assert_equal(torch.stack([q.grad for q in queries]), gradient)


@pytest.mark.parametrize("method", ["mocov2plus", "ressl", "projector_ema_mocov2plus", "projector_ema_ressl"])
def test_a_run_contrasts_with_the_keys_of_earlier_batches_only(method):
    """Each loss and gradient from a Python deque per view; batches that do not divide the queue, and exceed it."""
    model, numbers = build(method)
    steps = recorded(model)
    fit(model, [random_batches(1, batch=n, seed=n)[0] for n in (3, 5, 8, 2, 6)], precision="64-true")
    _, _, formula = CASES["ressl, solo" if "ressl" in method else "mocov2plus, solo"]
    rings = [deque(rows, maxlen=QUEUE) for rows in numbers.queue.reshape(-1, QUEUE, WIDTH)]
    for step in steps:
        numbers.queue = [list(ring) for ring in rings]
        if "ressl" in method:
            [numbers.queue] = numbers.queue
        assert_step(step, formula, numbers)
        for ring, keys in zip(rings, step[1], strict=True):
            ring.extend(torch.stack(formulas.unit(key)) for key in keys)
    assert len(steps) == 5
    assert int(model.queue_ptr) == (3 + 5 + QUEUE + 2 + 6) % QUEUE
    assert not model.queue.requires_grad


def schedule(first, last, warmup, epochs):
    return np.concatenate([np.linspace(first, last, warmup), np.full(epochs - warmup, last)])


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
def test_teacher_temperature_by_epoch(warmup, monkeypatch):
    model, numbers = build("dino", max_epochs=8, method_kwargs__warmup_teacher_temperature_epochs=warmup)
    expected = schedule(numbers.warmup_teacher_temperature, numbers.teacher_temperature, warmup, 8)
    for epoch in range(8):
        monkeypatch.setattr(DINO, "current_epoch", epoch)
        assert model.teacher_temperature == pytest.approx(expected[epoch], rel=1e-12)


def test_a_run_of_dino_centres_with_the_batches_before_at_the_epochs_temperature():
    model, numbers = build("dino", max_epochs=5, method_kwargs__warmup_teacher_temperature_epochs=3)
    temperatures = schedule(numbers.warmup_teacher_temperature, numbers.teacher_temperature, 3, 5)
    steps = recorded(model)
    fit(model, [random_batches(1, batch=n, seed=n)[0] for n in (3, 5)], max_epochs=5, precision="64-true")
    assert len(steps) == 10
    for i, step in enumerate(steps):
        numbers.teacher_temperature = temperatures[i // 2]
        assert_step(step, two_temperatures, numbers)
        average = torch.from_numpy(np.concatenate([keys.numpy() for keys in step[1]]).mean(0))
        numbers.center = 0.9 * numbers.center + 0.1 * average
    assert_equal(model.dino_loss_func.center[0], numbers.center)


def test_the_centre_rests_outside_of_training():
    model, numbers = build("dino")
    q, k = torch.randn(2, 2, 4, WIDTH, dtype=torch.float64)
    assert_equal(model.eval().loss(list(q), list(k)), two_temperatures(numbers, q, k))
    assert torch.equal(model.dino_loss_func.center[0], numbers.center)


@pytest.mark.parametrize("method", FRAMEWORKS)
def test_mixed_precision_stays_finite_and_close(method):
    batch = random_batches(1, batch=16)[0]
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = METHODS[method](tiny_config(method, **own_kwargs(method, num_prototypes=16, queue_size=40)))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.training_step(batch, 0)
        loss.backward()
        model.on_after_backward()
        losses.append(loss.item())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    for name, buffer in model.named_buffers():
        assert buffer.dtype in (torch.float32, torch.long), name
    if hasattr(model, "queue"):
        lengths = model.queue.norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)
