"""Every registered method: what it declares, its whole step by hand, what runs when, its teacher."""

import copy
import math

import formulas
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import build, fit, own_kwargs, random_batches, tiny_config
from frameworks import (
    FRAMEWORKS,
    METHODS_TESTED,
    REGISTERED,
    SPECS,
    TWICE,
    framework_of,
    gathered,
    ids,
    missing,
    spec_of,
    variants,
)

from solo_ext.errors import ConfigError
from solo_ext.methods import METHODS
from solo_ext.methods.step import Monitor

CRITERION = {"data__num_classes": 0, "gap__enabled": False}


@pytest.mark.parametrize("framework", REGISTERED)
def test_every_framework_says_what_it_is(framework):
    if framework not in SPECS:
        pytest.fail(missing(framework), pytrace=False)


@pytest.mark.parametrize("method", METHODS_TESTED)
def test_declared_defaults_yield_to_the_configuration(method):
    assert build(method, intra__weight=0.5, momentum__stages="full").intra.weight == 0.5
    assert build(method, momentum__stages="none", intra__weight=0.0).teacher.stages == []


@pytest.mark.parametrize("method", METHODS_TESTED)
def test_what_each_method_declares(method):
    """Stages, intra term and loss scale, and so the networks that exist."""
    spec, model = spec_of(method), build(method, momentum__stages=None)
    parts = {name.split(".")[0] for name, _ in model.named_parameters()} - {"classifier"}
    student = {"backbone", spec.head} | ({"predictor"} if spec.predictor else set())
    teacher = set()
    if method.startswith("projector_ema_"):
        teacher = {f"momentum_{spec.head}"}
    elif method.startswith("res_"):
        teacher = {f"momentum_{name}" for name in student}
    elif spec.teacher:
        teacher = {"momentum_backbone", f"momentum_{spec.head}"}
    assert parts == student | teacher
    assert model.intra.weight == (1.0 if method.startswith("res_") else 0.0)
    assert model.kwargs.loss_scale == (spec.loss_scale.get(method, "solo") if spec.loss_scale else None)


def test_res_moco_is_another_name_of_res_mocov3():
    assert METHODS["res_moco"] is METHODS["res_mocov3"]


@pytest.mark.parametrize("method", METHODS_TESTED)
def test_a_declared_class_builds_the_module_of_the_registry(method):
    declared = METHODS.declared[method]
    assert not issubclass(declared, pl.LightningModule)
    module = declared(tiny_config(method))
    assert type(module) is METHODS[method] and isinstance(module, declared) and isinstance(module, pl.LightningModule)
    assert type(copy.deepcopy(module)) is METHODS[method]


# The whole step, by hand with explicit networks.


def float64(model, spec):
    """`model` in float64, with a teacher, a centre and a queue that have moved."""
    generator = torch.Generator().manual_seed(7)
    model = model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("momentum_"):
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
        if "center" in (memory := spec.memory(model)):
            memory["center"].normal_(generator=generator)
        if "queue" in memory:
            model.queue.copy_(F.normalize(model.queue, dim=1))
    return model


def by_hand(model, views, projector):
    """Outputs of all views: the student's projector and last head, the teacher's projector and predictor."""
    f, g, h = model.backbone, getattr(model, projector), getattr(model, "predictor", torch.nn.Identity())
    fm, gm = getattr(model, "momentum_backbone", f), getattr(model, f"momentum_{projector}", g)
    z = [g(f(x)) for x in views]
    with torch.no_grad():
        zm = [gm(fm(x)) for x in views]
        qm = [getattr(model, "momentum_predictor", torch.nn.Identity())(x) for x in zm]
    return [h(x) for x in z], z, zm, qm


STEPS = [
    *((method, {}) for method in METHODS_TESTED),
    *((method, {"momentum__inter": False}) for method in (*FRAMEWORKS, *variants("res_"))),
    # momentum removed, and in part
    *((framework, {"momentum__stages": "none"}) for framework in FRAMEWORKS if spec_of(framework).teacher),
    *((framework, {"momentum__stages": "backbone"}) for framework in FRAMEWORKS),
    *gathered("steps"),
]


