"""What mixed precision does to metrics, statistics and averages, and the precisions that are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from solo_ext.errors import ConfigError
from solo_ext.evaluation.linear import classify
from solo_ext.methods.module import pooled
from solo_ext.networks import DINOHead
from solo_ext.training.trainer_config import TrainerConfig

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_classes_do_not_tie(dtype):
    """Logits that differ by less than 16 bits resolve are told apart, by an online probe as by an offline one."""
    torch.manual_seed(0)
    probe, features = nn.Linear(64, 1000), torch.randn(256, 64).to(dtype)
    with torch.autocast("cpu", dtype):
        logits = classify(probe, features)
    assert logits.dtype == torch.float32
    assert torch.equal(
        logits.argmax(1), F.linear(features.double(), *map(torch.Tensor.double, probe.parameters())).argmax(1)
    )


@pytest.mark.parametrize("shape", [(64, 8, 7, 7), (64, 50, 8)])
def test_stages_are_compared_in_float32(shape):
    x = (3 + torch.randn(shape)).bfloat16()
    places = (2, 3) if len(shape) == 4 else 1
    torch.testing.assert_close(pooled(x), x.double().mean(places).float(), rtol=1e-6, atol=1e-6)


def test_dinos_bottleneck_is_normalised_in_float32():
    head = DINOHead(16, 32, 8, 64)
    seen = []
    head.last_layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        head(torch.randn(32, 16))
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(32), rtol=1e-6, atol=0)
    assert head.double()(torch.randn(2, 16, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_running_statistics_of_narrow_activations(dtype):
    """PyTorch keeps them in float32: nothing is to be done."""
    norm, x = nn.BatchNorm1d(16), (5 + 3 * torch.randn(256, 16)).to(dtype)
    with torch.autocast("cpu", dtype):
        norm(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.double().mean(0).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.double().var(0).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision, instead", [("bf16-true", "bf16-mixed"), ("16-true", "16-mixed")])
def test_weights_in_16_bits_are_refused(precision, instead):
    """An average in bfloat16 stands still: after 200 updates at tau 0.996 it is not a fifth of its way on."""
    with pytest.raises(ConfigError, match=f"^precision: {precision} keeps averages in 16 bits.*; use {instead}$"):
        TrainerConfig(precision=precision)
    with pytest.raises(ConfigError, match=r"^precision must be "):
        TrainerConfig(precision="transformer-engine")  # whose weights are bfloat16, too
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    average, student = start.clone(), start + 0.01
    for _ in range(200):
        average.lerp_(student, 1 - 0.996)
    assert (average - start).double().norm() < 0.2 * (student - start).double().norm() * (1 - 0.996**200)
