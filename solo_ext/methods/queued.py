"""What MoCo v2+ and ReSSL share: a queue of the target branch's earlier outputs, the negatives of the next batches."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.losses import enqueue
from solo_ext.methods.base import Method
from solo_ext.schema import Count


class QueuedMethod(Method):
    """A framework whose `loss` reads `self.queue`; the batch's targets enter it after the backward pass."""

    queue: Tensor
    queue_ptr: Tensor

    @dataclass
    class Kwargs(Method.Kwargs):
        queue_size: Count = 65536

    def build_queue(self, *shape: int, dim: int) -> None:
        """Registers `queue`, of unit vectors along dimension 1, counted by dimension `dim`, and its pointer.

        shape: [K, D] for one queue, [V, D, K] for one of each target view.
        """
        self.queue_dim = dim
        self.register_buffer("queue", F.normalize(torch.randn(*shape), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def remember(self, targets: list[Tensor]) -> None:
        keys = torch.stack(targets) if self.queue.dim() == 3 else targets[0]
        enqueue(self.queue, self.queue_ptr, keys, self.queue_dim)