@pytest.mark.parametrize(("method", "changes"), STEPS, ids=ids(STEPS))
def test_the_whole_step_by_hand(method, changes):
    """Loss and every gradient: targets from the teacher on the other view, plus D(q, q_m) on the same view."""
    spec = spec_of(method)
    model = float64(build(method, **CRITERION, **changes), spec)
    _, views, _ = batch = random_batches(1, batch=4, dtype=torch.float64)[0]
    q, z, zm, qm = by_hand(model, views, spec.head)
    momentum = bool(model.teacher.stages) and changes.get("momentum__inter", True)
    targets = zm if momentum else [x.detach() for x in z]
    if spec.own_targets and not momentum:
        targets = z  # its own positives and negatives have gradient
    pair = ([q[0]], [targets[1]]) if spec.one_direction else (q, targets)
    expected = spec.loss(spec.numbers(method, changes, model), *pair)
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


def test_the_norms_of_projector_ema_end_the_networks():
    """BN1 and BN2 of Tables C.8 and D.9, in the teacher too."""
    model = build("byol", backbone__last_norm=True, method_kwargs__proj_last_norm=True)
    for prefix in ("", "momentum_"):
        ends = [getattr(model, f"{prefix}backbone").fc, getattr(model, f"{prefix}projector")[-1]]
        assert [(type(end), end.num_features, end.affine) for end in ends] == [
            (torch.nn.BatchNorm1d, 128, True), (torch.nn.BatchNorm1d, 8, True),
        ]  # fmt: skip


# solo-learn's heads on 128 features, with hidden width 16 and output 8: layers in-out, +b with a bias, bn0 not affine
HEADS = {
    "byol": ("128-16+b bn relu 16-8+b", "8-16+b bn relu 16-8+b"),
    "dino": ("128-16+b gelu 16-16+b gelu 16-8+b",),
    "mocov2plus": ("128-16+b relu 16-8+b",),
    "mocov3": ("128-16 bn relu 16-8 bn0", "8-16 bn relu 16-8"),
    "mocov3 on a ViT": ("24-16 bn relu 16-16 bn relu 16-8 bn0", "8-16 bn relu 16-8 bn0"),
    "ressl": ("128-16+b relu 16-8+b",),
    "simclr": ("128-16+b relu 16-8+b",),
    "simsiam": ("128-16 bn relu 16-16 bn relu 16-8+b bn0", "8-16 bn relu 16-8+b"),
}
VIT = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 24}


def layers(head):
    said = {torch.nn.ReLU: "relu", torch.nn.GELU: "gelu"}
    for layer in head.modules():
        if isinstance(layer, torch.nn.Linear):
            yield f"{layer.in_features}-{layer.out_features}" + ("+b" if layer.bias is not None else "")
        elif isinstance(layer, torch.nn.BatchNorm1d):
            yield "bn" if layer.affine else "bn0"
        elif type(layer) in said:
            yield said[type(layer)]


@pytest.mark.parametrize("case", HEADS)
def test_the_heads_are_solo_learns(case):
    changes = {"backbone__name": "vit_tiny", "backbone__kwargs": VIT} if "ViT" in case else {}
    model = build(case.split()[0], **changes)
    heads = [model.part(name) for name in model.parts if name != "backbone"]
    assert tuple(" ".join(layers(head)) for head in heads) == HEADS[case]


# Who runs which view.

# method, changes, the student's backbone passes (with gradient?), the teacher's: backbone, head
BOTH_WAYS = [name for name in FRAMEWORKS if not spec_of(name).one_direction]
WITH_TEACHER = [name for name in BOTH_WAYS if spec_of(name).teacher]
COSTS = [
    *((f, {}, TWICE, *((2, 2) if f in WITH_TEACHER else (0, 0))) for f in BOTH_WAYS),
    *((v, {}, TWICE, 0, 2) for v in variants("projector_ema_") if framework_of(v) in BOTH_WAYS),
    *((v, {}, TWICE, 2, 2) for v in variants("res_") if framework_of(v) in BOTH_WAYS),
    *((f, {"momentum__inter": False}, TWICE, 0, 0) for f in WITH_TEACHER),
    *gathered("passes"),
]


