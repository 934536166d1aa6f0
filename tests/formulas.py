"""The losses as the papers print them, image by image and number by number, for float64: the tests' reference.

A row is a 1-d tensor or a sequence of scalars; a batch is a sequence of rows. Gradients come from the scalars.
"""

import torch


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


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def batch_mean(term):
    """(row, row) -> scalar becomes (batch, batch) -> scalar."""
    return lambda s, t: mean(term(a, b) for a, b in zip(s, t, strict=True))


negative_cosine = batch_mean(lambda p, z: -dot(unit(p), unit(z)))
cosine_distance = batch_mean(lambda p, z: squared_distance(unit(p), unit(z)))  # BYOL, Eq. 2


def info_nce(query, key, temperature):
    """MoCo v3, Eq. 1; residual momentum, Eq. 2."""
    query, key = [unit(a) for a in query], [unit(b) for b in key]
    scores = [[torch.exp(dot(a, b) / temperature) for b in key] for a in query]
    return mean(-torch.log(row[i] / sum(row)) for i, row in enumerate(scores))


def nt_xent(queries, temperature, targets=None):
    """SimCLR, Eq. 1, over views [V][B]; with more than two views an image has several positives, which add up."""
    keys = [[unit(b) for b in view] for view in (queries if targets is None else targets)]
    losses = []
    for v, view in enumerate(queries):
        for i, row in enumerate(view):
            a, same, other = unit(row), 0, 0
            for w, key_view in enumerate(keys):
                for j, b in enumerate(key_view):
                    if j != i:
                        other = other + torch.exp(dot(a, b) / temperature)
                    elif w != v:
                        same = same + torch.exp(dot(a, b) / temperature)
            losses.append(-torch.log(same / (same + other)))
    return mean(losses)


def dino(student, teacher, center, student_temperature, teacher_temperature):
    """DINO, Alg. 1, H(t, s)."""
    return mean(
        cross_entropy(
            probabilities([x - c for x, c in zip(t, center, strict=True)], teacher_temperature),
            probabilities(s, student_temperature),
        )
        for s, t in zip(student, teacher, strict=True)
    )


def queue_nce(query, key, queue, temperature):
    """MoCo, Eq. 1; `queue` is a sequence of unit rows."""
    losses = []
    for a, b in zip(query, key, strict=True):
        a = unit(a)
        positive = torch.exp(dot(a, unit(b)) / temperature)
        negatives = sum(torch.exp(dot(a, n) / temperature) for n in queue)
        losses.append(-torch.log(positive / (positive + negatives)))
    return mean(losses)


def relational(query, key, queue, temperature_q, temperature_k):
    """ReSSL, Eq. 4 to 6; `queue` is a sequence of unit rows."""
    losses = []
    for a, b in zip(query, key, strict=True):
        a, b = unit(a), unit(b)
        weak = probabilities([dot(b, n) for n in queue], temperature_k)
        losses.append(cross_entropy(weak, probabilities([dot(a, n) for n in queue], temperature_q)))
    return mean(losses)


def directions(term, queries, targets):
    """term(query, target) of all pairs of different views."""
    return [term(q, k) for j, k in enumerate(targets) for i, q in enumerate(queries) if i != j]
