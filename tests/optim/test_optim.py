"""LARS and the schedules against float64 transcriptions and solo-learn; parameter groups; what is refused."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import fit, random_batches
from omegaconf import OmegaConf
from torch import nn

from solo_ext.errors import ConfigError
from solo_ext.optim import LARS, OptimizerConfig, SchedulerConfig, build_optimizer, build_scheduler
from solo_ext.optim.config import effective_lrs, split_no_decay
from solo_ext.optim.schedules import ClosedFormLR, multi_step_lr, warmup_cosine_lr
from solo_ext.schema import build

SHAPES = [(4, 3), (4,), (2, 3, 3, 3), (1, 5), (3, 2), (5,), ()]
ZERO_WEIGHT, ZERO_GRADIENT = 3, 4


def weights():
    rng = np.random.default_rng(0)
    return [0.0 * rng.normal(size=s) if i == ZERO_WEIGHT else rng.normal(size=s) for i, s in enumerate(SHAPES)]


def gradients(step):
    rng = np.random.default_rng(step + 1)
    return [0.0 * rng.normal(size=s) if i == ZERO_GRADIENT else rng.normal(size=s) for i, s in enumerate(SHAPES)]


def run(make_optimizer, steps=10, dtype=torch.float64):
    params = [nn.Parameter(torch.as_tensor(np.asarray(w), dtype=dtype)) for w in weights()]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = make_optimizer(params)
    for step in range(steps):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad.copy_(torch.as_tensor(np.asarray(g)))
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
    return params


def lars_by_hand(
    steps, lr, momentum, weight_decay, nesterov, dampening, clip_lr, exclude_bias_n_norm, eta=0.02, eps=1e-8
):
    ws, velocities = weights(), [None] * len(SHAPES)
    for step in range(steps):
        for i, g in enumerate(gradients(step)):
            w = ws[i]
            w_norm, g_norm = math.sqrt((w**2).sum()), math.sqrt((g**2).sum())
            excluded = exclude_bias_n_norm and w.ndim == 1
            if not excluded and w_norm > 0 and g_norm > 0:
                trust = eta * w_norm / (g_norm + weight_decay * w_norm + eps)
                if clip_lr and trust > lr:
                    trust = lr
                g = (trust / lr if clip_lr else trust) * (g + weight_decay * w)
            if momentum:
                first = velocities[i] is None
                velocities[i] = g if first else momentum * velocities[i] + (1 - dampening) * g
                g = g + momentum * velocities[i] if nesterov else velocities[i]
            ws[i] = w - lr * g
    return ws


LARS_OPTIONS = [
    dict(
        zip(
            ("lr", "momentum", "weight_decay", "nesterov", "dampening", "clip_lr", "exclude_bias_n_norm"),
            v,
            strict=True,
        )
    )
    for v in itertools.product(
        (0.3, 0.005), (0.0, 0.9), (0.0, 1e-2), (False, True), (0.0, 0.3), (False, True), (False, True)
    )
    if not (v[3] and (v[1] == 0 or v[4] > 0))
]


def test_lars_against_transcription():
    for options in LARS_OPTIONS:
        expected = lars_by_hand(10, **options)
        for ours, theirs in zip(run(lambda p, o=options: LARS(p, eta=0.02, **o)), expected, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-12, atol=1e-14, err_msg=str(options))


def test_lars_against_solo_learn(solo_learn):
    from solo.utils.lars import LARS as Theirs

    for options in LARS_OPTIONS:
        ours = run(lambda p, o=options: LARS(p, eta=0.02, **o), dtype=torch.float32)
        theirs = run(lambda p, o=options: Theirs(p, eta=0.02, **o), dtype=torch.float32)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=lambda m, o=options: f"{o}: {m}")


def test_lars_skips_parameters_without_gradient():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([used, unused], lr=0.1, momentum=0.9, weight_decay=0.1)
    used.grad = torch.ones(2, 2)
    assert optimizer.step(lambda: torch.tensor(3.0)).item() == 3.0
    assert torch.equal(unused, torch.ones(2, 2)) and not torch.equal(used, torch.ones(2, 2))
    unused.grad = torch.ones(2, 2)  # a gradient that appears later starts its own momentum
    optimizer.step()
    assert not torch.equal(unused, torch.ones(2, 2))


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_never_waits_for_the_device(nesterov):
    """Tensors on the meta device have no values, so reading one to decide something would fail."""
    params = [nn.Parameter(torch.ones(s, device="meta")) for s in SHAPES]
    optimizer = LARS(params, lr=0.1, momentum=0.9, weight_decay=0.1, clip_lr=True, nesterov=nesterov)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


def test_lars_resumes_exactly():
    def resumed(params):
        optimizer = LARS(params, lr=0.3, momentum=0.9)
        step = optimizer.step

        def reload_then_step():
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            step()

        optimizer.step = reload_then_step
        return optimizer

    for a, b in zip(run(lambda p: LARS(p, lr=0.3, momentum=0.9)), run(resumed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {key: bad}
        for key in ("lr", "momentum", "weight_decay", "dampening", "eta", "eps")
        for bad in (math.nan, -1.0, math.inf)
    ]
    + [{"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}],
)
def test_lars_refuses(options):
    with pytest.raises(ConfigError):
        LARS([nn.Parameter(torch.ones(1))], **{"lr": 0.1, **options})


def test_lars_refuses_a_bad_group():
    with pytest.raises(ConfigError, match="lr must be a finite number"):
        LARS([{"params": [nn.Parameter(torch.ones(1))], "lr": math.nan}], lr=0.1)


# Schedules.


def recursion(base, warmup, total, start, minimum):
    """The published recursion, from each step's lr to the next (whole warm-up steps)."""
    lr = start
    for step in range(total + 1):
        if step == 0:
            pass
        elif step < warmup:
            lr += (base - start) / (warmup - 1)
        elif step == warmup:
            lr = base
        else:
            ratio = [1 + math.cos(math.pi * (s - warmup) / (total - warmup)) for s in (step, step - 1)]
            lr = ratio[0] / ratio[1] * (lr - minimum) + minimum
        yield lr


