"""Two ranks (gloo) equal one process with the joint batch, in float64: losses, gradients, queue, centre, whole runs;
kNN of features that they share."""

import os

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from conftest import fit, method_config, own_kwargs
from frameworks import SPECS, ids
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.modules.batchnorm import _BatchNorm

from solo_ext.evaluation.knn import knn_accuracy
from solo_ext.losses import Center, dino, enqueue, gather_each, info_nce, nt_xent, queue_nce, relational
from solo_ext.losses.distributed import gather
from solo_ext.methods import METHODS

pytestmark = pytest.mark.slow  # two processes train every framework
RANKS, STEPS, IMAGES, WIDTH = 2, 3, 3, 5  # images per rank
VIEWS, QUEUES = 3, (8, 5)  # keys that the joint batch does not divide; fewer keys than the joint batch


def own(x, rank):
    """The images of one rank, or of all (None), from a joint batch [V, W B, ...]."""
    return x if rank is None else x[:, rank * IMAGES : (rank + 1) * IMAGES]


def queued(size, dim, loss):
    """A loss against queues, one per view and two views of keys, that the keys of each step enter."""
    generator = torch.Generator().manual_seed(size)
    queue = torch.randn((2, WIDTH, size) if dim else (size, WIDTH), generator=generator, dtype=torch.float64)
    queue = torch.nn.functional.normalize(queue, dim=1)
    pointer = torch.zeros(1, dtype=torch.long)

    def step(q, k):
        value = loss(q, k, queue)
        value.backward()
        enqueue(queue, pointer, k[:2] if dim else k[1])
        return value

    return step, {"queue": queue, "pointer": pointer}


def centred():
    center = Center(WIDTH).double()

    def step(q, k):
        value = dino(q[0], k[1], center.center, 0.1, 0.05) + dino(q[2], k[0], center.center, 0.1, 0.05)
        value.backward()
        center.update(k[:2])
        return value

    return step, {"center": center.center}


def stateless(loss):
    def step(q, k):
        value = loss(q, k)
        value.backward()
        return value

    return step, {}


def weighted(q, k):
    """Squares of all ranks' rows, each with a weight of its own, averaged."""
    rows = gather(q[0])
    return (rows.square() * torch.arange(1.0, len(rows) + 1, dtype=rows.dtype)[:, None]).sum() / len(rows)


LOSSES = {
    "gather": lambda: stateless(weighted),
    "info_nce": lambda: stateless(lambda q, k: info_nce(q[0], gather_each(k)[1], 0.2)),
    "nt_xent": lambda: stateless(lambda q, k: nt_xent(q.unbind(), 0.2)),
    "nt_xent, momentum target": lambda: stateless(lambda q, k: nt_xent(q.unbind(), 0.2, k.unbind())),
    "nt_xent, two large crops": lambda: stateless(lambda q, k: nt_xent(q.unbind(), 0.2, k[:2].unbind())),
    "dino": centred,
    **{
        f"queue_nce, {size} keys": lambda size=size: queued(
            size, 2, lambda q, k, queue: queue_nce(q[0], k[1], queue[1], 0.2) + queue_nce(q[1], k[0], queue[0], 0.2)
        )
        for size in QUEUES
    },
    **{
        f"relational, {size} keys": lambda size=size: queued(
            size, 0, lambda q, k, queue: relational(q[0], k[1], queue, 0.1, 0.04)
        )
        for size in QUEUES
    },
}


def losses(rank=None):
    """name -> what some steps of each loss give: values, gradients of the queries and of the keys, the state after."""
    results = {}
    for name, make in LOSSES.items():
        step, state = make()
        generator = torch.Generator().manual_seed(1)
        values, gradients = [], []
        for _ in range(STEPS):
            q, k = torch.randn(2, VIEWS, RANKS * IMAGES, WIDTH, generator=generator, dtype=torch.float64)
            q, k = (own(x, rank).clone().requires_grad_() for x in (q, k))
            values.append(step(q, k).detach())
            gradients.append(q.grad)
            assert k.grad is None
        results[name] = {"values": torch.stack(values), "gradients": torch.stack(gradients), "state": state}
    return results


