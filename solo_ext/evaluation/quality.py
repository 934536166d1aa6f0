"""How good features are, told without labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-7
DELTA = 1e-4  # added to LiDAR's covariance inside objects, as its authors do


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of non-negative numbers [n], taken as shares of their sum: n if all are equal, 1 for a single
    one."""
    return torch.special.entr(values / values.sum()).sum().exp()


def rankme(features: Tensor) -> Tensor:
    """The effective rank of the singular values of features [N, D]: from min(N, D) down to 1, where all are on one line
    (Garrido et al., 2023, Eq. 1)."""
    z = features.double()
    # singular values from the smaller of the two products, for which float32 is too short
    values = torch.linalg.eigvalsh(z @ z.T if len(z) < z.shape[1] else z.T @ z)
    return effective_rank(values.clamp(min=0).sqrt())


def lidar(features: Tensor) -> Tensor:
    """The effective rank of the linear discriminant that tells N objects apart by V views of each, [N, V, D] (Thilak et
    al., 2024, Eq. 1 to 3)."""
    z = features.double()
    centres = z.mean(1)
    apart, inside = centres - centres.mean(0), (z - centres[:, None]).flatten(0, 1)
    between = apart.T @ apart / len(apart)
    within = inside.T @ inside / len(inside) + DELTA * torch.eye(z.shape[2], dtype=z.dtype, device=z.device)
    scale, axes = torch.linalg.eigh(within)
    root = axes / scale.sqrt()
    return effective_rank(torch.linalg.eigvalsh(root.T @ between @ root).clamp(min=0) + EPS)


def alignment(features: Tensor) -> Tensor:
    """Mean squared distance of the unit features of pairs of views, [N, V, D]: 0 where a view makes no difference (Wang
    and Isola, 2020, Eq. 1, alpha 2)."""
    z = F.normalize(features.double(), dim=2)
    views = z.shape[1]
    # over all pairs of different views: |a - b|^2 = 2 - 2 ab
    same = (z.sum(1).square().sum(1) - views) / (views * (views - 1))
    return (2 - 2 * same).mean()


def uniformity(features: Tensor) -> Tensor:
    """log of the mean Gaussian of the distances of unit features [N, D]: 0 where all are in one point, the lower the
    more evenly they fill the sphere (Wang and Isola, 2020, Eq. 2, t 2)."""
    z = F.normalize(features.double(), dim=1)
    return torch.pdist(z).square().mul(-2).exp().mean().log()


def spread(features: Tensor) -> Tensor:
    """Mean standard deviation of the entries of unit features [N, D], times sqrt(D): 1 where they fill the sphere, 0
    where they have collapsed (SimSiam, Fig. 2)."""
    z = F.normalize(features.double(), dim=1)
    return z.std(0).mean() * z.shape[1] ** 0.5


def quality(features: Tensor) -> dict[str, float]:
    """All of these, of V views of each of N images, [N, V, D]; those of single images by their first view."""
    first = features[:, 0]
    single = {"rankme": rankme, "uniformity": uniformity, "spread": spread}
    pairs = {"lidar": lidar, "alignment": alignment}
    found = {name: float(measure(first)) for name, measure in single.items()}
    return found | {name: float(measure(features)) for name, measure in pairs.items()}