@pytest.mark.parametrize("warmup", [1, 2, 10])
@pytest.mark.parametrize(("start", "minimum"), [(0.0, 0.0), (3e-5, 0.0), (0.1, 0.02)])
def test_warmup_cosine_is_the_recursion(warmup, start, minimum):
    expected = list(recursion(0.4, warmup, 60, start, minimum))
    ours = [warmup_cosine_lr(step, 0.4, warmup, 60, start, minimum) for step in range(61)]
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)
    assert max(ours) == pytest.approx(0.4) and ours[-1] == pytest.approx(minimum)


def test_warmup_cosine_at_its_edges():
    assert warmup_cosine_lr(0, 0.4, 0, 10, 1e-5) == 0.4  # no warm-up
    assert [warmup_cosine_lr(s, 0.4, 1, 10, 0.1) for s in (0, 1)] == [0.1, 0.4]
    assert [warmup_cosine_lr(s, 0.4, 0.5, 10, 0.1) == 0.1 for s in (0, 1)] == [True, False]
    fractional = [warmup_cosine_lr(s, 0.4, 2.5, 10) for s in range(11)]
    assert max(fractional) == 0.4 and fractional == sorted(fractional[:3]) + sorted(fractional[3:], reverse=True)
    assert warmup_cosine_lr(5, 0.4, 10, 5, 0.0) == pytest.approx(0.4 * 5 / 9)  # a run shorter than its warm-up
    assert warmup_cosine_lr(10, 0.4, 10, 10) == 0.4
    assert warmup_cosine_lr(50, 0.4, 2, 10, 0.0, 0.01) == pytest.approx(0.01)  # past the end


def group(lr, **options):
    return {"params": [nn.Parameter(torch.ones(1))], "lr": lr, **options}


def stepped(optimizer, scheduler, steps):
    rows = []
    for _ in range(steps):
        rows.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return np.array(rows)


@pytest.mark.parametrize("schedule", ["warmup_cosine", "step"])
def test_scheduler_moves_each_group_but_the_static(schedule):
    optimizer = torch.optim.SGD([group(0.4), group(0.1), group(0.2, static_lr=True)], lr=1.0)
    cfg = SchedulerConfig(name=schedule, warmup_epochs=2, lr_decay_steps=[3, 5])
    entry = build_scheduler(optimizer, cfg, total_steps=60, max_epochs=6)
    assert entry["interval"] == {"warmup_cosine": "step", "step": "epoch"}[schedule]
    if schedule == "step":
        expected = [[lr * 0.1 ** ((e >= 3) + (e >= 5)) for lr in (0.4, 0.1)] for e in range(6)]
    else:
        expected = [[warmup_cosine_lr(s, lr, 20, 60, 3e-5) for lr in (0.4, 0.1)] for s in range(60)]
    rows = stepped(optimizer, entry["scheduler"], len(expected))
    np.testing.assert_allclose(rows[:, :2], expected)
    assert (rows[:, 2] == 0.2).all()


