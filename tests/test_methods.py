"""Every registered method: what it declares, its whole step by hand, what runs when, its teacher."""

import copy
import math

import formulas
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import FRAMEWORKS, build, fit, framework_of, own_kwargs, random_batches

from solo_ext.errors import ConfigError
from solo_ext.methods import METHODS

NAMES = [name for name in METHODS if name != "res_moco"]  # an alias
CRITERION = {"data__num_classes": 0, "gap__enabled": False}
ADDED = {"simclr", "simsiam"}  # frameworks without a teacher of their own


@pytest.mark.parametrize("method", NAMES)
def test_declared_defaults_yield_to_the_configuration(method):
    assert build(method, intra__weight=0.5, momentum__stages="full").intra.weight == 0.5
    assert build(method, momentum__stages="none", intra__weight=0.0).teacher.stages == []


@pytest.mark.parametrize("method", NAMES)
def test_what_each_method_declares(method):
    """Stages, intra term and loss scale, and so the networks that exist."""
    framework, model = framework_of(method), build(method, momentum__stages=None)
    head = "head" if framework == "dino" else "projector"
    parts = {name.split(".")[0] for name, _ in model.named_parameters()} - {"classifier"}
    student = {"backbone", head} | ({"predictor"} if framework in ("byol", "mocov3", "simsiam") else set())
    teacher = set()
    if method.startswith("projector_ema_"):
        teacher = {f"momentum_{head}"}
    elif method.startswith("res_"):
        teacher = {f"momentum_{name}" for name in student}
    elif framework not in ADDED:
        teacher = {"momentum_backbone", f"momentum_{head}"}
    assert parts == student | teacher
    assert model.intra.weight == (1.0 if method.startswith("res_") else 0.0)
    assert model.kwargs.loss_scale == ("paper" if method in ("res_byol", "res_mocov3") else "solo")
    assert METHODS["res_moco"] is METHODS["res_mocov3"]


# The whole step, by hand with explicit networks.


def both(loss, q, k):
    """The two directions."""
    return loss(q[0], k[1]) + loss(q[1], k[0])


def queue_per_view(q, k, m):
    return 0.5 * sum(formulas.queue_nce(q[i], k[j], m.queue[j].T, 0.2) for i, j in ((0, 1), (1, 0)))


def contrast(q, k, m=None):
    return 0.5 * both(lambda a, b: formulas.info_nce(a, b, 0.2), q, k)


def distillation(q, k, m):
    return 0.5 * both(lambda a, b: formulas.dino(a, b, m.dino_loss_func.center[0], 0.1, 0.07), q, k)


# method or framework, at the loss scale of its default or the one named -> loss of the queries and targets of two
# views, and of the model, for its queue or centre
FORMULAS = {
    "byol": lambda q, k, m: both(formulas.cosine_distance, q, k),
    "byol, paper": lambda q, k, m: 0.5 * both(formulas.negative_cosine, q, k),  # paper A, Eq. 5
    "res_byol": lambda q, k, m: 0.5 * both(formulas.cosine_distance, q, k),  # paper B, Eq. 3 and 5
    "dino": distillation,
    "mocov2plus": queue_per_view,
    "mocov3": lambda q, k, m: 2 * 0.2 * 2 * contrast(q, k),
    "mocov3, paper": contrast,
    "res_mocov3": contrast,  # paper B, Eq. 3
    "res_mocov3, solo": lambda q, k, m: 2 * 0.2 * 2 * contrast(q, k),
    "ressl": lambda q, k, m: formulas.relational(q[0], k[1], m.queue, 0.1, 0.04),  # view 0 is strong, view 1 weak
    "simclr": lambda q, k, m: formulas.nt_xent(q, 0.2, k),
    "simclr, opposite": contrast,
    "simsiam": lambda q, k, m: 0.5 * both(formulas.negative_cosine, q, k),
}


def float64(model):
    """`model` in float64, with a teacher, a centre and a queue that have moved."""
    generator = torch.Generator().manual_seed(7)
    model = model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("momentum_"):
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
        if hasattr(model, "dino_loss_func"):
            model.dino_loss_func.center.normal_(generator=generator)
        if hasattr(model, "queue"):
            model.queue.copy_(F.normalize(model.queue, dim=1))
    return model


