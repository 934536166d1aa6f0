"""Counts the collectives of DDP in a run's training steps, and the bytes that they move; each process prints its own.
A module for `callbacks`."""

import os

import lightning.pytorch as pl
import torch
import torch.distributed as dist

COUNTS: dict[str, list[int]] = {}


def counted(name, function):
    def call(*args, **kwargs):
        tensors = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg]) if torch.is_tensor(x)]
        COUNTS.setdefault(name, []).append(sum(x.numel() * x.element_size() for x in tensors))
        return function(*args, **kwargs)

    return call


class Count(pl.Callback):
    """Prints what the steps between the first and the last did."""

    def on_train_batch_end(self, trainer, module, out, batch, i):
        if i == 0:
            for name in ("_broadcast_coalesced", "barrier", "broadcast", "all_gather", "all_reduce"):
                setattr(dist, name, counted(name, getattr(dist, name)))
        if i == trainer.num_training_batches - 2:
            os.write(1, f"rank {trainer.global_rank}: {COUNTS}\n".encode())  # at once: the processes share the output
