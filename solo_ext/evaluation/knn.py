"""k-nearest-neighbour accuracy of features, with the vote of solo-learn's WeightedKNNClassifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.evaluation.features import labelled
from solo_ext.schema import Config, Count, Positive, fit

Distance = Literal["cosine", "euclidean"]
BLOCK = 2**24  # entries of the distance matrix at a time (64 MiB in float32)


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
) -> dict[int, dict[str, float]]:
    """Accuracy of a weighted vote of the k nearest features of the bank: {k: {"acc1": percent, "acc5": percent}}.

    A neighbour's weight is exp(cosine / temperature), or 1 / (euclidean distance + 1e-5). Ties go to the lower class.
    A k above the size of the bank counts as that size; acc5 counts the min(5, k) best classes. `bank` [N, D] and
    `query` [M, D] are on one device; images without label (-1) are left out. Raises `DataError` if none is left, and
    `ConfigError` for an unknown distance, a k below 1 or a temperature that is not above 0.
    """
    ks: list[int] = list(dict.fromkeys(fit(list[Count], [k] if isinstance(k, int) else k, "k")))
    fit(Distance, distance, "distance")
    fit(Positive, temperature, "temperature")
    bank, bank_labels = labelled(bank, bank_labels, "kNN", "bank")
    query, labels = labelled(query, labels, "kNN", "query")
    if distance == "cosine":
        bank, query = F.normalize(bank), F.normalize(query)

    classes = int(bank_labels.max()) + 1
    hits = {k: [0, 0] for k in ks}
    rows = max(1, BLOCK // max(len(bank), classes))
    for features, targets in zip(query.split(rows), labels.split(rows), strict=True):
        weights, index = _neighbours(features, bank, min(max(ks), len(bank)), distance, temperature)
        for k in ks:
            # in float64, so that the order of summation cannot decide a vote
            votes = torch.zeros(len(features), classes, dtype=torch.float64, device=bank.device)
            votes.scatter_add_(1, bank_labels[index[:, :k]], weights[:, :k].double())
            right = votes.sort(dim=1, descending=True, stable=True).indices == targets[:, None]
            hits[k][0] += int(right[:, 0].sum())
            hits[k][1] += int(right[:, : min(5, k)].sum())
    return {k: {"acc1": 100 * one / len(query), "acc5": 100 * five / len(query)} for k, (one, five) in hits.items()}


def _neighbours(features: Tensor, bank: Tensor, k: int, distance: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Weights and bank indices [B, k] of the k nearest, nearest first."""
    if distance == "euclidean":
        far, index = torch.cdist(features, bank).topk(k, largest=False)
        return 1 / (far + 1e-5), index
    near, index = (features @ bank.T).topk(k)
    # divided by the nearest one's weight, which changes no vote: exp(1 / 0.01) overflows float32
    return ((near - near[:, :1]) / temperature).exp(), index