def by_hand(model, views):
    """Outputs of all views: the student's projector and last head, the teacher's projector and predictor."""
    projector = "head" if hasattr(model, "head") else "projector"
    f, g, h = model.backbone, getattr(model, projector), getattr(model, "predictor", torch.nn.Identity())
    fm, gm = getattr(model, "momentum_backbone", f), getattr(model, f"momentum_{projector}", g)
    z = [g(f(x)) for x in views]
    with torch.no_grad():
        zm = [gm(fm(x)) for x in views]
        qm = [getattr(model, "momentum_predictor", torch.nn.Identity())(x) for x in zm]
    return [h(x) for x in z], z, zm, qm


STEPS = [
    *((method, {}) for method in NAMES),
    *((method, {"momentum__inter": False}) for method in NAMES if method in FRAMEWORKS or method.startswith("res_")),
    # momentum added (paper A, Table 1), and removed
    ("simclr", {"momentum__stages": "full"}),
    ("simclr", {"momentum__stages": "full", "method_kwargs__negatives": "opposite"}),
    ("projector_ema_simclr", {"method_kwargs__negatives": "opposite"}),
    ("simsiam", {"momentum__stages": "full"}),
    *((framework, {"momentum__stages": "none"}) for framework in FRAMEWORKS if framework not in ADDED),
    *((framework, {"momentum__stages": "backbone"}) for framework in FRAMEWORKS),
    # the same scale for a comparison
    ("mocov3", {"method_kwargs__loss_scale": "paper"}),
    ("projector_ema_byol", {"method_kwargs__loss_scale": "paper"}),  # paper A, Alg. 1
    ("res_mocov3", {"method_kwargs__loss_scale": "solo"}),
    ("ressl", {"method_kwargs__weak_probe": False}),
    ("projector_ema_ressl", {"method_kwargs__weak_probe": False}),
    # paper A's BN1 and BN2 (Tables C.8 and D.9)
    ("byol", {"backbone__last_norm": True, "method_kwargs__proj_last_norm": True}),
    # an intra term on any stages, and one at the projector although there is a predictor
    ("byol", {"intra__weight": 0.5, "momentum__stages": "projector"}),
    ("res_simsiam", {"intra__target": "projector"}),
]


def ids(rows):
    """`ressl-weak_probe=False` of (method, changes, ...)."""
    return [
        "-".join([method, *(f"{k.split('__')[1]}={v}" for k, v in changes.items())]) for method, changes, *_ in rows
    ]


