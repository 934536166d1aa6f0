"""What the features of an evaluation take of the memory, in a process of its own, which should import little."""

import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from solo_ext.evaluation.features import extract_features
from solo_ext.evaluation.linear import fit_cached_linear
from solo_ext.optim import OptimizerConfig, SchedulerConfig


def memory_of_evaluations(pipe):
    """Peaks of memory, in sizes of 2^17 features of width 512: of their extraction in float16, then in float32, and
    of a linear evaluation after it; then by a file, where the process may take 0.4 sizes besides mapped files."""
    torch.set_num_threads(1)
    batch = torch.arange(1024), [torch.randn(1024, 1, 16, 32)], torch.arange(1024) % 10
    start, options = 0, {"optimizers": [OptimizerConfig("sgd", batch_size=2048, lr=0.1)], "epochs": 1}

    def peaks(kept, batches=128):
        features, labels = extract_features(nn.Flatten(), [batch] * batches, kept=kept)
        yield (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 2**18
        fit_cached_linear(features, labels, features[:99], labels[:99], scheduler=SchedulerConfig("none"), **options)
        yield (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 2**18

    [*peaks("float32", batches=2)]  # what is loaded once
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send([next(peaks("float16")), *peaks("float32")])
    taken = 1024 * int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (taken + int(0.4 * 2**28), resource.RLIM_INFINITY))
    pipe.send([*peaks("file")])
    with pytest.raises(MemoryError):
        next(peaks("float16"))
    pipe.send("refused")
