"""Each loss against its formula in float64, written out in scalars, and against solo-learn's values."""

import math
import random
from collections import deque

import formulas
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formulas import batch_mean, cross_entropy, probabilities, squared_distance

from solo_ext.losses import (
    Center,
    cosine_distance,
    dino,
    enqueue,
    info_nce,
    negative_cosine,
    nt_xent,
    printed_cross_entropy,
    queue_nce,
    relational,
    soft_cross_entropy,
    softmax_mse,
)
from solo_ext.losses.distributed import gather, gather_no_grad


class Draw:
    """Random shapes, temperatures and tensors that one seed decides."""

    def __init__(self, seed, dtype=torch.float64):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype
        draw = random.Random(seed)
        self.images, self.width, self.views, self.others = (draw.randint(2, n) for n in (5, 6, 4, 9))
        self.t1, self.t2 = draw.uniform(0.04, 1), draw.uniform(0.04, 1)
        self.queue = self.unit(self.others, self.width)
        self.center = self.normal(1, self.width)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype)

    def unit(self, *shape):
        x = self.normal(*shape)
        return x / x.square().sum(-1, keepdim=True).sqrt()


# loss of (draw, students [V, B, D], teachers [V, B, D]), and the same by its formula
LOSSES = {
    "cosine_distance": (
        lambda d, s, t: cosine_distance(s[0], t[0]),
        lambda d, s, t: formulas.cosine_distance(s[0], t[0]),
    ),
    "negative_cosine": (
        lambda d, s, t: negative_cosine(s[0], t[0]),
        lambda d, s, t: formulas.negative_cosine(s[0], t[0]),
    ),
    "soft_cross_entropy": (
        lambda d, s, t: soft_cross_entropy(s[0], t[0]),
        lambda d, s, t: batch_mean(lambda a, b: cross_entropy(probabilities(b, 4), probabilities(a, 4)))(s[0], t[0]),
    ),
    "soft_cross_entropy, any temperature": (
        lambda d, s, t: soft_cross_entropy(s[0], t[0], d.t1),
        lambda d, s, t: batch_mean(lambda a, b: cross_entropy(probabilities(b, d.t1), probabilities(a, d.t1)))(
            s[0], t[0]
        ),
    ),
    "printed_cross_entropy": (
        lambda d, s, t: printed_cross_entropy(s[0], t[0], d.t1),
        lambda d, s, t: batch_mean(lambda a, b: cross_entropy(probabilities(a, d.t1), probabilities(b, d.t1)))(
            s[0], t[0]
        ),
    ),
    "softmax_mse, mean": (
        lambda d, s, t: softmax_mse(s[0], t[0], over="mean"),
        lambda d, s, t: batch_mean(
            lambda a, b: squared_distance(probabilities(a), probabilities(b)) / (2 * s.shape[-1])
        )(s[0], t[0]),
    ),
    "softmax_mse": (
        lambda d, s, t: softmax_mse(s[0], t[0]),
        lambda d, s, t: batch_mean(lambda a, b: squared_distance(probabilities(a), probabilities(b)) / 2)(s[0], t[0]),
    ),
    "info_nce": (
        lambda d, s, t: info_nce(s[0], t[0], d.t1),
        lambda d, s, t: formulas.info_nce(s[0], t[0], d.t1),
    ),
    "nt_xent": (
        lambda d, s, t: nt_xent(s.unbind(), d.t1),
        lambda d, s, t: formulas.nt_xent(s, d.t1),
    ),
    "nt_xent, momentum target": (
        lambda d, s, t: nt_xent(s.unbind(), d.t1, t.unbind()),
        lambda d, s, t: formulas.nt_xent(s, d.t1, t),
    ),
    "nt_xent, two of the views have a momentum target": (
        lambda d, s, t: nt_xent(s.unbind(), d.t1, t[:2].unbind()),
        lambda d, s, t: formulas.nt_xent(s, d.t1, t[:2]),
    ),
    "dino": (
        lambda d, s, t: dino(s[0], t[0], d.center, d.t1, d.t2),
        lambda d, s, t: formulas.dino(s[0], t[0], d.center[0], d.t1, d.t2),
    ),
    "queue_nce": (
        lambda d, s, t: queue_nce(s[0], t[0], d.queue.T, d.t1),
        lambda d, s, t: formulas.queue_nce(s[0], t[0], d.queue, d.t1),
    ),
    "relational": (
        lambda d, s, t: relational(s[0], t[0], d.queue, d.t1, d.t2),
        lambda d, s, t: formulas.relational(s[0], t[0], d.queue, d.t1, d.t2),
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name, seed):
    loss, formula = LOSSES[name]
    draw = Draw(seed)
    student, teacher = (3 * draw.normal(draw.views, draw.images, draw.width) for _ in range(2))
    results = []
    for function in (loss, formula):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_(function is loss)
        value = function(draw, s, t)
        assert value.shape == ()
        value.backward()
        assert t.grad is None
        results.append((value.detach(), s.grad))
    (value, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9 * float(expected_gradient.abs().max()))


@pytest.mark.parametrize("loss", [cosine_distance, softmax_mse])
def test_distance_of_equal_outputs_is_zero(loss):
    student = Draw(0).normal(6, 5)
    assert loss(student, student).item() == pytest.approx(0, abs=1e-12)


def test_bounds():
    student, equal = Draw(0).normal(6, 5), torch.ones(6, 5)
    assert cosine_distance(student, -student).item() == pytest.approx(4)
    assert info_nce(equal, equal, 0.2).item() == pytest.approx(math.log(6))
    assert nt_xent([equal, equal], 0.2).item() == pytest.approx(math.log(11))
    assert queue_nce(equal, equal, equal.T / math.sqrt(5), 0.2).item() == pytest.approx(math.log(7))
    assert relational(equal, equal, equal, 0.1, 0.04).item() == pytest.approx(math.log(6))
    assert dino(equal, equal, torch.zeros(1, 5), 0.1, 0.04).item() == pytest.approx(math.log(5))


def test_gather_is_the_identity_on_one_process():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather(x) is x
    assert not gather_no_grad(x).requires_grad
    assert torch.equal(gather_no_grad(x), x)


@pytest.mark.parametrize(("shared_tensor", "views"), [(False, 1), (True, 1), (True, 2), (True, 3)])
def test_the_queue_holds_the_newest_keys_in_their_order(shared_tensor, views):
    """[K, D] or [V, D, K] against a Python deque per view, for batches that do not divide the queue or exceed it."""
    draw = Draw(0)
    size, width = 8, 3
    start = draw.unit(views, size, width)
    rings = [deque(rows.tolist(), maxlen=size) for rows in start]
    queue = start.clone().mT if shared_tensor else start[0].clone()
    pointer, same = torch.zeros(1, dtype=torch.long), queue
    for batch in (3, 5, 1, 7, 8, 11, 19, 2, 5):
        keys = 3 * draw.normal(views, batch, width)
        keys.requires_grad_()
        enqueue(queue, pointer, keys if shared_tensor else keys[0])
        for ring, rows in zip(rings, keys, strict=True):
            ring.extend([float(x) for x in formulas.unit(row)] for row in rows)
        held = queue.mT if shared_tensor else queue[None]
        oldest_first = torch.cat([held[:, pointer:], held[:, :pointer]], dim=1)
        torch.testing.assert_close(oldest_first, torch.tensor([list(r) for r in rings], dtype=torch.float64))
        assert not queue.requires_grad
    assert queue is same


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_the_centre_is_the_moving_average_of_all_scores(momentum):
    draw = Draw(0)
    center, expected = Center(4, momentum).double(), np.zeros((1, 4))
    for images in (3, 5, 2):
        scores = draw.normal(2, images, 4).requires_grad_()
        center.update(scores)
        expected = momentum * expected + (1 - momentum) * scores.detach().numpy().reshape(-1, 4).mean(0, keepdims=True)
        np.testing.assert_allclose(center.center.numpy(), expected, rtol=1e-12)
        assert not center.center.requires_grad


def test_the_centre_keeps_its_precision_on_half_precision_scores():
    scores = (5 + Draw(0).normal(2, 64, 4)).bfloat16()
    center = Center(4)
    center.update(scores)
    expected = 0.1 * scores.double().flatten(0, 1).mean(0, keepdim=True)
    torch.testing.assert_close(center.center, expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_mixed_precision_keeps_value_and_gradient(name):
    loss, _ = LOSSES[name]
    draw = Draw(1, torch.float32)
    student, teacher = (draw.normal(draw.views, draw.images, draw.width).bfloat16().float() for _ in range(2))
    full, mixed = (student.clone().requires_grad_() for _ in range(2))
    expected = loss(draw, full, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(draw, mixed, teacher)
    expected.backward()
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=0.02, abs=0.02)
    assert (full.grad - mixed.grad).norm() < 0.05 * full.grad.norm()


@pytest.fixture
def solo_losses(solo_learn):
    import solo.losses

    return solo.losses


def normalize(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


# ours and solo-learn's, of (solo.losses, draw, students, teachers)
SOLO_LEARN = {
    "byol": (
        lambda d, s, t: cosine_distance(s[0], t[0]),
        lambda solo, d, s, t: solo.byol_loss_func(s[0], t[0]),
    ),
    "simsiam": (
        lambda d, s, t: negative_cosine(s[0], t[0]),
        lambda solo, d, s, t: solo.simsiam_loss_func(s[0], t[0]),
    ),
    "mocov3": (
        lambda d, s, t: 2 * d.t1 * info_nce(s[0], t[0], d.t1),
        lambda solo, d, s, t: solo.mocov3_loss_func(s[0], t[0], d.t1),
    ),
    "simclr": (
        lambda d, s, t: nt_xent(s.unbind(), d.t1),
        lambda solo, d, s, t: solo.simclr_loss_func(s.flatten(0, 1), torch.arange(d.images).repeat(d.views), d.t1),
    ),
    "mocov2plus": (
        lambda d, s, t: queue_nce(s[0], t[0], d.queue.T, d.t1),
        lambda solo, d, s, t: solo.mocov2plus_loss_func(normalize(s[0]), normalize(t[0]), d.queue.T, d.t1),
    ),
    "ressl": (
        lambda d, s, t: relational(s[0], t[0], d.queue, d.t1, d.t2),
        lambda solo, d, s, t: solo.ressl_loss_func(normalize(s[0]), normalize(t[0]), d.queue, d.t1, d.t2),
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SOLO_LEARN)
def test_equals_solo_learn(solo_losses, name, seed):
    ours, theirs = SOLO_LEARN[name]
    draw = Draw(seed, torch.float32)
    student, teacher = (3 * draw.normal(draw.views, draw.images, draw.width) for _ in range(2))
    s, reference = (student.clone().requires_grad_() for _ in range(2))
    value, expected = ours(draw, s, teacher), theirs(solo_losses, draw, reference, teacher)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(s.grad, reference.grad, rtol=1e-5, atol=1e-6)


def test_dino_equals_solo_learn(solo_learn):
    """Loss, gradient and centre over several batches."""
    from solo.losses.dino import DINOLoss

    draw = Draw(0, torch.float32)
    theirs = DINOLoss(7, warmup_teacher_temp=0.05, teacher_temp=0.05, warmup_teacher_temp_epochs=0, num_epochs=1)
    center = Center(7)
    for images in (4, 3, 5):
        student, teacher = draw.normal(2, images, 7), draw.normal(2, images, 7)
        s, reference = (student.clone().requires_grad_() for _ in range(2))
        value = sum(dino(s[i], teacher[1 - i], center.center, 0.1, 0.05) for i in range(2)) / 2
        center.update(teacher)
        expected = theirs(reference.flatten(0, 1), teacher.flatten(0, 1))
        value.backward()
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(s.grad, reference.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(center.center, theirs.center, rtol=1e-5, atol=1e-6)


# Outputs that are nearly equal, as late in a training, in the types that mixed precision gives them.

HALVES = [torch.bfloat16, torch.float16]
APART = [0.5, 0.05, 0.02, 0.005]  # of the length of the outputs
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


class Wide(Draw):
    """Outputs of a real size, on the grid of `dtype`; `others` of the loss in float32."""

    def __init__(self, apart, dtype, device):
        super().__init__(0)
        self.views, self.images, self.width, self.others, self.t1, self.t2 = 2, 32, 128, 256, 0.2, 0.05
        self.queue, self.center = self.unit(self.others, self.width), 0.1 * self.normal(1, self.width)
        teacher = self.normal(self.views, self.images, self.width)
        students = teacher + apart * self.normal(*teacher.shape)
        self.pair = [x.to(device, dtype) for x in (students, teacher)]

    def to(self, device, dtype):
        self.queue, self.center = self.queue.to(device, dtype), self.center.to(device, dtype)
        return self


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("apart", APART)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_of_nearly_equal_outputs(name, dtype, apart, device):
    """Under autocast the loss is that of the same numbers in float64, and so is the direction of its gradient."""
    loss, _ = LOSSES[name]
    draw = Wide(apart, dtype, device)
    student, teacher = draw.pair
    exact = student.double().requires_grad_()
    expected = loss(draw.to(device, torch.float64), exact, teacher.double())
    expected.backward()
    student.requires_grad_()
    scale = 2.0**14 if dtype == torch.float16 else 1.0  # as a GradScaler's
    with torch.autocast(device, dtype):
        value = loss(draw.to(device, torch.float32), student, teacher)
    (scale * value).backward()
    assert value.dtype == torch.float32 and student.grad.dtype == dtype
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert F.cosine_similarity(student.grad.double().flatten(), exact.grad.flatten(), dim=0) > 0.9999