@pytest.mark.parametrize(("method", "changes"), STEPS, ids=ids(STEPS))
def test_the_whole_step_by_hand(method, changes):
    """Loss and every gradient: targets from the teacher on the other view, plus D(q, q_m) on the same view."""
    model = float64(build(method, **CRITERION, **changes))
    _, views, _ = batch = random_batches(1, batch=4, dtype=torch.float64)[0]
    q, z, zm, qm = by_hand(model, views)
    framework = framework_of(method)
    momentum = bool(model.teacher.stages) and changes.get("momentum__inter", True)
    targets = zm if momentum else [x.detach() for x in z]
    if framework == "simclr" and not momentum:
        targets = z  # SimCLR's own positives and negatives have gradient
    said = [str(v) for key, v in changes.items() if key in ("method_kwargs__loss_scale", "method_kwargs__negatives")]
    names = [", ".join([name, *said]) for name in (method, framework)]
    expected = next(FORMULAS[name] for name in names if name in FORMULAS)(q, targets, copy.deepcopy(model))
    weight = changes.get("intra__weight", 1.0 if method.startswith("res_") else 0.0)
    if weight:
        same = zm if changes.get("intra__target") == "projector" else qm
        expected = expected + weight * 0.5 * sum(map(formulas.cosine_distance, q, same))

    loss = model.training_step(batch, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("momentum_") for name in learning)
    ours = torch.autograd.grad(loss, list(learning.values()))
    theirs = torch.autograd.grad(expected, list(learning.values()))
    for name, a, b in zip(learning, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_paper_as_norms_end_the_networks():
    """BN1 and BN2 of Tables C.8 and D.9, in the teacher too."""
    model = build("byol", backbone__last_norm=True, method_kwargs__proj_last_norm=True)
    for prefix in ("", "momentum_"):
        ends = [getattr(model, f"{prefix}backbone").fc, getattr(model, f"{prefix}projector")[-1]]
        assert [(type(end), end.num_features, end.affine) for end in ends] == [
            (torch.nn.BatchNorm1d, 128, True), (torch.nn.BatchNorm1d, 8, True),
        ]  # fmt: skip


# Who runs which view.

TWICE = [True, True]  # the student on both views, with gradient
COSTS = [  # method, changes, the student's backbone passes (with gradient?), the teacher's: backbone, head
    *((method, {}, TWICE, 2, 2) for method in ("byol", "dino", "mocov2plus", "mocov3")),
    *((method, {}, TWICE, 0, 0) for method in ("simclr", "simsiam")),
    *((method, {}, TWICE, 0, 2) for method in NAMES if method.startswith("projector_ema_") and "ressl" not in method),
    *((method, {}, TWICE, 2, 2) for method in NAMES if method.startswith("res_")),
    ("ressl", {}, [True, False], 1, 1),
    ("ressl", {"method_kwargs__weak_probe": False}, [True], 1, 1),
    ("projector_ema_ressl", {}, [True, False], 0, 1),
    ("projector_ema_ressl", {"method_kwargs__weak_probe": False}, [True, False], 0, 1),
    ("ressl", {"momentum__classifier": True}, [True, False], 2, 2),
    ("ressl", {"momentum__inter": False}, [True, False], 0, 0),
    ("ressl", {"momentum__inter": False, "method_kwargs__weak_probe": False}, [True, False], 0, 0),
    ("ressl", {"momentum__stages": "none"}, [True, False], 0, 0),
    ("res_ressl", {"method_kwargs__weak_probe": False}, TWICE, 2, 2),
    ("ressl", {"data__num_classes": 0}, [True], 1, 1),
    ("projector_ema_ressl", {"data__num_classes": 0}, [True, False], 0, 1),
    *((f, {"momentum__inter": False}, TWICE, 0, 0) for f in ("byol", "dino", "mocov2plus", "mocov3")),
]


@pytest.mark.parametrize(("method", "changes", "student", "backbones", "heads"), COSTS, ids=ids(COSTS))
def test_who_runs_which_view(method, changes, student, backbones, heads):
    """Nothing runs whose output nobody uses. To measure the gap only the teacher may run more often."""
    for gap in (False, True):
        model = build(method, **changes, gap__enabled=gap)
        runs = {"backbone": [], "momentum_backbone": [], "momentum_head": []}

        def note(key, runs=runs):
            return lambda module, inputs, output: runs[key].append(output.requires_grad)

        head = "head" if framework_of(method) == "dino" else "projector"
        for key, name in (("backbone", "backbone"), ("momentum_backbone",) * 2, ("momentum_head", f"momentum_{head}")):
            if hasattr(model, name):
                getattr(model, name).register_forward_hook(note(key))
        model.training_step(random_batches(1)[0], 0)
        assert runs["backbone"] == student
        if not (gap and changes):
            assert runs["momentum_backbone"] == [False] * backbones
            assert runs["momentum_head"] == [False] * heads


def test_the_weak_view_trains_the_probe_and_nothing_else():
    """ReSSL: with and without it the encoder's gradients are the same, the probe's are not."""
    gradients = []
    for weak in (True, False):
        model = build("ressl", method_kwargs__weak_probe=weak)
        model.training_step(random_batches(1)[0], 0).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    with_it, without = gradients
    assert with_it.keys() == without.keys()
    for name in with_it:
        assert torch.equal(with_it[name], without[name]) == (not name.startswith("classifier")), name


def test_unlabelled_data_has_no_probe_and_partly_labelled_data_ignores_the_rest():
    assert build("byol", data__num_classes=0).classifier is None
    model = build("byol", gap__enabled=False)
    index, views, targets = random_batches(1)[0]
    targets[:4] = -1
    logits = model(views[0])["logits"]
    assert torch.isfinite(model.training_step((index, views, torch.full_like(targets, -1)), 0))
    total = model.training_step((index, views, targets), 0)
    ssl = build("byol", **CRITERION).training_step((index, views, targets), 0)
    assert torch.isfinite(total) and total > ssl
    assert logits.shape == (8, 10)


REFUSED = [  # method, changes, what the sentence says
    (
        "mocov3",
        {"method_kwargs__temperature": 0},
        "method_kwargs.temperature must be a finite number of at least 1e-06",
    ),
    ("ressl", {"method_kwargs__temperature_k": -0.04}, "method_kwargs.temperature_k must be"),
    ("dino", {"method_kwargs__num_prototypes": 0}, "method_kwargs.num_prototypes must be a whole number of at least 1"),
    ("dino", {"method_kwargs__warmup_teacher_temperature_epochs": 9}, r"\(9\) must not exceed max_epochs \(2\)"),
    ("mocov2plus", {"method_kwargs__queue_size": 0}, "method_kwargs.queue_size must be"),
    ("byol", {"method_kwargs__proj_hidden_dim": 0}, "method_kwargs.proj_hidden_dim must be"),
    ("simclr", {"method_kwargs__negatives": "opposit"}, "did you mean 'opposite'"),
    ("ressl", {"data__num_small_crops": 4}, "ReSSL takes a strong and a weak view, not 2 large and 4 small"),
    ("ressl", {"data__num_large_crops": 3}, "not 3 large and 0 small"),
    ("simsiam", {"intra__weight": 1.0}, "intra.weight > 0 needs a teacher that differs from the student"),
    ("byol", {"momentum__stages": ["block9"]}, "no stage 'block9' with a teacher; did you mean 'block4'"),
    (
        "projector_ema_dino",
        {"momentum__classifier": True},
        "momentum.classifier needs labels and a teacher with a back",
    ),
]


@pytest.mark.parametrize(("method", "changes", "message"), REFUSED, ids=[f"{m}-{next(iter(c))}" for m, c, _ in REFUSED])
def test_what_cannot_work_is_refused_in_a_sentence(method, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(method, **changes)
    assert "\n" not in str(error.value)


def test_the_effective_lr_wins_over_the_configured_one():
    model = build("byol", accumulate_grad_batches=4)
    assert model.cfg.optimizer.rates(model.accumulate) == pytest.approx(
        (0.05 * 4, 0.1 * 4)
    )  # solo-learn: times the accumulated batches
    model = build("byol", accumulate_grad_batches=4, optimizer__effective_lr=0.123)
    assert model.cfg.optimizer.rates(model.accumulate)[0] == 0.123


# The teacher.

HEADS = {  # independent of the code under test: which modules are which stage
    "byol": {"projector.fc1": ["projector.0", "projector.1"], "projector.fc2": ["projector.3"]},
    "dino": {
        **{f"projector.fc{i}": [f"head.mlp.{2 * i - 2}"] for i in (1, 2, 3)},
        "projector.prototypes": ["head.last_layer"],
    },
    "mocov2plus": {"projector.fc1": ["projector.0"], "projector.fc2": ["projector.2"]},
    "mocov3": {"projector.fc1": ["projector.0", "projector.1"], "projector.fc2": ["projector.3"]},
    "ressl": {"projector.fc1": ["projector.0"], "projector.fc2": ["projector.2"]},
    "simclr": {"projector.fc1": ["projector.0"], "projector.fc2": ["projector.2"]},
    "simsiam": {
        "projector.fc1": ["projector.0", "projector.1"],
        "projector.fc2": ["projector.3", "projector.4"],
        "projector.fc3": ["projector.6"],
    },
}
BLOCKS = {
    "conv1": ["backbone.conv1", "backbone.bn1"],
    **{f"block{i}": [f"backbone.layer{i}"] for i in range(1, 5)},
}
SCOPES = [
    *((f, [stage], "cosine") for f in FRAMEWORKS for stage in (*BLOCKS, *HEADS[f])),
    *((f, preset, "cosine") for f in FRAMEWORKS for preset in ("full", "projector")),
    *((f, preset, "constant") for f in FRAMEWORKS for preset in ("backbone", "none")),
]


class Recorder(pl.Callback):
    """The student's parameters after every optimizer step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > len(self.states):
            self.states.append({name: p.detach().double() for name, p in copy.deepcopy(module).named_parameters()})


@pytest.mark.parametrize(("framework", "spec", "schedule"), SCOPES, ids=lambda v: str(v))
def test_teacher_follows_a_hand_written_loop(framework, spec, schedule):
    """Which weights it owns, and what they are after 5 steps."""
    model = build(framework, momentum__stages=spec, momentum__schedule=schedule, momentum__base_tau=0.7, **CRITERION,
                  **own_kwargs(framework, freeze_last_layer=0))  # fmt: skip
    row = {**BLOCKS, **HEADS[framework]}
    presets = {"full": [*row], "backbone": [*BLOCKS], "projector": [*HEADS[framework]], "none": []}
    averaged = spec if isinstance(spec, list) else presets[spec]
    stages = list(row)[min(map(list(row).index, averaged), default=len(row)) :]
    owner = {
        name: stage
        for name, _ in model.named_parameters()
        for stage, paths in row.items()
        if any(name.startswith(f"{path}.") for path in paths)
    }
    owned = {name: stage for name, stage in owner.items() if stage in stages}
    teacher = {n for n, _ in model.named_parameters() if n.startswith("momentum_")}
    assert teacher == {f"momentum_{name}" for name in owned}

    value = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    fit(model, random_batches(5, batch=4), callbacks=[recorder := Recorder()])
    assert len(recorder.states) == 5
    end = dict(model.named_parameters())
    for name, stage in owned.items():
        expected = value[name]
        for t, student in enumerate(recorder.states):
            tau = 1 - 0.3 * (math.cos(math.pi * t / 5) + 1) / 2 if schedule == "cosine" else 0.7
            tau = tau if stage in averaged else 0.0  # a later stage without EMA is shared
            expected = tau * expected + (1 - tau) * student[name]
        torch.testing.assert_close(end[f"momentum_{name}"].double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def losses(method, **changes):
    """Training losses, and the model after them."""
    seen = []

    class Tape(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            seen.append(outputs["loss"].item())

    fit(model := build(method, **changes), random_batches(3), callbacks=[Tape()])
    return seen, model


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_tau_0_equals_sharing_and_tau_1_never_moves(framework):
    """Sharing: the target branch is the student's own, with stop-gradient (paper A, Sec. 2.2)."""
    # for SimCLR `none` means no target branch at all, so two ways of sharing are compared
    shared, _ = losses(framework, momentum__stages={"backbone": 0.0} if framework == "simclr" else "none")
    followed, _ = losses(framework, momentum__stages={"projector": 0.0})
    assert followed == pytest.approx(shared, rel=1e-5)
    head = "head" if framework == "dino" else "projector"
    start = build(framework).part("projector").state_dict()
    frozen, model = losses(framework, momentum__stages={"projector": 1.0})  # paper A, Table 7
    assert frozen != pytest.approx(shared, rel=1e-5)
    for name, p in getattr(model, f"momentum_{head}").named_parameters():
        assert torch.equal(p, start[name]), name
    assert any(not torch.equal(p, start[name]) for name, p in model.part("projector").named_parameters())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_accumulation_updates_the_teacher_once_per_optimizer_step(framework):
    model = build(framework, momentum__stages="full", momentum__schedule="constant", momentum__base_tau=0.5)
    start = model.backbone.conv1.weight.detach().clone()
    recorder = Recorder()
    fit(model, random_batches(6), callbacks=[recorder], accumulate_grad_batches=3)
    first, second = (state["backbone.conv1.weight"] for state in recorder.states)
    expected = 0.5 * (0.5 * start + 0.5 * first) + 0.5 * second
    torch.testing.assert_close(model.momentum_backbone.conv1.weight.double(), expected, rtol=1e-5, atol=1e-7)
    if hasattr(model, "queue"):  # every batch enters the queue
        assert model.queue_ptr.item() == 6 * 8 % 24


# DINO's own.


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_dinos_prototypes_stand_still_in_the_first_epochs(norm_last_layer):
    model = build("dino", method_kwargs__freeze_last_layer=2, method_kwargs__norm_last_layer=norm_last_layer)
    start = copy.deepcopy(model.head.last_layer.state_dict())
    moved = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            state = module.head.last_layer.state_dict()
            moved.append([not torch.equal(state[name], start[name]) for name in ("weight_g", "weight_v")])

    fit(model, random_batches(1), max_epochs=3, callbacks=[Watch()])
    assert moved == [[False, False], [False, False], [not norm_last_layer, True]]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_dino_clips_the_whole_gradient_of_each_tensor_of_the_backbone(accumulate):
    model = build("dino", method_kwargs__clip_grad=0.01, method_kwargs__freeze_last_layer=0)
    clip, seen = model.on_before_optimizer_step, []

    def watched(optimizer):
        for act in (lambda _: None, clip):
            act(optimizer)
            seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    model.on_before_optimizer_step = watched
    fit(model, random_batches(accumulate), accumulate_grad_batches=accumulate)
    whole, clipped = seen
    for name, before in whole.items():
        limit = 0.01 / before.norm().clamp(min=0.01) if name.startswith("backbone.") else 1.0
        torch.testing.assert_close(clipped[name], before * limit, rtol=1e-3, atol=1e-8, msg=name)
