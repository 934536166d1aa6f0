"""Each loss against its formula in float64, written out in scalars; joined batches over two ranks."""

import math

import pytest
import torch
import torch.distributed as dist

from solo_ext.losses import (
    cosine_distance,
    gather,
    gather_no_grad,
    info_nce,
    negative_cosine,
    soft_cross_entropy,
    softmax_mse,
)

B, D = 6, 5
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def pair(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(B, D, generator=generator, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


# The formulas for one sample, from scalars.
def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a):
    norm = torch.sqrt(dot(a, a))
    return [x / norm for x in a]


def probabilities(a, temperature=1.0):
    exps = [torch.exp(x / temperature) for x in a]
    return [e / sum(exps) for e in exps]


def squared_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def cross_entropy(weights, of):
    return -dot(weights, [torch.log(p) for p in of])


def batch_mean(term):
    return lambda s, t: sum(term(a, b) for a, b in zip(s, t, strict=True)) / len(s)


def formula_info_nce(q, k, temperature=0.2):
    losses = []
    for i, a in enumerate(q):
        scores = [torch.exp(dot(unit(a), unit(b)) / temperature) for b in k]
        losses.append(-torch.log(scores[i] / sum(scores)))
    return sum(losses) / len(losses)


LOSSES = {
    "cosine_distance": (cosine_distance, batch_mean(lambda p, z: squared_distance(unit(p), unit(z)))),
    "negative_cosine": (negative_cosine, batch_mean(lambda p, z: -dot(unit(p), unit(z)))),
    "info_nce": (lambda q, k: info_nce(q, k, 0.2), formula_info_nce),
    "soft_cross_entropy": (
        soft_cross_entropy,
        batch_mean(lambda s, t: cross_entropy(probabilities(t, 4), probabilities(s, 4))),
    ),
    "soft_cross_entropy, temperature 3": (
        lambda s, t: soft_cross_entropy(s, t, 3.0),
        batch_mean(lambda s, t: cross_entropy(probabilities(t, 3), probabilities(s, 3))),
    ),
    "soft_cross_entropy, literal": (
        lambda s, t: soft_cross_entropy(s, t, literal=True),
        batch_mean(lambda s, t: cross_entropy(probabilities(s, 4), probabilities(t, 4))),
    ),
    "softmax_mse": (
        softmax_mse,
        batch_mean(lambda s, t: squared_distance(probabilities(s), probabilities(t)) / 2),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name):
    loss, formula = LOSSES[name]
    student, teacher = pair()
    value = loss(student, teacher)
    value.backward()
    reference = student.detach().clone().requires_grad_()
    expected = formula(reference, teacher.detach())
    expected.backward()
    assert value.shape == ()
    torch.testing.assert_close(value, expected, **TOLERANCE)
    torch.testing.assert_close(student.grad, reference.grad, **TOLERANCE)
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [cosine_distance, softmax_mse])
def test_distance_of_equal_outputs_is_zero(loss):
    student, _ = pair()
    assert loss(student, student).item() == pytest.approx(0, abs=1e-12)


def test_bounds():
    student, _ = pair()
    assert cosine_distance(student, -student).item() == pytest.approx(4)
    assert info_nce(torch.ones(B, D), torch.ones(B, D), 0.2).item() == pytest.approx(math.log(B))


def test_gather_is_the_identity_on_one_process():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather(x) is x
    assert not gather_no_grad(x).requires_grad
    assert torch.equal(gather_no_grad(x), x)


def weighted_square(x):
    """A scalar of all rows in which each row has its own weight."""
    return (x.square() * torch.arange(1.0, len(x) + 1, dtype=x.dtype)[:, None]).sum()


def two_ranks(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    own = slice(rank * B // 2, (rank + 1) * B // 2)
    query, key = (x.detach()[own].clone().requires_grad_() for x in pair())
    loss = info_nce(query, key, 0.2)
    loss.backward()
    x = pair()[0].detach()[own].clone().requires_grad_()
    joined = gather(x)
    ((rank + 1) * weighted_square(joined)).backward()
    torch.save((loss.detach(), query.grad, key.grad, joined.detach(), x.grad), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_joint_batch(tmp_path):
    torch.multiprocessing.spawn(two_ranks, (tmp_path / "store", tmp_path), nprocs=2)
    losses, query_grads, key_grads, joined, gather_grads = zip(
        *(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)), strict=True
    )
    query, key = pair()
    loss = info_nce(query, key, 0.2)
    loss.backward()
    torch.testing.assert_close(sum(losses) / 2, loss.detach(), **TOLERANCE)
    torch.testing.assert_close(torch.cat(query_grads) / 2, query.grad, **TOLERANCE)
    assert key_grads == (None, None)

    x = pair()[0]
    ((1 + 2) * weighted_square(x)).backward()  # both ranks' losses
    for rows in joined:
        torch.testing.assert_close(rows, x.detach())
    torch.testing.assert_close(torch.cat(gather_grads), x.grad, **TOLERANCE)


@pytest.mark.parametrize(
    ("function", "ours"),
    [
        ("byol_loss_func", cosine_distance),
        ("simsiam_loss_func", negative_cosine),
        ("mocov3_loss_func", lambda q, k: 2 * 0.2 * info_nce(q, k, 0.2)),
    ],
)
def test_equals_solo_learn(solo_learn, function, ours):
    import solo.losses

    student, teacher = pair(dtype=torch.float32)
    reference = student.detach().clone().requires_grad_()
    value, expected = ours(student, teacher), getattr(solo.losses, function)(reference, teacher.detach())
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(student.grad, reference.grad, rtol=1e-6, atol=1e-7)
