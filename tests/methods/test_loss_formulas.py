"""Every framework's loss against its formula in float64: alone, in a whole step, over a run with queue and centre."""

import random
from collections import deque

import formulas
import numpy as np
import pytest
import torch
from conftest import fit, own_kwargs, random_batches, tiny_config
from frameworks import FRAMEWORKS, framework_of, gathered, ids, spec_of, variants

from solo_ext.methods import METHODS

CRITERION = {"data__num_classes": 0, "gap__enabled": False, "intra__weight": 0.0}  # the framework's loss alone
QUEUED = [name for name in FRAMEWORKS if "queue_size" in spec_of(name).kwargs]
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
    spec = spec_of(method)
    if "center" in (memory := spec.memory(model)):
        memory["center"].normal_()
    return model, spec.numbers(method, changes, model, **numbers)


# method, changes
CASES = [(f, {"method_kwargs__loss_scale": scale}) for f in FRAMEWORKS for scale in ("solo", "paper")]
CASES += gathered("cases")


def assert_equal(actual, expected):
    """To 1e-9 of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max()))


@pytest.mark.parametrize(("large", "small", "images"), [(2, 0, 4), (2, 2, 3), (3, 0, 2)])
@pytest.mark.parametrize(("method", "changes"), CASES, ids=ids(CASES))
def test_loss_and_gradient_equal_the_formula(method, changes, large, small, images):
    spec = spec_of(method)
    crops, views = {"data__num_large_crops": large}, (large + small, large)
    if spec.one_direction:  # a strong and a weak view, whatever the others have
        crops, views = {}, (1, 1)
    model, numbers = build(method, seed=images, **crops, **changes)
    q, k = (3 * torch.randn(n, images, WIDTH, dtype=torch.float64, requires_grad=True) for n in views)
    own_targets = spec.own_targets and "momentum__stages" not in changes
    loss = model.loss(list(q), [] if own_targets else list(k))
    gradient, none = torch.autograd.grad(loss, [q, k], allow_unused=True)
    assert none is None
    expected = spec.loss(numbers, q, q if own_targets else k.detach())
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
    """Explicit networks: student f, g, h and target fm, gm; two large crops and, if it takes any, a small one."""
    spec = spec_of(method)
    small = 0 if spec.one_direction else 1
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
    q = [h(g(f(x))) for x in (views[:1] if spec.one_direction else views)]
    with torch.no_grad():
        k = [gm(fm(x)) for x in (views[1:] if spec.one_direction else views[:2])]
    expected = spec.loss(numbers, q, q if spec.own_targets and target in ("declared", "student") else k)

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


@pytest.mark.parametrize(
    "method", [*QUEUED, *(name for name in variants("projector_ema_") if framework_of(name) in QUEUED)]
)
def test_a_run_contrasts_with_the_keys_of_earlier_batches_only(method):
    """Each loss and gradient from a Python deque per view; batches that do not divide the queue, and exceed it."""
    model, numbers = build(method)
    steps = recorded(model)
    fit(model, [random_batches(1, batch=n, seed=n)[0] for n in (3, 5, 8, 2, 6)], precision="64-true")
    per_view = numbers.queue.dim() == 3
    rings = [deque(rows, maxlen=QUEUE) for rows in numbers.queue.reshape(-1, QUEUE, WIDTH)]
    for step in steps:
        numbers.queue = [list(ring) for ring in rings]
        if not per_view:
            [numbers.queue] = numbers.queue
        assert_step(step, spec_of(method).loss, numbers)
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
        monkeypatch.setattr(type(model), "current_epoch", epoch)
        assert model.teacher_temperature == pytest.approx(expected[epoch], rel=1e-12)


def test_a_run_of_dino_centres_with_the_batches_before_at_the_epochs_temperature():
    model, numbers = build("dino", max_epochs=5, method_kwargs__warmup_teacher_temperature_epochs=3)
    temperatures = schedule(numbers.warmup_teacher_temperature, numbers.teacher_temperature, 3, 5)
    steps = recorded(model)
    fit(model, [random_batches(1, batch=n, seed=n)[0] for n in (3, 5)], max_epochs=5, precision="64-true")
    assert len(steps) == 10
    for i, step in enumerate(steps):
        numbers.teacher_temperature = temperatures[i // 2]
        assert_step(step, spec_of("dino").loss, numbers)
        average = torch.from_numpy(np.concatenate([keys.numpy() for keys in step[1]]).mean(0))
        numbers.center = 0.9 * numbers.center + 0.1 * average
    assert_equal(model.dino_loss_func.center[0], numbers.center)


def test_the_centre_rests_outside_of_training():
    model, numbers = build("dino")
    q, k = torch.randn(2, 2, 4, WIDTH, dtype=torch.float64)
    assert_equal(model.eval().loss(list(q), list(k)), spec_of("dino").loss(numbers, q, k))
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
