"""k-nearest-neighbour accuracy of features, with the vote of solo-learn's WeightedKNNClassifier."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.evaluation.features import labelled
from solo_ext.losses.distributed import gather_no_grad, max_over_ranks
from solo_ext.schema import Config, Count, Positive, fit

Distance = Literal["cosine", "euclidean"]
# queries and features of the bank at a time: 64 MiB of similarities, enough for matrix products at full speed
ROWS, COLUMNS = 2**10, 2**14


@dataclass
class KNNConfig(Config, section="knn_eval"):
    """`knn_eval`: solo-learn's keys, and `every`, the number of epochs from one online evaluation to the next."""

    enabled: bool = False
    k: Count = 20
    distance_func: Distance = "euclidean"
    every: Count = 1


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    query: Tensor,
    labels: Tensor,
    k: int | Sequence[int] = 20,
    distance: Distance = "cosine",
    temperature: float = 0.07,
    shared: bool = False,
) -> dict[int, dict[str, float]]:
    """Accuracy of a weighted vote of the k nearest features of the bank: {k: {"acc1": percent, "acc5": percent}}.

    A neighbour's weight is exp(cosine / temperature), or 1 / (euclidean distance + 1e-5). Ties go to the lower class.
    A k above the size of the bank counts as that size; acc5 counts the min(5, k) best classes. `bank` [N, D] and
    `query` [M, D] may stay on the CPU: blocks of them are compared where the labels are. Images without label (-1) are
    left out. shared: each process has a share of both, with the same M, and gets the result of the whole. Raises
    `DataError` if none is left, and `ConfigError` for an unknown distance, a k below 1 or a temperature that is not
    above 0.
    """
    ks: list[int] = list(dict.fromkeys(fit(list[Count], [k] if isinstance(k, int) else k, "k")))
    fit(Distance, distance, "distance")
    fit(Positive, temperature, "temperature")
    if shared:
        query, labels = gather_no_grad(query), gather_no_grad(labels)
    labelled(bank_labels, "kNN", "bank")
    count = len(labelled(labels, "kNN", "query"))
    highest = bank_labels.max()
    classes = int(max_over_ranks(highest) if shared else highest) + 1

    hits = {k: [0, 0] for k in ks}
    rows = max(1, min(ROWS, ROWS * COLUMNS // classes))
    for features, targets in zip(query.split(rows), labels.split(rows), strict=True):
        near, found = _nearest(features.to(labels.device).float(), bank, bank_labels, max(ks), distance)
        if shared:
            near, order = gather_no_grad(near.T).T.topk(max(ks))
            found = gather_no_grad(found.T).T.gather(1, order)
        if distance == "euclidean":
            weights = 1 / (near.neg().sqrt() + 1e-5)
        else:  # divided by the nearest one's weight, which changes no vote: exp(1 / 0.01) overflows float32
            weights = ((near - near[:, :1]) / temperature).exp()
        for k in ks:
            # in float64, so that the order of summation cannot decide a vote
            votes = torch.zeros(len(targets), classes, dtype=torch.float64, device=labels.device)
            votes.scatter_add_(1, found[:, :k].clamp(min=0), weights[:, :k].double())
            right = votes.sort(dim=1, descending=True, stable=True).indices == targets[:, None]
            hits[k][0] += int(right[:, 0].sum())
            hits[k][1] += int(right[:, : min(5, k)].sum())
    return {k: {"acc1": 100 * one / count, "acc5": 100 * five / count} for k, (one, five) in hits.items()}


def _nearest(query: Tensor, bank: Tensor, labels: Tensor, k: int, distance: Distance) -> tuple[Tensor, Tensor]:
    """Of the k labelled features in the bank that are nearest to each query [B, D], nearest first, the cosines or the
    negative squared distances [B, k], and the labels [B, k]; where there are fewer, -inf and some label."""
    euclidean = distance == "euclidean"
    query = query if euclidean else F.normalize(query)
    near, found = query.new_full((len(query), k), -math.inf), labels.new_zeros(len(query), k)
    for part, classes in zip(bank.split(COLUMNS), labels.split(COLUMNS), strict=True):
        part = part.to(query)
        part = part if euclidean else F.normalize(part)
        shift = part.square().sum(1).neg() if euclidean else part.new_zeros(len(part))
        scores = torch.addmm(shift.masked_fill(classes == -1, -math.inf), query, part.T, alpha=2 if euclidean else 1)
        best, index = scores.topk(min(k, len(part)))
        near, order = torch.cat([near, best], 1).topk(k)
        found = torch.cat([found, classes[index]], 1).gather(1, order)
    return (near - query.square().sum(1, keepdim=True)).clamp(max=0) if euclidean else near, found
