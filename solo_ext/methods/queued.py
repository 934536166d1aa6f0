"""What MoCo v2+ and ReSSL share: a queue of the target branch's earlier outputs, the negatives of the next batches."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from solo_ext.losses import enqueue
from solo_ext.methods.base import Method


class QueuedMethod(Method):
    """A framework whose `loss` reads `self.queue` and leaves the batch's keys in `self.fresh`.

    They enter the queue after the backward pass, which still reads the old ones: no copy of the queue is made.
    """

    @dataclass
    class Kwargs(Method.Kwargs):
        queue_size: int = 65536

    def build_queue(self, *shape: int, dim: int) -> None:
        """Registers `queue`, of unit vectors along dimension 1, counted by dimension `dim`, and its pointer."""
        self.queue_dim = dim
        self.register_buffer("queue", F.normalize(torch.randn(*shape), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.fresh: Tensor | None = None

    def on_after_backward(self) -> None:
        if self.fresh is not None:
            enqueue(self.queue, self.queue_ptr, self.fresh, self.queue_dim)
            self.fresh = None