def test_step_schedule_is_torchs():
    def rates(make):
        optimizer = torch.optim.SGD([group(0.3)], lr=1.0)
        return stepped(optimizer, make(optimizer), 12)

    ours = rates(lambda o: ClosedFormLR(o, lambda epoch, base: multi_step_lr(epoch, base, [6, 3])))
    np.testing.assert_allclose(ours, rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 6])))


def test_scheduler_resumes_from_the_step_alone():
    def make():
        optimizer = torch.optim.SGD([group(0.4), group(0.1, static_lr=True)], lr=1.0)
        cfg = SchedulerConfig(warmup_epochs=1)
        return optimizer, build_scheduler(optimizer, cfg, total_steps=20, max_epochs=4)["scheduler"]

    optimizer, scheduler = make()
    whole = stepped(optimizer, scheduler, 20)
    first, scheduler = make()
    stepped(first, scheduler, 7)
    again, resumed = make()
    state = first.state_dict()
    for g in state["param_groups"]:  # solo-learn's checkpoints lack the mark
        g.pop("static_lr", None)
    again.load_state_dict(state)
    resumed.load_state_dict(scheduler.state_dict())
    np.testing.assert_array_equal(stepped(again, resumed, 13), whole[7:])


@pytest.mark.parametrize(
    ("cfg", "total_steps", "max_epochs", "message"),
    [(SchedulerConfig(), math.inf, -1, "max_epochs"), (SchedulerConfig(), 100, -1, "max_epochs")],
)
def test_warmup_cosine_needs_an_end(cfg, total_steps, max_epochs, message):
    with pytest.raises(ConfigError, match=message):
        build_scheduler(torch.optim.SGD([group(0.1)], lr=1.0), cfg, total_steps, max_epochs)


def test_interval_accumulation_and_none():
    optimizer = torch.optim.SGD([group(0.4)], lr=1.0)
    assert build_scheduler(optimizer, SchedulerConfig(name="none"), 10, 1) is None
    cfg = SchedulerConfig(interval="epoch", warmup_epochs=2, warmup_start_lr=0.01, min_lr=0.02)
    entry = build_scheduler(optimizer, cfg, total_steps=1000, max_epochs=8, accumulate=4)
    assert entry["interval"] == "epoch"
    rates = stepped(optimizer, entry["scheduler"], 9)[:, 0]
    np.testing.assert_allclose(rates, [warmup_cosine_lr(e, 0.4, 2, 8, 0.04, 0.08) for e in range(9)])


@pytest.mark.parametrize("warmup", [1, 10])
def test_warmup_cosine_against_solo_learn(solo_learn, warmup):
    from solo.utils.lr_scheduler import LinearWarmupCosineAnnealingLR as Theirs

    def rates(make):
        optimizer = torch.optim.SGD([group(0.4), group(0.1)], lr=1.0)
        return stepped(optimizer, make(optimizer), 201)

    entry = SchedulerConfig(warmup_epochs=warmup, min_lr=1e-3)
    ours = rates(lambda o: build_scheduler(o, entry, total_steps=200, max_epochs=200)["scheduler"])
    theirs = rates(lambda o: Theirs(o, warmup, 200, warmup_start_lr=3e-5, eta_min=1e-3))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_lightning_drives_the_scheduler():
    import lightning.pytorch as pl

    class Model(pl.LightningModule):
        def __init__(self, cfg):
            super().__init__()
            self.cfg, self.layer, self.rates = cfg, nn.Linear(3, 1), []

        def training_step(self, batch, _):
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            return self.layer(batch[1][0].mean((2, 3))).mean()

        def configure_optimizers(self):
            cfg = OptimizerConfig(name="lars", batch_size=8, lr=0.4)
            optimizer = build_optimizer([{"name": "layer", "params": self.layer.parameters()}], cfg, lr=0.4)
            total, epochs = self.trainer.estimated_stepping_batches, self.trainer.max_epochs
            return {
                "optimizer": optimizer,
                "lr_scheduler": build_scheduler(optimizer, self.cfg, total, epochs),
            }

    model = Model(SchedulerConfig(warmup_epochs=1))
    fit(model, random_batches(4), max_epochs=3, accumulate_grad_batches=2)
    expected = [warmup_cosine_lr(step, 0.4, 2, 6, 3e-5) for step in range(6) for _ in range(2)]
    np.testing.assert_allclose(model.rates, expected)
    model = Model(SchedulerConfig(name="step", lr_decay_steps=[1]))
    fit(model, random_batches(4), max_epochs=2)
    np.testing.assert_allclose(model.rates, [0.4] * 4 + [0.04] * 4)