@pytest.mark.parametrize(("method", "changes", "student", "backbones", "heads"), COSTS, ids=ids(COSTS))
def test_who_runs_which_view(method, changes, student, backbones, heads):
    """Nothing runs whose output nobody uses. To measure the gap only the teacher may run more often."""
    for gap in (False, True):
        model = build(method, **changes, gap__enabled=gap)
        runs = {"backbone": [], "momentum_backbone": [], "momentum_head": []}

        def note(key, runs=runs):
            return lambda module, inputs, output: runs[key].append(output.requires_grad)

        head = spec_of(method).head
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
    assert logits.shape == (8, 10)
    losses = {term.name: term.value for term in model.terms}
    found = losses["train_class_loss"](model.look((index, views, targets)))
    labelled = [F.cross_entropy(model(view)["logits"][4:], targets[4:]) for view in views]
    torch.testing.assert_close(found, sum(labelled) / 2)


REFUSED = gathered("refused")  # method, changes, what the sentence says


@pytest.mark.parametrize(("method", "changes", "message"), REFUSED, ids=ids(REFUSED))
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

BLOCKS = {  # independent of the code under test: which modules are which stage; the specs have the heads'
    "conv1": ["backbone.conv1", "backbone.bn1"],
    **{f"block{i}": [f"backbone.layer{i}"] for i in range(1, 5)},
}
SCOPES = [
    *((f, [stage], "cosine") for f in FRAMEWORKS for stage in (*BLOCKS, *spec_of(f).heads)),
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
    heads = spec_of(framework).heads
    row = {**BLOCKS, **heads}
    presets = {"full": [*row], "backbone": [*BLOCKS], "projector": [*heads], "none": []}
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
    """Sharing: the target branch is the student's own, with stop-gradient (ProjectorEMA, Sec. 2.2)."""
    spec = spec_of(framework)
    # with targets of its own `none` means no target branch at all, so two ways of sharing are compared
    shared, _ = losses(framework, momentum__stages={"backbone": 0.0} if spec.own_targets else "none")
    followed, _ = losses(framework, momentum__stages={"projector": 0.0})
    assert followed == pytest.approx(shared, rel=1e-5)
    start = build(framework).part("projector").state_dict()
    frozen, model = losses(framework, momentum__stages={"projector": 1.0})  # ProjectorEMA, Table 7
    assert frozen != pytest.approx(shared, rel=1e-5)
    for name, p in getattr(model, f"momentum_{spec.head}").named_parameters():
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


def test_solo_learns_scripts_take_the_yaml_of_another_framework():
    build("dino", method_kwargs__pred_hidden_dim=512)
    with pytest.raises(ConfigError, match=r"unknown key 'method_kwargs\.pred_hiden_dim'"):
        build("dino", method_kwargs__pred_hiden_dim=512)


def test_simsiams_projector_ends_with_a_norm_and_so_fixes_the_bias_before_it():
    fixed = [name for name, p in build("simsiam").named_parameters() if not p.requires_grad]
    assert fixed == ["projector.6.bias"]


@pytest.mark.parametrize("inter", [True, False])
def test_no_gradient_reaches_a_target(inter):
    """Whether it comes from the teacher or, without inter-momentum, from the student, and whatever the loss does."""
    model, seen = build("byol", momentum__inter=inter, intra__weight=0.5, **CRITERION), []
    model.loss = lambda queries, targets: seen.extend(targets) or queries[0].sum()
    model.training_step(random_batches(1)[0], 0)
    assert seen and not any(target.requires_grad for target in seen)


def test_a_monitor_reads_the_first_step_and_then_every_few():
    monitor = Monitor(every=3)
    assert [step for step in range(8) if monitor.due(step)] == [0, 3, 6]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_trainer_of_the_callers_own_is_refused_half_precision_too(precision):
    """In which most of a teacher's updates would be rounded away."""
    if precision == "16-true" and not torch.cuda.is_available():
        pytest.skip("Lightning has it on GPUs only")
    with pytest.raises(ConfigError, match=f"precision: {precision} keeps averages in 16 bits"):
        fit(build(), random_batches(1), precision=precision)


def test_a_key_of_the_queue_lies_in_one_place_also_after_a_load():
    """The shape is solo-learn's; the transposed layout is four times as fast to write."""
    model = build("mocov2plus", method_kwargs__queue_size=24)
    assert model.state_dict()["queue"].shape == (2, 8, 24)
    model.load_state_dict(
        {key: x.clone(memory_format=torch.contiguous_format) for key, x in model.state_dict().items()}
    )
    assert copy.deepcopy(model).double().queue.mT.is_contiguous()
