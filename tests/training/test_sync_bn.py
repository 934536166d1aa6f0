"""BatchNorm on two CPU ranks equals BatchNorm on the joint batch: values, gradients, running statistics."""

import copy

import pytest
import timm.layers
import torch
import torch.distributed as dist
from conftest import build, random_batches
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from solo_ext.training.sync_bn import CPUSyncBatchNorm, SyncNorms

CHANNELS, STEPS = 4, 3
LAYERS = {
    "1d": lambda: nn.BatchNorm1d(CHANNELS),
    "2d": lambda: nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3),
    "cumulative average": lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
    "kept statistics": lambda: nn.BatchNorm2d(CHANNELS, momentum=0.0),
    "no affine": lambda: nn.BatchNorm1d(CHANNELS, affine=False),
    "no statistics": lambda: nn.BatchNorm1d(CHANNELS, track_running_stats=False),
    "timm's with activation": lambda: timm.layers.BatchNormAct2d(CHANNELS),
    "large mean": lambda: nn.BatchNorm1d(CHANNELS),
    "bfloat16": lambda: nn.BatchNorm2d(CHANNELS),
}
SHARES = {"even": (4, 4), "uneven": (3, 5), "one rank without images": (0, 8)}
CASES = [(layer, share) for layer in LAYERS for share in SHARES]


def steps(name, share, rank=None, sync=None):
    """What some steps of a layer give on the images of one rank, or on all (None); then one of evaluation."""
    generator = torch.Generator().manual_seed(0)
    kind = {"bfloat16": torch.bfloat16}.get(name, torch.float64)
    layer = LAYERS[name]()
    layer = layer if name == "bfloat16" else layer.double()
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.uniform_(-1, 2, generator=generator)
            layer.bias.normal_(generator=generator)
    sizes = [CHANNELS, 5, 3] if isinstance(layer, nn.BatchNorm2d) else [CHANNELS]
    rows = slice(*{None: (0, 8), 0: (0, share[0]), 1: (share[0], 8)}[rank])
    if sync:
        layer = sync.apply(nn.Sequential(layer))[0]
    found = []
    for _ in range(STEPS):
        x, weights = torch.randn(2, 8, *sizes, generator=generator, dtype=torch.float64)
        x = x + 1e4 if name == "large mean" else x
        x = x.to(kind)[rows].clone().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        (y.double() * weights[rows]).sum().backward()
        found.append({"y": y.detach(), "x.grad": x.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    with torch.no_grad():
        evaluated = layer.eval()(torch.randn(8, *sizes, generator=generator, dtype=torch.float64).to(kind))
    return {"steps": found, "evaluated": evaluated, "state": layer.state_dict()}


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(
        {case: steps(case[0], SHARES[case[1]], rank, SyncNorms(on_gpu=False)) for case in CASES}, folder / f"{rank}.pt"
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["solo_ext.training.pretrain"])
    torch.multiprocessing.start_processes(one_rank, (folder,), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_equals_the_joint_batch(case, ranks):
    joint, (first, second) = steps(case[0], SHARES[case[1]]), (rank[case] for rank in ranks)
    # at a mean of 1e4 the inputs themselves are only good to 1e-12
    tolerance = {"large mean": 1e-7, "bfloat16": 2e-2}.get(case[0], 1e-10)
    for mine, other, expected in zip(first["steps"], second["steps"], joint["steps"], strict=True):
        for name in expected:
            both = mine[name], other[name]
            actual = torch.cat(both) if name in ("y", "x.grad") else sum(both)
            torch.testing.assert_close(actual, expected[name], rtol=tolerance, atol=tolerance, msg=name)
    for rank in (first, second):
        torch.testing.assert_close(rank["evaluated"], joint["evaluated"], rtol=tolerance, atol=tolerance)
        assert rank["state"].keys() == joint["state"].keys()
        for name, value in joint["state"].items():
            torch.testing.assert_close(rank["state"][name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_without_a_process_group_it_is_batchnorm(name, on_gpu):
    plain, synced = (steps(name, SHARES["even"], sync=sync) for sync in (None, SyncNorms(on_gpu)))
    torch.testing.assert_close(synced, plain, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["byol", "projector_ema_mocov3", "res_byol"])
def test_a_method_keeps_its_tensors_hooks_and_teacher(method):
    [batch] = random_batches(1)
    model = build(method)
    x, before = batch[1][0], model.state_dict()
    expected = copy.deepcopy(model)
    norms = {name: type(module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    sync = SyncNorms(on_gpu=False)
    assert sync.apply(model) is model
    twin = copy.deepcopy(model)  # as `anatomy` and the checks of a run make one
    for network in (model, twin):
        synced = {name for name, module in network.named_modules() if isinstance(module, CPUSyncBatchNorm)}
        assert synced == norms.keys() and any(name.startswith("momentum_") for name in synced)
        assert network.state_dict().keys() == before.keys()
    assert all(
        value is before[name] or value.data_ptr() == before[name].data_ptr()
        for name, value in model.state_dict().items()
    )
    for network in (model, expected):
        network.result = network.teach(x, network.student(x), "projector")["projector"]
    torch.testing.assert_close(model.result, expected.result, rtol=0, atol=0)
    sync.revert(model)
    assert {name: type(model.get_submodule(name)) for name in norms} == norms