# Parameter groups and rates.


def test_split_no_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    probe, norm = nn.Linear(4, 2), nn.LayerNorm(4)
    groups = split_no_decay(
        [
            {"name": "backbone", "params": net.parameters()},
            {
                "name": "classifier",
                "params": probe.parameters(),
                "lr": 0.1,
                "weight_decay": 0.01,
                "static_lr": True,
            },
            {"name": "norm", "params": norm.parameters()},
            {"params": [nn.Parameter(torch.ones(2, 2))]},
        ]
    )
    names = ["backbone", "backbone_no_decay", "classifier", "classifier_no_decay", "norm_no_decay", None]
    assert [g.get("name") for g in groups] == names
    assert [[p.ndim for p in g["params"]] for g in groups] == [[4], [1, 1, 1], [2], [1], [1, 1], [2]]
    assert [g.get("weight_decay") for g in groups] == [None, 0, 0.01, 0, 0, None]
    assert [g.get("lr") for g in groups] == [None, None, 0.1, 0.1, None, None]
    assert groups[3]["static_lr"]


def test_split_no_decay_against_solo_learn(solo_learn):
    from solo.utils.misc import remove_bias_and_norm_from_weight_decay as theirs

    net, probe = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 2)
    groups = [
        {"name": "backbone", "params": list(net.parameters())},
        {"name": "classifier", "params": list(probe.parameters()), "lr": 0.1, "weight_decay": 0},
    ]
    plain = [
        [(k, v if k != "params" else [id(p) for p in v]) for k, v in sorted(g.items())] for g in split_no_decay(groups)
    ]
    assert plain == [
        [(k, v if k != "params" else [id(p) for p in v]) for k, v in sorted(g.items())] for g in theirs(groups)
    ]


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("sgd", {}, {"momentum": 0.9, "nesterov": False}),
        ("sgd", {"momentum": 0.5}, {"momentum": 0.5}),
        (
            "lars",
            {},
            {"momentum": 0.9, "eta": 1e-3, "eps": 1e-8, "clip_lr": False, "exclude_bias_n_norm": False},
        ),
        ("lars", {"eta": 0.02, "clip_lr": True}, {"momentum": 0.9, "eta": 0.02, "clip_lr": True}),
        ("adam", {}, {"betas": (0.9, 0.999)}),
        ("adamw", {}, {"betas": (0.9, 0.999)}),
    ],
)
def test_build_optimizer(name, kwargs, expected):
    cfg = OptimizerConfig(name, 256, 0.3, weight_decay=1e-4, exclude_bias_n_norm_wd=True, kwargs=kwargs)
    net = nn.Linear(3, 2)
    optimizer = build_optimizer([{"name": "net", "params": net.parameters(), "lr": 0.7}], cfg, lr=0.6)
    decayed, plain = optimizer.param_groups
    assert (decayed["name"], plain["name"]) == ("net", "net_no_decay")
    assert (decayed["weight_decay"], plain["weight_decay"]) == (1e-4, 0)
    assert decayed["lr"] == 0.7 and optimizer.defaults["lr"] == 0.6
    assert {key: decayed[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("lr", "classifier_lr", "batch", "devices", "accumulate", "expected"),
    [
        (1.0, 0.1, 256, 1, 1, (1.0, 0.1)),  # CIFAR byol
        (0.5, 0.1, 128, 2, None, (0.5, 0.1)),  # ImageNet-100 byol
        (0.45, 0.2, 64, 2, 16, (3.6, 1.6)),  # ImageNet byol
        (0.3, 0.4, 64, 2, 1, (0.15, 0.2)),  # ImageNet mocov2plus
        (3e-4, 3e-4, 128, 8, 1, (1.2e-3, 1.2e-3)),  # ImageNet-100 mocov3 ViT
        (0.3, None, 256, 1, 1, (0.3, None)),  # linear
    ],
)
def test_effective_lrs(lr, classifier_lr, batch, devices, accumulate, expected):
    assert effective_lrs(lr, classifier_lr, batch, devices, accumulate) == pytest.approx(expected)


# Configuration.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "larz"}, "optimizer.name .*did you mean 'lars'"),
        ({"lr": math.nan}, "optimizer.lr .*nan"),
        ({"lr": -0.1}, "optimizer.lr"),
        ({"lr": math.inf}, "optimizer.lr"),
        ({"classifier_lr": math.nan}, "optimizer.classifier_lr"),
        ({"weight_decay": -1e-4}, "optimizer.weight_decay"),
        ({"batch_size": 0}, "optimizer.batch_size"),
        ({"layer_decay": 1.5}, "optimizer.layer_decay"),
        ({"effective_lr": math.nan}, "optimizer.effective_lr"),
        ({"kwargs": {"clip_r": True}}, "optimizer.kwargs.clip_r .*did you mean 'clip_lr'"),
        ({"kwargs": {"clip_lr": 1}}, "optimizer.kwargs.clip_lr must be true or false"),
        ({"kwargs": {"eta": "high"}}, "optimizer.kwargs.eta"),
        ({"kwargs": {"eta": math.nan}}, "optimizer.kwargs.eta"),
        ({"kwargs": {"weight_decay": 0.1}}, "optimizer.kwargs.weight_decay is not an option of lars"),
        ({"kwargs": {"nesterov": True, "momentum": 0}}, "optimizer.kwargs does not suit lars: .*nesterov"),
        ({"name": "adamw", "kwargs": {"betas": [0.9]}}, "optimizer.kwargs.betas must be a list of 2"),
        ({"name": "adamw", "kwargs": {"betas": [0.9, 1.5]}}, "optimizer.kwargs does not suit adamw"),
        (
            {"name": "adamw", "kwargs": {"momentum": 0.9}},
            "optimizer.kwargs.momentum is not an option of adamw",
        ),
    ],
)
def test_optimizer_config_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**{"name": "lars", "batch_size": 256, "lr": 0.1, **changes})