# a ViT has no BatchNorm, whose statistics would be those of the rank's images only
VIT = {
    "backbone__name": "vit_tiny",
    "backbone__kwargs": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2},
    "optimizer__lr": 0.5,
}
METHOD_RUNS = [row for name, spec in SPECS.items() for row in spec.ranks or [(name, {})]]


class FixedNorms(pl.Callback):
    """The heads' BatchNorms normalise with their running statistics, which stay as they are."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        for norm in module.modules():
            if isinstance(norm, _BatchNorm):
                norm.eval()


def runs(rank=None):
    """name -> (logged loss, state_dict) after some steps of SGD with each method."""
    generator = torch.Generator().manual_seed(2)
    views = torch.randn(STEPS, 2, RANKS * IMAGES, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (STEPS, 1, RANKS * IMAGES), generator=generator)
    batches = [(torch.arange(IMAGES), list(own(x, rank)), own(y, rank)[0]) for x, y in zip(views, labels, strict=True)]
    results = {}
    for name, (method, changes) in zip(ids(METHOD_RUNS), METHOD_RUNS, strict=True):
        torch.manual_seed(0)
        model = METHODS[method](
            method_config(method, **VIT, **own_kwargs(method, queue_size=8, num_prototypes=6), **changes)
        )
        # buffers are not broadcast: they have to be equal without
        strategy = {} if rank is None else {"strategy": DDPStrategy(broadcast_buffers=False), "devices": RANKS}
        trainer = fit(
            model, batches, callbacks=[FixedNorms()], precision="64-true", use_distributed_sampler=False, **strategy
        )
        results[name] = trainer.callback_metrics["train_loss"], model.state_dict()
    return results


def neighbours(rank=None):
    """The accuracies by a bank of 45 features, of which a rank has every second one, and 21 queries and one that counts
    nowhere; by more neighbours than a rank has, too. Only the first rank has the last class."""
    generator = torch.Generator().manual_seed(3)
    bank, query = (torch.randn(n, WIDTH, generator=generator) for n in (45, 22))
    classes, labels = torch.randint(6, (45,), generator=generator), torch.randint(6, (22,), generator=generator)
    classes[:2], labels[-1] = torch.tensor([6, -1]), -1
    own = slice(rank, None, None if rank is None else RANKS)
    sides = [x[own] for x in (bank, classes, query, labels)]
    return [knn_accuracy(*sides, [1, 5, 40], distance, shared=True) for distance in ("cosine", "euclidean")]


def both(rank=None):
    return {"losses": losses(rank), "runs": runs(rank), "neighbours": neighbours(rank)}


def one_rank(rank, folder):
    # Lightning takes the process group as it is, and this process for one of a launcher's
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), NODE_RANK="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save(both(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank found, and what one process finds with the joint batch."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = torch.multiprocessing.spawn(one_rank, (folder,), nprocs=RANKS, join=False)
    joint = both()
    while not ranks.join():
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)], joint


def assert_equal(actual, expected, name=None):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=name and (lambda text: f"{name}: {text}"))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_gradients_queues_and_centre(name, results):
    ranks, joint = ([r["losses"][name] for r in results[0]], results[1]["losses"][name])
    assert_equal(sum(r["values"] for r in ranks) / RANKS, joint["values"])
    # DistributedDataParallel averages the gradients that the queries pass on
    assert_equal(torch.cat([r["gradients"] for r in ranks], dim=2) / RANKS, joint["gradients"])
    for rank in ranks:
        for tensor, expected in joint["state"].items():
            assert_equal(rank["state"][tensor], expected, tensor)


def test_shared_neighbours(results):
    ranks, joint = results
    assert ranks[0]["neighbours"] == ranks[1]["neighbours"] == joint["neighbours"]
    assert len({scores["acc1"] for found in joint["neighbours"] for scores in found.values()}) > 2


@pytest.mark.parametrize("name", ids(METHOD_RUNS))
def test_a_run_on_two_ranks(name, results):
    """Weights, teacher, queue and centre."""
    expected_loss, expected = results[1]["runs"][name]
    for rank in results[0]:
        loss, state = rank["runs"][name]
        assert_equal(loss, expected_loss)
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(state[key], value, key)