def test_a_section_of_a_configuration_becomes_its_dataclass():
    node = OmegaConf.create({"name": "adamw", "batch_size": "64", "lr": "1e-3", "kwargs": {"betas": [0.9, 0.95]}})
    expected = OptimizerConfig("adamw", 64, 1e-3, kwargs={"betas": [0.9, 0.95]})
    assert build(OptimizerConfig, node, "optimizer") == expected
    assert build(OptimizerConfig, expected, "optimizer") is expected
    for bad, key in (({"lr": "fast"}, "optimizer.lr"), ({"lr": None}, "optimizer.lr"), ({}, "optimizer")):
        with pytest.raises(ConfigError, match=key):
            build(OptimizerConfig, {"name": "sgd", "batch_size": 8, **bad}, "optimizer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "warmup_cosin"}, "scheduler.name .*did you mean 'warmup_cosine'"),
        ({"name": "step"}, "scheduler.lr_decay_steps"),
        ({"name": "step", "lr_decay_steps": [0, 5]}, "scheduler.lr_decay_steps"),
        ({"interval": "steps"}, "scheduler.interval .*did you mean 'step'"),
        ({"warmup_epochs": -1}, "scheduler.warmup_epochs"),
        ({"min_lr": math.nan}, "scheduler.min_lr"),
        ({"warmup_start_lr": math.inf}, "scheduler.warmup_start_lr"),
    ],
)
def test_scheduler_config_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**changes)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_on_a_cpu_is_the_loop_in_one_kernel(name):
    """Also of parameters that get their first gradient late, as DINO's last layer does."""
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(3)]
    gradients = [[torch.randn(5, 3), torch.randn(3) if step > 1 else None] for step in range(6)]

    def trained(**kwargs):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        cfg = OptimizerConfig(name=name, batch_size=8, lr=0.1, weight_decay=0.05, kwargs=kwargs)
        optimizer = build_optimizer([{"params": params}], cfg, 0.1)
        for step in gradients:
            for p, gradient in zip(params, step, strict=True):
                p.grad = gradient
            optimizer.step()
        return optimizer.defaults["fused"], params

    (fused, ours), (_, loop) = trained(), trained(foreach=False)
    assert fused
    for a, b in zip(ours, loop, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
